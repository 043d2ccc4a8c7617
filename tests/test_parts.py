"""Parts of a run: an attempt that ends early loses none, and what it finished is the run's own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuits import compare
from tests.test_runs import equal
from workbench import parts, registry, runs
from workbench.errors import UserError
from workbench.models import LanguageModel


@dataclass(frozen=True)
class Value:
    number: float
    tensor: Tensor


def value(number: float = 1.0) -> Value:
    return Value(number, torch.arange(3) * number)


class Stopped(BaseException):
    """As KeyboardInterrupt, but nobody else's."""


def refuse() -> Value:
    raise Stopped


def test_a_part_is_computed_once_however_often_the_attempt_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for attempt in range(3):
        with pytest.raises(Stopped), parts.kept_in(folder) as kept:
            found = parts.once("one", Value, refuse if attempt else value)
            assert equal(found, value()) and kept.found == (attempt > 0)
            parts.once("two", Value, refuse)
    with parts.kept_in(folder):
        assert equal(parts.once("one", Value, refuse), value())
        assert equal(parts.once("two", Value, lambda: value(2.0)), value(2.0))
    assert not folder.exists()


def test_a_part_that_cannot_be_read_is_computed_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped), parts.kept_in(folder):
        parts.once("one", Value, value)
        refuse()
    (path,) = folder.glob("*.safetensors")
    whole = path.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], whole.replace(b"number", b"nomber")):
        path.write_bytes(broken)
        with pytest.raises(Stopped), parts.kept_in(folder) as kept:
            assert equal(parts.once("one", Value, lambda: value(3.0)), value(3.0)) and kept.found == 0
            refuse()


def test_seconds_are_those_of_all_attempts(tmp_path: Path) -> None:
    """Up to the last part that an attempt kept: what came after it is done again, and is counted then."""
    earlier = 0.0
    for name in ("one", "two"):
        with pytest.raises(Stopped), parts.kept_in(tmp_path / "run") as kept:
            assert kept.earlier == earlier
            time.sleep(0.05)
            parts.once(name, Value, value)
            earlier, before = kept.seconds, earlier
            time.sleep(0.05)
            refuse()
        with pytest.raises(Stopped), parts.kept_in(tmp_path / "run") as kept:
            assert before + 0.05 <= kept.earlier <= earlier
            earlier = kept.earlier
            refuse()


def test_outside_of_a_run_nothing_is_kept(home: Path) -> None:
    assert equal(parts.once("one", Value, value), value()) and not (home / "parts").exists()
    with pytest.raises(Stopped):
        parts.once("one", Value, refuse)


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"), parts.kept_in(tmp_path / "file"):
        parts.once("one", Value, value)


def test_a_comparison_that_was_stopped_goes_on_with_the_next_method(
    home: Path, tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> runs.Run:
        return runs.run("compare", model=tiny, task="ioi", n=8, methods="patching,relp,eap")

    score = compare.score
    begun: list[str] = []

    def stops_at(last: str | None) -> None:
        def scored(method: registry.Analysis, *rest: object) -> object:
            begun.append(method.name)
            if method.name == last:
                raise Stopped
            return score(method, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(compare, "score", scored)

    for last, expected in (("relp", ["patching", "relp"]), ("eap", ["relp", "eap"]), (None, ["eap"])):
        stops_at(last)
        begun.clear()
        if last:
            with pytest.raises(Stopped):
                run()
        else:
            found = run()
        assert begun == expected
    assert found.record["cost"]["parts_of_earlier_attempts"] == 2 and not any((home / "parts").iterdir())
    assert found.record["cost"]["seconds"] > found.seconds
    (home / "runs" / found.id).rename(home / "before")
    begun.clear()
    whole = run()
    assert begun == ["patching", "relp", "eap"] and "parts_of_earlier_attempts" not in whole.record["cost"]
    once = replace_costs(found.result), replace_costs(whole.result)
    assert equal(*once)


def test_parts_stay_until_the_run_is_saved(home: Path, tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise UserError("no space")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space"):
        patch.setattr(runs, "_save", full)
        runs.run("compare", model=tiny, task="ioi", n=8, methods="patching,eap")
    found = runs.run("compare", model=tiny, task="ioi", n=8, methods="patching,eap")
    assert found.record["cost"]["parts_of_earlier_attempts"] == 2


def replace_costs(result: compare.Comparison) -> dict[str, dict[str, float | None]]:
    return {
        name: {k: v for k, v in row.items() if k not in ("seconds", "passes")} for name, row in result.table.items()
    }
