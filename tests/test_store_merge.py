"""Stores made apart and brought together: what was computed on either is had from one, with its history, checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.conftest import Wb
from workbench import settings
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel

HOOKS = ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]


def texts(model: LanguageModel, numbers: range) -> list[torch.Tensor]:
    return [model.tokenize(f"When Mary and John went to the store, {i} of them" + " gave" * (i % 4)) for i in numbers]


def two(tiny: LanguageModel, tmp_path: Path, codec: str = "float32") -> tuple[ActivationStore, ActivationStore]:
    """Each has ten sequences, and four of them are the same."""
    one, other = (ActivationStore(tmp_path / name, codec=codec) for name in ("one", "other"))
    one.get(tiny, texts(tiny, range(10)), HOOKS)
    other.get(tiny, texts(tiny, range(6, 16)), HOOKS)
    return one, other


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_all_is_had_from_one_without_a_pass(tiny: LanguageModel, tmp_path: Path, codec: str) -> None:
    one, other = two(tiny, tmp_path, codec)
    kept = other.get(tiny, texts(tiny, range(6, 16)), HOOKS)
    before = one.stats().disk_entries
    merged = one.merge(tmp_path / "other")
    assert (before, merged.taken, merged.here, merged.damaged) == (20, 12, 8, 0)
    assert one.stats().disk_entries == 32 and other.stats().disk_entries == 20 and not one.verify()
    fresh, passes = ActivationStore(tmp_path / "one", codec=codec), tiny.forward_passes
    found = fresh.get(tiny, texts(tiny, range(16)), HOOKS)
    assert tiny.forward_passes == passes
    for hook in HOOKS:
        for i in range(10, 16):
            assert torch.equal(found[hook][i], kept[hook][i - 6])
    again = one.merge(tmp_path / "other")
    assert (again.taken, again.here, again.bytes) == (0, 20, 0)
    assert merged.bytes == sum(entry.nbytes for entry in one.show(limit=1000)) - sum(
        entry.nbytes for entry in one.show(limit=1000) if entry.sequence in known(one, range(10), tiny)
    )


def known(store: ActivationStore, numbers: range, model: LanguageModel) -> set[str]:
    lists = [tokens.tolist() for tokens in texts(model, numbers)]
    return {entry.sequence for entry in store.show(limit=1000) if entry.tokens in lists}


def test_manifests_keep_their_history(tiny: LanguageModel, tmp_path: Path) -> None:
    one, other = two(tiny, tmp_path)
    other.disk.index.db().execute("UPDATE passes SET software = 'torch 1.0', created = 12345.0, threads = 7")
    other.disk.index.db().commit()
    one.merge(tmp_path / "other")
    theirs = {(entry.sequence, entry.hook): entry for entry in other.show(limit=1000)}
    mine = known(one, range(10), tiny)
    for entry in one.show(limit=1000):
        if entry.sequence in mine:  # the first value stays
            assert entry.software != "torch 1.0"
            continue
        told = dataclasses.asdict(theirs[entry.sequence, entry.hook])
        assert {**dataclasses.asdict(entry), "file": "", "offset": 0, "runs": []} == {
            **told, "file": "", "offset": 0, "runs": [],
        }  # fmt: skip


def test_what_is_damaged_is_left_out(tiny: LanguageModel, tmp_path: Path) -> None:
    one, other = two(tiny, tmp_path)
    del other
    file = next(path for path in (tmp_path / "other").glob("*.rows") if path.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1  # in the last sequence, which only the other store has
    file.write_bytes(raw)
    merged = one.merge(tmp_path / "other")
    assert merged.damaged == 1 and merged.taken == 11 and not one.verify()


def test_what_is_no_store_or_this_one_or_too_large_is_a_sentence(tiny: LanguageModel, tmp_path: Path) -> None:
    one, _ = two(tiny, tmp_path)
    with pytest.raises(UserError, match="holds no activation store"):
        one.merge(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match="is this store itself"):
        one.merge(tmp_path / "one")
    small = ActivationStore(tmp_path / "small", disk_bytes=10_000)
    with pytest.raises(UserError, match="that this one may have"):
        small.merge(tmp_path / "other")


def test_the_command_takes_another_folder_in(wb: Wb, tiny: LanguageModel, tmp_path: Path) -> None:
    two(tiny, tmp_path)
    status, out, _ = wb("store", "merge", str(tmp_path / "other"))
    assert status == 0 and "20 activations taken in" in out and "0 were here" in out
    assert ActivationStore(settings.home() / "store").stats().disk_entries == 20
    status, _, err = wb("store", "merge", str(tmp_path / "nowhere"))
    assert status == 2 and "holds no activation store" in err
