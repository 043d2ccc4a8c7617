"""Laws of the activation store."""

from __future__ import annotations

import os
import resource
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from workbench.activations import ActivationStore, capture, codecs
from workbench.activations.disk import Disk, NewEntry, Pass
from workbench.activations.index import Place
from workbench.activations.keys import Key, Scope, sequence_digests
from workbench.activations.keys import scopes as scopes_of
from workbench.activations.memory import Memory
from workbench.errors import UserError
from workbench.interventions import steer, zero
from workbench.models import LanguageModel
from workbench.sites import Site, block

Z, OUT = block(1, "attn.hook_z"), block(2, "hook_resid_post")


HOW = Pass("m", "1x3", 1)


def sequences(n: int = 12, seed: int = 0, vocab: int = 500) -> list[torch.Tensor]:
    """Unequal lengths, so that batches are bucketed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (5 + i % 4,), generator=generator) for i in range(n)]


def test_values_are_the_models_own(tiny: LanguageModel, store: ActivationStore) -> None:
    found = store.get(tiny, sequences(), [Z, OUT])
    for i, tokens in enumerate(sequences()):
        alone = tiny.run(tokens[None], capture=[Z, OUT], logits="none")
        for hook in (Z, OUT):  # computed in another batch shape: equal to float rounding
            torch.testing.assert_close(found[hook][i], alone[hook][0], rtol=1e-5, atol=1e-5)


def test_a_hit_returns_the_stored_bytes_and_runs_nothing(tiny: LanguageModel, tmp_path: Path) -> None:
    first = ActivationStore(tmp_path / "s")
    cold = first.get(tiny, sequences(), [Z, OUT])
    passes = tiny.forward_passes
    warm = first.get(tiny, sequences(), [OUT, Z])
    reopened = ActivationStore(tmp_path / "s").get(tiny, sequences(), [Z, OUT])
    assert tiny.forward_passes == passes
    for hook in (Z, OUT):
        for a, b, c in zip(cold[hook], warm[hook], reopened[hook], strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


def test_rows_stay_with_their_sequence_in_any_batch(tiny: LanguageModel, store: ActivationStore) -> None:
    rows = sequences(20)
    whole = store.get(tiny, rows, [OUT])[OUT]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)).tolist()
    passes = tiny.forward_passes
    shuffled = store.get(tiny, [rows[i] for i in order], [OUT])[OUT]
    assert tiny.forward_passes == passes
    for place, i in enumerate(order):
        assert torch.equal(shuffled[place], whole[i])


def test_only_what_is_missing_is_computed(tiny: LanguageModel, store: ActivationStore) -> None:
    rows = [torch.arange(6) + i for i in range(4)]
    store.get(tiny, rows[:2], [OUT])
    before = store.stats()
    passes = tiny.forward_passes
    store.get(tiny, rows, [Z, OUT])
    after = store.stats()
    assert after.computed - before.computed == 2 + 4  # OUT of two sequences, Z of four
    assert tiny.forward_passes - passes == 2  # those that miss only Z, and those that miss both


def test_the_caller_cannot_change_the_store(tiny: LanguageModel, store: ActivationStore) -> None:
    row = sequences(1)
    first = store.get(tiny, row, [OUT])[OUT][0]
    kept = first.clone()
    first.zero_()
    assert torch.equal(store.get(tiny, row, [OUT])[OUT][0], kept)


@pytest.mark.parametrize("change", ["token", "length", "hook", "weights", "dtype", "edit", "codec"])
def test_every_part_of_the_key_matters(
    change: str, tiny: LanguageModel, make_tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    store = ActivationStore(tmp_path / "s")
    row = torch.arange(6)
    store.get(tiny, [row], [OUT])
    model, edit, hook = tiny, None, OUT
    if change == "token":
        row = row.clone().index_fill(0, torch.tensor([5]), 9)
    elif change == "length":
        row = row[:5]
    elif change == "hook":
        hook = Z
    elif change == "weights":
        model = make_tiny(seed=1)
    elif change == "dtype":
        model = make_tiny()
        model._module.to(torch.bfloat16)
    elif change == "edit":
        edit = {Z: zero()}
    elif change == "codec":
        store = ActivationStore(tmp_path / "s", codec="float16")
    before = store.stats().computed
    store.get(model, [row], [hook], edit=edit)
    assert store.stats().computed == before + 1


def test_edited_activations_are_stored_under_what_the_edit_does(tiny: LanguageModel, store: ActivationStore) -> None:
    row = [torch.arange(6)]
    direction = torch.ones(tiny.config.d_model)
    one = store.get(tiny, row, [OUT], edit={block(0, "hook_resid_post"): steer(direction, 1.0)})[OUT][0]
    passes = tiny.forward_passes
    again = store.get(tiny, row, [OUT], edit={block(0, "hook_resid_post"): steer(direction.clone(), 1.0)})[OUT][0]
    assert tiny.forward_passes == passes and torch.equal(one, again)
    two = store.get(tiny, row, [OUT], edit={block(0, "hook_resid_post"): steer(direction, 2.0)})[OUT][0]
    assert not torch.allclose(one, two)
    with pytest.raises(
        (UserError, TypeCheckError), match=r"has no key|Intervention"
    ):  # the latter while types are checked
        store.get(tiny, row, [OUT], edit={Z: lambda x: x})  # type: ignore[dict-item]


def test_edits_of_one_tensor_in_another_order_are_not_the_same(tiny: LanguageModel, store: ActivationStore) -> None:
    """Adding and then zeroing is not zeroing and then adding."""
    row, add = [torch.arange(6)], steer(torch.ones(8), 1.0)
    head, whole = Site(Z, head=1), Site(Z)
    one = store.get(tiny, row, [Z], edit={head: add, whole: zero()})[Z][0]
    two = store.get(tiny, row, [Z], edit={whole: zero(), head: add})[Z][0]
    assert float(one.abs().max()) == 0 and float(two[:, 1].min()) == 1


def test_two_threads_asking_for_the_same_compute_once(tiny: LanguageModel, store: ActivationStore) -> None:
    rows = sequences(8)
    found: list[list[torch.Tensor]] = []
    threads = [threading.Thread(target=lambda: found.append(store.get(tiny, rows, [OUT])[OUT])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.stats().computed == 8
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_a_failed_request_does_not_block_the_next(tiny: LanguageModel, store: ActivationStore) -> None:
    with pytest.raises(UserError):
        store.get(tiny, [torch.arange(600)], [OUT])
    with pytest.raises(UserError):
        store.get(tiny, [torch.arange(600)], [OUT])
    assert store.get(tiny, [torch.arange(6)], [OUT])[OUT][0].shape == (6, 32)


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_codecs_keep_their_word(codec: str) -> None:
    """Sizes as promised, each sequence decodes by itself, and the stated error is the worst row's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 5, 32, generator=generator) * torch.logspace(-6, 6, 7)[:, None, None]  # rows of any size
    x[1, 0, 0] = 0
    encoded = codecs.encode(x, codec)
    for n, sequence in enumerate(x):
        data = bytearray(b"".join(encoded.pieces[n]))
        assert len(data) == codecs.size(tuple(sequence.shape), codec)
        decoded = codecs.decode(torch.frombuffer(data, dtype=torch.uint8), tuple(sequence.shape), codec)
        assert torch.equal(decoded, encoded.decoded[n])
        rows = (decoded - sequence).norm(dim=-1) / sequence.norm(dim=-1).clamp_min(1e-30)
        assert encoded.errors[n] == pytest.approx(float(rows.max()), rel=1e-5, abs=1e-9)
        assert float(rows.max()) <= {"float32": 0, "bfloat16": 4e-3, "float16": 5e-4, "int8": 1.2e-2}[codec]


def test_massive_channels_and_rows_do_not_ruin_int8() -> None:
    """As in real models: a first token a thousand times the others, and a channel a hundred times the others."""
    x = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0))
    x[:, :, 7] += 100
    x[:, 0] *= 1000
    plain = (x / (x.abs().amax(-1, keepdim=True) / 127)).round() * (x.abs().amax(-1, keepdim=True) / 127)
    by_row = ((plain - x).norm(dim=-1) / x.norm(dim=-1)).max()
    assert 1.4 * codecs.encode(x, "int8").errors[0] < float(by_row)


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "float16"])
def test_masked_scores_survive_every_float_codec(codec: str) -> None:
    x = torch.tensor([[[-torch.inf, 2.0, 0.5], [-torch.inf, -torch.inf, 1.0]]])
    encoded = codecs.encode(x, codec)
    assert torch.equal(encoded.decoded, x) and encoded.errors == [0.0]


def test_int8_refuses_what_it_cannot_hold(tiny: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", codec="int8")
    with pytest.raises(UserError, match="int8 cannot hold infinite values"):
        store.get(tiny, sequences(1), [block(0, "attn.hook_attn_scores")])


def test_a_lossy_codec_gives_the_first_caller_what_everybody_gets(tiny: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", codec="int8")
    first = store.get(tiny, sequences(3), [OUT])[OUT]
    reopened = ActivationStore(tmp_path / "s", codec="int8").get(tiny, sequences(3), [OUT])[OUT]
    assert all(torch.equal(a, b) for a, b in zip(first, reopened, strict=True))


def test_memory_stays_within_its_budget(tiny: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", memory_bytes=4000)
    store.get(tiny, sequences(20), [OUT])
    assert 0 < store.stats().memory_bytes <= 4000


def test_disk_stays_within_its_budget_and_what_is_evicted_is_recomputed(tiny: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", memory_bytes=0, disk_bytes=20_000)
    rows = sequences(8)
    first = store.get(tiny, rows, [OUT])[OUT]
    store.get(tiny, sequences(8, seed=1), [Z])
    store.get(tiny, sequences(8, seed=2), [block(0, "hook_resid_post")])
    stats = store.stats()
    assert stats.disk_bytes <= 20_000
    assert sum(path.stat().st_size for path in (tmp_path / "s").glob("*.rows")) <= 20_000
    for a, b in zip(first, store.get(tiny, rows, [OUT])[OUT], strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_larger_than_the_disk_budget_is_refused(tiny: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", disk_bytes=100)
    with pytest.raises(UserError, match="more than is left of the disk budget of 100"):
        store.get(tiny, sequences(1), [OUT])


def test_every_bit_flip_is_detected_and_never_served(tiny: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", memory_bytes=0)
    row = [torch.arange(6)]
    truth = store.get(tiny, row, [OUT])[OUT][0]
    (shard,) = (tmp_path / "s").glob("*.rows")
    whole = shard.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        where, bit = int(torch.randint(len(whole), (1,), generator=generator)), 1
        shard.write_bytes(whole[:where] + bytes([whole[where] ^ bit]) + whole[where + 1 :])
        reopened = ActivationStore(tmp_path / "s", memory_bytes=0)
        (sentence,) = reopened.verify()
        assert shard.name in sentence
    torch.testing.assert_close(reopened.get(tiny, row, [OUT])[OUT][0], truth)  # dropped and computed anew
    assert reopened.stats().computed == 1


def test_the_first_stored_value_stays(tmp_path: Path) -> None:
    """Two handles, as in two processes: the second writer learns that it was late."""
    a, b = Disk(tmp_path / "s", 10**6), Disk(tmp_path / "s", 10**6)
    key, tokens = Key(Scope("m", "n", "h", "float32", ""), b"k" * 16), {b"k" * 16: torch.arange(3)}
    assert a.write(HOW, [NewEntry(key, (memoryview(b"1111"),), (1,), 0.0)], tokens) == set()
    assert b.write(HOW, [NewEntry(key, (memoryview(b"2222"),), (1,), 0.0)], tokens) == {key}
    assert [entry.raw.numpy().tobytes() for _, entry in b.read([key])] == [b"1111"]
    assert b.totals()[0] == 1


def test_a_late_writer_hands_out_what_was_stored_first(
    tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were claims to fail, a caller would still get the bits that everybody gets."""
    first = store.get(tiny, [torch.arange(6), torch.arange(6) + 1], [OUT])[OUT][0]  # computed in a batch of two
    late = ActivationStore(store.disk.root)
    find, blind = late.disk.index.find, [True, True]  # neither the look-up nor the claim sees it

    def unseen(wanted: Iterable[Key]) -> Iterator[tuple[Key, Place]]:
        return iter(()) if blind and blind.pop() else find(wanted)

    monkeypatch.setattr(late.disk.index, "find", unseen)
    row = late.get(tiny, [torch.arange(6)], [OUT])[OUT][0]
    assert late.stats().forward_passes == 1 and torch.equal(row, first)


def test_writing_goes_on_after_another_process_evicted_our_shard(tmp_path: Path) -> None:
    a, b = Disk(tmp_path / "s", 10**6), Disk(tmp_path / "s", 10**6)
    scope = Scope("m", "n", "h", "float32", "")

    def write(disk: Disk, name: bytes) -> None:
        entry = NewEntry(Key(scope, name * 16), (memoryview(name * 4),), (1,), 0.0)
        disk.write(HOW, [entry], {name * 16: torch.arange(3)})

    write(a, b"1")
    b.evict()
    write(a, b"2")
    found = {
        key.sequence: entry.raw.numpy().tobytes() for key, entry in a.read([Key(scope, c * 16) for c in (b"1", b"2")])
    }
    assert found == {b"2" * 16: b"2222"} and [key.sequence for key, _ in b.read([Key(scope, b"2" * 16)])] == [b"2" * 16]


def test_running_out_of_open_files_is_no_damage(tiny: LanguageModel, store: ActivationStore) -> None:
    """What cannot be read for want of a descriptor is still there afterwards."""
    store.get(tiny, sequences(4), [OUT, Z])
    store.memory.drop()
    store.disk._readers.close_all()
    scopes = scopes_of(tiny, [OUT, Z], "float32", None)
    wanted = [Key(scope, digest) for scope in scopes.values() for digest in sequence_digests(sequences(4))]
    before, (_, most) = store.stats().disk_entries, resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    in_use = os.dup(0)
    os.close(in_use)
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use, most))
    try:
        with pytest.raises(UserError, match="Too many open files"):
            list(store.disk.read(wanted))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    assert store.stats().disk_entries == before
    store.get(tiny, sequences(4), [OUT, Z])
    assert store.stats().computed == 8 and store.verify() == []


def test_memory_drops_what_was_used_longest_ago() -> None:
    scope = Scope("m", "n", "h", "float32", "")
    keys = [Key(scope, bytes([n])) for n in range(4)]
    tier = Memory(3 * 40)
    for n in range(3):
        tier.put(keys[n], torch.full((10,), float(n)))
    tier.get([keys[0]])
    tier.put(keys[3], torch.full((10,), 3.0))
    found = tier.get(keys)
    assert [int(found[key].row[0]) for key in keys if key in found] == [0, 2, 3] and tier.bytes == 120


def test_memory_refuses_what_does_not_fit_beside_the_pins() -> None:
    scope = Scope("m", "n", "h", "float32", "")
    tier = Memory(100, lambda key: key.sequence < b"9")
    for n in range(4):
        tier.put(Key(scope, str(n).encode()), torch.zeros(10))  # 40 bytes each, pinned
    assert tier.bytes == 80 and len(tier) == 2
    tier.put(Key(scope, b"9"), torch.zeros(10))
    tier.drop()
    assert tier.bytes == 80 and len(tier) == 2


@pytest.mark.parametrize(("version", "way_out"), [("99", "update the workbench"), ("1", "delete that folder")])
def test_a_store_of_another_version_is_refused(version: str, way_out: str, tmp_path: Path) -> None:
    Disk(tmp_path / "s", 10**6)
    with sqlite3.connect(tmp_path / "s" / "index.sqlite") as db:
        db.execute("UPDATE meta SET value = ?", (version,))
    with pytest.raises(UserError, match=f"has format {version}, this version reads 2.*{way_out}"):
        Disk(tmp_path / "s", 10**6)


def test_a_store_in_the_first_versions_layout_is_refused(tmp_path: Path) -> None:
    """As version 1 wrote it: other tables than ours under the same names."""
    (tmp_path / "s").mkdir()
    with sqlite3.connect(tmp_path / "s" / "index.sqlite") as db:
        db.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        db.execute("INSERT INTO meta VALUES ('version', '1')")
        db.execute("CREATE TABLE entries (key BLOB PRIMARY KEY, shard INTEGER) WITHOUT ROWID")
    with pytest.raises(UserError, match="has format 1"):
        Disk(tmp_path / "s", 10**6)


def test_manifest_tells_what_an_entry_is_and_how_it_was_made(tiny: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", codec="bfloat16")
    store.get(tiny, [torch.arange(6), torch.arange(6) + 1], [OUT], edit={Z: zero()})
    one, two = store.show()
    assert {tuple(one.tokens), tuple(two.tokens)} == {(0, 1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6)}
    assert (one.batch, one.codec, one.hook, one.shape) == ("2x6", "bfloat16", OUT, [6, 32])
    assert one.model == tiny.fingerprint and one.model_name == tiny.name and one.edit and one.runs == []
    assert 0 < one.error < 4e-3 and one.threads == torch.get_num_threads() and "torch" in one.software
    assert store.show(sequence=one.sequence[:12]) == [one]
    with pytest.raises(UserError, match="nothing is stored for hook"):
        store.show(hook=Z)
    with pytest.raises(UserError, match="letters other than"):
        store.show(sequence="xyz")


def test_a_pass_is_clocked_with_its_work_and_its_time(
    tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which `estimate` tells seconds."""
    monkeypatch.setattr(capture, "_TELLING", 0)
    rows = torch.randint(300, (3, 7), generator=torch.Generator().manual_seed(0))
    store.get(tiny, rows, ["blocks.1.hook_resid_post"])
    assert store._clock.flops == 3 * capture.flops(tiny.config, 7, 2)
    assert store._clock.seconds == store.stats().seconds_computing > 1e-5


def test_estimate_counts_bytes_exactly_and_nothing_once_stored(tiny: LanguageModel, store: ActivationStore) -> None:
    rows = sequences(6)
    before = store.estimate(tiny, rows, [Z, OUT])
    assert before.missing == before.entries == 12 and before.seconds > 0
    store.get(tiny, rows, [Z, OUT])
    after = store.estimate(tiny, rows, [Z, OUT])
    assert after.missing == 0 and after.seconds == 0
    assert before.missing_bytes == store.stats().disk_bytes


def test_stream_gives_each_row_once_shuffled_and_resumes(tiny: LanguageModel, store: ActivationStore) -> None:
    rows = sequences(40)
    plain = torch.cat(store.get(tiny, rows, [OUT])[OUT])
    options = {"rows": 16, "window": 60, "seed": 5}
    batches = [b[OUT] for b in store.stream(tiny, rows, [OUT], **options)]
    streamed = torch.cat(batches)
    assert [len(b) for b in batches[:-1]] == [16] * (len(batches) - 1)
    as_keys = [Counter(row.numpy().tobytes() for row in x) for x in (streamed, plain)]
    assert as_keys[0] == as_keys[1]
    assert not torch.equal(streamed, plain)
    for start in (1, 5, len(batches) - 1):
        rest = [b[OUT] for b in store.stream(tiny, rows, [OUT], start=start, **options)]
        assert len(rest) == len(batches) - start
        assert all(torch.equal(a, b) for a, b in zip(rest, batches[start:], strict=True))
    aligned = next(iter(store.stream(tiny, rows, [OUT, block(2, "hook_resid_mid")], **options)))
    assert torch.equal(aligned[OUT], batches[0])


@pytest.mark.parametrize("skip", [1, 3])
def test_a_stream_leaves_out_the_first_positions_of_each_sequence(
    skip: int, tiny: LanguageModel, store: ActivationStore
) -> None:
    rows = sequences(40)
    options = {"rows": 16, "window": 60, "seed": 5, "skip": skip}
    expected = torch.cat([x[skip:] for x in store.get(tiny, rows, [OUT])[OUT]])
    stream = store.stream(tiny, rows, [OUT], **options)
    batches = [b[OUT] for b in stream]
    as_keys = [Counter(row.numpy().tobytes() for row in x) for x in (torch.cat(batches), expected)]
    assert as_keys[0] == as_keys[1] and len(batches) == len(stream)
    for start in (1, len(batches) - 1):
        rest = [b[OUT] for b in store.stream(tiny, rows, [OUT], start=start, **options)]
        assert all(torch.equal(a, b) for a, b in zip(rest, batches[start:], strict=True))


def test_unknown_hooks_and_codecs_are_refused(tiny: LanguageModel, store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean"):
        store.get(tiny, sequences(1), ["blocks.1.attn.hook_zz"])
    with pytest.raises(UserError, match="no codec"):
        ActivationStore(tmp_path / "s2", codec="float8")


# ---- sessions, pins, bounds ----


def test_a_session_counts_and_remembers_what_it_used_alone(tiny: LanguageModel, store: ActivationStore) -> None:
    rows = sequences(4)
    store.get(tiny, rows[:2], [OUT])
    session = store.session()
    session.get(tiny, rows, [OUT])
    assert (session.stats().memory_hits, session.stats().computed, store.stats().computed) == (2, 2, 2)
    assert session.used is not None and store.used is None
    ((scope, digests),) = session.used.items()
    assert scope.hook == OUT and len(digests) == 4
    session.note_run("some-run")
    assert {one.runs[0] for one in store.show(run="some-run")} == {"some-run"}
    assert len(store.show(run="some-run")) == 4
    store.evict()
    with pytest.raises(UserError, match="nothing is stored for run 'some-run'"):
        store.show(run="some-run")


@pytest.mark.parametrize("by", ["hook", "model", "run"])
def test_what_is_pinned_stays(by: str, tiny: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", disk_bytes=30_000)
    session = store.session()
    session.get(tiny, sequences(8), [OUT])
    session.note_run("kept")
    pin = {"hook": {"hook": OUT}, "model": {"model": tiny.fingerprint}, "run": {"run": "kept"}}[by]
    store.pin(**pin)
    if by != "model":  # what is not pinned makes room
        for seed in (1, 2, 3):
            store.get(tiny, sequences(8, seed=seed), [Z])
        assert store.stats().disk_bytes <= 30_000
    store.evict()
    reopened = ActivationStore(tmp_path / "s", disk_bytes=30_000)
    passes = tiny.forward_passes
    reopened.get(tiny, sequences(8), [OUT])
    assert tiny.forward_passes == passes and [row.hook for row in reopened.series()] == [OUT]
    if by == "run":  # what comes later is not pinned with it
        reopened.get(tiny, sequences(30, seed=9), [OUT])
        reopened.evict()
        assert reopened.stats().disk_entries == 8
    else:
        with pytest.raises(UserError, match="are pinned"):
            reopened.get(tiny, sequences(30, seed=9), [OUT, Z])
    assert reopened.pins() == [{"model": "", "hook": "", "run": ""} | pin]
    reopened.unpin(**pin)
    assert reopened.evict() > 0 and reopened.series() == []


def test_what_is_pinned_can_be_asked_for_again_when_it_fills_the_disk(tiny: LanguageModel, tmp_path: Path) -> None:
    """Pinned entries need no further room; other ones of the same size do not fit."""
    rows = sequences(8)
    ActivationStore(tmp_path / "s").fill(tiny, rows, [OUT])
    size = ActivationStore(tmp_path / "s").stats().disk_bytes
    store = ActivationStore(tmp_path / "s", disk_bytes=size + 100)
    store.pin(hook=OUT)
    passes = tiny.forward_passes
    store.fill(tiny, rows, [OUT])
    assert tiny.forward_passes == passes
    with pytest.raises(UserError, match=f"take [0-9,]+ bytes as float32, but of .* bytes {100:,} are not pinned"):
        store.fill(tiny, rows, [Z])


def test_pins_hold_in_memory_too(tiny: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", memory_bytes=8_000)
    store.get(tiny, sequences(4), [OUT])
    store.pin(hook=OUT)
    store.get(tiny, sequences(12, seed=1), [Z])
    assert store.stats().memory_bytes <= 8_000
    before = store.stats().memory_hits
    store.get(tiny, sequences(4), [OUT])
    assert store.stats().memory_hits - before == 4


@pytest.mark.parametrize(
    ("pin", "message"),
    [({}, "would leave no room"), ({"run": "nope"}, "no run called 'nope'"), ({"run": "a", "hook": OUT}, "not both")],
)
def test_senseless_pins_are_refused(pin: dict[str, str], message: str, store: ActivationStore) -> None:
    with pytest.raises(UserError, match=message):
        store.pin(**pin)


def test_a_pin_that_is_not_there_cannot_be_taken_back(store: ActivationStore) -> None:
    with pytest.raises(UserError, match="there is no such pin"):
        store.unpin(hook=OUT)


def test_an_analysis_may_demand_a_bound_on_the_codecs_error(tiny: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", codec="int8")
    stated = max(one.error for _ in [store.get(tiny, sequences(4), [OUT])] for one in store.show())
    store.get(tiny, sequences(4), [OUT], max_error=stated)
    for memory in (10**6, 0):  # the bound holds whichever tier answers
        again = ActivationStore(tmp_path / "s", codec="int8", memory_bytes=memory)
        again.get(tiny, sequences(4), [OUT])
        with pytest.raises(UserError, match=f"stored as int8 with a relative error of .* max_error={stated / 2:g}"):
            again.get(tiny, sequences(4), [OUT], max_error=stated / 2)
    ActivationStore(tmp_path / "s").get(tiny, sequences(4), [OUT], max_error=0.0)  # float32 makes none


def test_canonical_values_are_bitwise_those_of_the_sequence_alone(tiny: LanguageModel, store: ActivationStore) -> None:
    rows = sequences(12)
    store.get(tiny, rows, [OUT])  # in batches: not good enough
    before = store.stats().computed
    found = store.get(tiny, rows, [OUT], canonical=True)[OUT]
    assert store.stats().computed == before + 12
    for tokens, row in zip(rows, found, strict=True):
        assert torch.equal(tiny.run(tokens[None], capture=[OUT], logits="none")[OUT][0], row)
    assert {one.batch for one in store.show() if "alone" in one.numerics} == {f"1x{n}" for n in (5, 6, 7, 8)}


def test_a_request_larger_than_memory_is_refused_with_the_numbers(
    tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.activations.store.free_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"12 sequences at 2 hook points are .* use stream\(\)"):
        store.get(tiny, sequences(12), [OUT, Z])
    assert store.stats().forward_passes == 0
    assert len(list(store.stream(tiny, sequences(12), [OUT], rows=16))) == 5  # 78 rows


def test_more_than_the_disk_holds_is_refused_with_the_numbers(tiny: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", disk_bytes=9_000)
    with pytest.raises(UserError, match=r"12 sequences at 1 hook points take .* raise WORKBENCH_STORE_DISK"):
        store.fill(tiny, sequences(12), [OUT])
    assert store.stats().forward_passes == 0
    store.fill(tiny, sequences(8), [OUT])


def test_fill_stores_and_returns_nothing(tiny: LanguageModel, store: ActivationStore) -> None:
    store.fill(tiny, sequences(12), [OUT])
    assert store.stats().memory_entries == 0
    passes = tiny.forward_passes
    store.fill(tiny, sequences(12), [OUT])
    store.get(tiny, sequences(12), [OUT])
    assert tiny.forward_passes == passes


def test_values_computed_anew_agree_and_foreign_ones_are_found(
    tiny: LanguageModel, make_tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    store = ActivationStore(tmp_path / "s", codec="float16")
    store.get(tiny, sequences(12), [OUT, block(1, "attn.hook_attn_scores")])
    found = store.recheck(tiny, n=24)
    assert len(found) == 24 and all(one.difference <= one.limit for one in found)
    impostor = make_tiny(seed=1)  # other weights under the same fingerprint: as if the software had changed
    impostor.fingerprint = tiny.fingerprint
    assert all(one.difference > one.limit for one in store.recheck(impostor, n=24) if one.hook == OUT)
    with pytest.raises(UserError, match="nothing of tiny-llama"):
        store.recheck(make_tiny(seed=2))


def test_nan_is_never_stored(make_tiny: Callable[..., LanguageModel], store: ActivationStore) -> None:
    model = make_tiny(seed=5)
    model.out_weight(0).fill_(torch.nan)
    with pytest.raises(UserError, match=r"gives NaN at blocks\.2\.hook_resid_post"):
        store.get(model, sequences(2), [OUT])
    assert store.stats().disk_entries == 0
    store.get(model, sequences(2), [block(0, "hook_resid_pre")])  # before the overflow all is well


def test_a_device_that_is_not_there_is_refused(tiny: LanguageModel, store: ActivationStore) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="torch sees no GPU"):
        store.get(tiny, sequences(1), [OUT], device="cuda")
    assert store.stats().device_budget == 0  # the tier is absent, not emulated


def test_one_pass_feeds_several_consumers(tiny: LanguageModel, store: ActivationStore) -> None:
    rows = sequences(20)
    stream = store.stream(tiny, rows, [OUT], rows=16)
    total, seen = torch.zeros(32), []
    stream.feed(lambda batch: total.add_(batch[OUT].sum(0)), lambda batch: seen.append(len(batch[OUT])))
    assert len(seen) == len(stream) == stream.position
    torch.testing.assert_close(total, torch.cat(store.get(tiny, rows, [OUT])[OUT]).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codec", ["float32", "float16"])
def test_a_repeated_sequence_streams_as_often_as_it_comes(codec: str, tiny: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", codec=codec)
    rows = [torch.arange(6), torch.arange(5), torch.arange(6)]
    streamed = torch.cat([batch[OUT] for batch in store.stream(tiny, rows, [OUT], rows=4)])
    expected = torch.cat(store.get(tiny, rows, [OUT])[OUT])
    as_keys = [Counter(row.numpy().tobytes() for row in x) for x in (streamed, expected)]
    assert as_keys[0] == as_keys[1] and len(streamed) == 17


@pytest.mark.parametrize(("option", "message"), [({"rows": 0}, "rows=0"), ({"start": -1}, "start=-1")])
def test_senseless_streams_are_refused(
    option: dict[str, int], message: str, tiny: LanguageModel, store: ActivationStore
) -> None:
    with pytest.raises(UserError, match=message):
        store.stream(tiny, sequences(2), [OUT], **option)
    with pytest.raises(UserError, match="has no row per token"):
        store.stream(tiny, sequences(2), [block(0, "attn.hook_pattern")])
