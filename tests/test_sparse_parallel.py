"""Training by two real processes, as `torchrun` starts them, is training by one: the same weights, one clock, one file.

Run by `torchrun`, this file is such a process: see `main`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from circuits.sparse import train
from circuits.sparse.data import train_tokenizer
from circuits.sparse.model import SparseConfig
from circuits.sparse.train import Recipe, Training
from workbench import processes
from workbench.errors import UserError

MODEL = SparseConfig(vocab_size=300, n_layer=2, d_model=32, n_head=4, d_head=8, block_size=32, afrac=0.5)
RECIPE = Recipe(MODEL, density=0.25, embedding_density=0.5, per_neuron=2, tokens=16 * 4 * 32, batch=4, length=32)
BY_CLOCK = replace(RECIPE, tokens=None, seconds=6.0)
STOP = 9  # steps after which the second process is killed


def ticking(tick: float, stop: int | None = None) -> Callable[[], float]:
    """A clock that is one tick later at every look; after so many looks its process is killed."""
    looks = count()

    def look() -> float:
        now = next(looks)
        if now == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return now * tick

    return look


def message(of: Callable[[], Any]) -> str | None:
    try:
        of()
    except UserError as error:
        return str(error)
    return None


def main(folder: Path) -> None:
    """Killed at first; then `torchrun` starts all processes again."""
    stage = ("killed", "resumed")[int(os.environ["TORCHELASTIC_RESTART_COUNT"])]
    torch.set_num_threads(1)
    train.COUNTED, train.HELD_OUT = 20_000, 8
    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rank = int(os.environ["RANK"])
    if stage == "resumed" and rank == 0:
        (folder / "of two").mkdir()
        shutil.copy(folder / train.CHECKPOINT, folder / "of two")
    training = Training(RECIPE, bpe, folder=folder)
    if stage == "resumed":
        found: dict[str, Any] = {"from": training.steps}
        found["curve"] = training.run(every=2.0, clock=ticking(1.0)).curve
        found["steps"] = training.steps
        save_file(training.module.state_dict(), folder / f"weights-{rank}.safetensors")
    else:
        by_clock = Training(BY_CLOCK, bpe)
        by_clock.run(every=100.0, clock=ticking(1.0 + 50 * rank))
        found = {
            "processes": processes.count(),
            "uneven": message(lambda: Training(replace(RECIPE, batch=5), bpe)),
            "apart": message(lambda: processes.same([torch.full((3,), 1.0 + rank)])),
            "alike": message(lambda: processes.same([torch.full((3,), 1.0)])),
            "steps by the clock": by_clock.steps,
            "first reads": training._rows().tolist(),
        }
        save_file(by_clock.module.state_dict(), folder / f"by-clock-{rank}.safetensors")
    (folder / f"{stage}-{rank}.json").write_text(json.dumps(found))
    if stage == "killed":
        training.run(every=2.0, clock=ticking(1.0, STOP if rank == 1 else None))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind that were killed, and started again."""
    folder, root = tmp_path_factory.mktemp("two"), str(Path(__file__).parents[1])
    train_tokenizer(300, real=0.0, size=100_000).save(str(folder / "tokenizer.json"))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, __file__, str(folder)], cwd=root, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def notes(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{stage}-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_that_were_killed_end_where_one_ends(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "COUNTED", 20_000)
    monkeypatch.setattr(train, "HELD_OUT", 8)
    one = Training(RECIPE, Tokenizer.from_file(str(ended / "tokenizer.json")))
    curve = one.run(every=2.0, clock=ticking(1.0)).curve
    first, second = notes(ended, "resumed")
    assert 0 < first["from"] == second["from"] < STOP and first["steps"] == second["steps"] == one.steps == 16
    assert first["curve"] == second["curve"]
    for a, b in zip(first["curve"], curve, strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), (a, b)
    assert first["curve"][-1]["held_out_loss"] == pytest.approx(curve[-1]["held_out_loss"], rel=1e-5)
    weights, others = (load_file(ended / f"weights-{rank}.safetensors") for rank in (0, 1))
    for name, x in one.module.state_dict().items():
        assert torch.equal(weights[name], others[name]), name
        torch.testing.assert_close(weights[name], x, rtol=1e-5, atol=1e-6)


def test_one_process_goes_on_where_two_were_killed(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "COUNTED", 20_000)
    monkeypatch.setattr(train, "HELD_OUT", 8)
    bpe = Tokenizer.from_file(str(ended / "tokenizer.json"))
    one, went_on = Training(RECIPE, bpe), Training(RECIPE, bpe, folder=ended / "of two")
    assert 0 < went_on.steps < STOP and one.steps == 0
    curves = [training.run(every=2.0, clock=ticking(1.0)).curve for training in (one, went_on)]
    assert went_on.steps == one.steps
    assert curves[1][-1]["held_out_loss"] == pytest.approx(curves[0][-1]["held_out_loss"], rel=1e-5)
    for name, x in one.module.state_dict().items():
        torch.testing.assert_close(went_on.module.state_dict()[name], x, rtol=1e-5, atol=1e-6)


def test_rows_of_a_batch_are_read_once(ended: Path) -> None:
    one = Training(RECIPE, Tokenizer.from_file(str(ended / "tokenizer.json")))
    first, second = (note["first reads"] for note in notes(ended, "killed"))
    assert [*first, *second] == one.stream.read(0, 4 * 32).view(4, 32).tolist() == one._rows().tolist()


def test_the_first_clock_is_everybodys(ended: Path) -> None:
    """The second process's runs 51 times as fast."""
    first, second = notes(ended, "killed")
    assert first["processes"] == 2 and first["steps by the clock"] == second["steps by the clock"] == 6
    weights, others = (load_file(ended / f"by-clock-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_an_uneven_batch_and_weights_that_came_apart_are_sentences(ended: Path) -> None:
    first, second = notes(ended, "killed")
    assert first["uneven"] == second["uneven"]
    assert "a batch of 5 rows cannot be shared out evenly among 2 processes; give it 6" in first["uneven"]
    assert first["apart"] is None and "the weights of process 1 are no longer" in second["apart"]
    assert first["alike"] is None and second["alike"] is None


def test_alone_nothing_is_shared() -> None:
    assert (processes.count(), processes.number(), processes.share(5), processes.first(0.1)) == (1, 0, 5, 0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
