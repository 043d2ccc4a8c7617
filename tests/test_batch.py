"""A plan of many runs: what it asks for, that it is the runs alone, and that a dead worker costs nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.conftest import Wb
from tests.test_runs import equal
from workbench import activations, batch, runs, scores, settings
from workbench.batch import Cell
from workbench.batch_result import Batch
from workbench.errors import UserError

ROOT = Path(__file__).parents[1]
RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e '.[cluster]'")


def plan(model: str, **more: Any) -> dict[str, Any]:
    methods = ["eap", {"eap-ig": {"steps": 2}}, "attention-patterns"]
    return {"models": [model], "tasks": ["ioi", "induction"], "methods": methods, "n": 4, "seeds": [0, 1]} | more


def written(folder: Path, what: Any) -> Path:
    path = folder / "plan.yaml"
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return path


# ---- plans ----


def test_a_plan_is_every_combination_grouped_by_model_task_and_seed(tmp_path: Path) -> None:
    text = "models: [a, b]\ntasks: [ioi, induction]\nmethods: [eap, {eap-ig: {steps: 3}}]\nseeds: [0, 4]\nn: 8\n"
    found = batch.read(written(tmp_path, text))
    assert len(found) == len(set(map(str, found))) == 16
    assert found[0] == Cell("a", "ioi", "eap", 0, 8) and found[1] == Cell("a", "ioi", "eap-ig", 0, 8, {"steps": 3})
    assert [cell.model for cell in found] == ["a"] * 8 + ["b"] * 8
    assert [len(group) for group in batch.groups(found)] == [8, 8]
    finer = batch.groups(found, least=3)
    assert [len(group) for group in finer] == [2] * 8
    assert all(len({(cell.model, cell.task, cell.seed) for cell in group}) == 1 for group in finer)
    alone = batch.cells({"models": "a", "tasks": "ioi", "methods": "eap"})
    assert alone == [Cell("a", "ioi", "eap")]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("models: [", "is no YAML"),
        ("[1, 2]", "is no plan; write models, tasks and methods"),
        ({"models": ["a"], "tasks": ["ioi"]}, "the plan has no methods"),
        ({"models": [], "tasks": ["ioi"], "methods": ["eap"]}, "the plan has no models"),
        ({"models": "a", "tasks": "ioi", "methods": "eap", "seed": 1}, "did you mean 'seeds'"),
        ({"models": "a", "tasks": "ioi", "methods": "eap", "accept_terms": True}, "no part of a plan is called"),
        ({"models": "a", "tasks": "io", "methods": "eap"}, "no task is called 'io'"),
        ({"models": "a", "tasks": "ioi", "methods": "eep"}, "no analysis is called 'eep'"),
        ({"models": "a", "tasks": "ioi", "methods": [{"eap": {"stepz": 1}}]}, "no parameter of eap is called 'stepz'"),
        ({"models": "a", "tasks": "ioi", "methods": [["eap"]]}, "is no method; write a name"),
        ({"models": "a", "tasks": "ioi", "methods": "train-sae"}, "train-sae takes no task"),
        ({"models": "a", "tasks": "ioi", "methods": "eap", "seeds": ["x"]}, "seeds='x' of the plan is no number"),
        ({"models": "a", "tasks": "ioi", "methods": "eap", "n": True}, "n=True of the plan is no number"),
        ({"models": "a", "tasks": "ioi", "methods": "eap", "n": 0}, "n=0 prompts cannot be drawn"),
    ],
)
def test_what_is_no_plan_is_one_sentence_before_anything_starts(tmp_path: Path, what: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        batch.read(written(tmp_path, what))


# ---- runs ----


def test_a_batch_is_the_runs_alone_and_found_the_second_time(
    tmp_path: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = batch.cells(plan(tiny_folder))
    rows = batch.run(cells)
    assert [row.cell for row in rows] == cells and not any(row.error for row in rows)
    assert [row.run.hit for row in rows if row.run] == [False] * 12
    again = batch.run(cells)
    assert [row.run.hit for row in again if row.run] == [True] * 12
    together = {row.run.id: row.run.result for row in rows if row.run}
    passes = Batch.of(rows).summary()["passes"]
    assert [bool(row.shared) for row in rows] == [i in (3, 6, 9) for i in range(12)]  # all but the first group
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "alone"))
    apart = 0
    for cell in cells:
        monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / f"alone-{len(list(tmp_path.iterdir()))}"))
        run = runs.run(cell.method, model=cell.model, **cell.asked)
        assert not run.hit and equal(run.result, together[run.id])
        apart += run.forward_passes
    assert passes < apart / 2  # what one method stored, another finds


def test_what_fails_is_a_row_with_its_sentence(tiny_folder: str) -> None:
    asked = plan(tiny_folder, models=["no-such-model-anywhere/x", tiny_folder], tasks="ioi", methods="eap", seeds=0)
    first, second = batch.run(batch.cells(asked))
    assert first.run is None and "no-such-model-anywhere" in first.error and second.run is not None
    found = Batch.of([first, second])
    assert found.summary()["failed"] == 1 and found.summary()["runs"] == 1
    assert "no-such-model-anywhere/x, ioi, eap, 0: " in found.text() and "failed" in found.text()


def test_what_cannot_be_read_together_is_read_apart(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that does not tell what it read is whole; a store that has no room for all has room for each."""
    asked = batch.cells(plan(tiny_folder, tasks="ioi", methods=["eap", "attention-patterns"]))
    first = batch.run(asked[:2])
    for row in first:
        assert row.run is not None
        (row.run.folder / "activations.safetensors").unlink()
    rows = batch.run(asked)
    assert not any(row.error or row.shared for row in rows)

    def no_room(self: Any, *_: Any, **__: Any) -> None:
        raise UserError("no room")

    monkeypatch.setattr(type(activations.shared().session()), "fill", no_room)
    asked = batch.cells(plan(tiny_folder, tasks=["induction"], methods=["eap", "attention-patterns"]))
    assert not any(row.error or row.shared for row in batch.run(asked))


def test_agreement_is_with_the_first_method_and_between_seeds(tmp_path: Path, tiny_folder: str) -> None:
    rows = batch.run(batch.cells(plan(tiny_folder, tasks="ioi")))
    found = Batch.of(rows)
    assert found.pairs == (f"{tiny_folder}, ioi",) and found.methods == ("eap", "eap-ig steps=2", "attention-patterns")
    by = {
        (row.cell.method, row.cell.seed): row.run.result.nodes() for row in rows if row.run and "eap" in row.cell.method
    }
    expected = sum(scores.rank_agreement(by["eap-ig", seed], by["eap", seed]) for seed in (0, 1)) / 2
    assert found.agreement[0, :2].tolist() == pytest.approx([1, expected])
    assert found.seeds[0, 0].item() == pytest.approx(scores.rank_agreement(by["eap", 0], by["eap", 1]))
    assert torch.isnan(found.agreement[0, 2]) and torch.isnan(found.seeds[0, 2])
    told = found.summary()
    assert set(told["agreement"][found.pairs[0]]) == {"eap", "eap-ig steps=2"}
    assert told["passes"] == sum(row["passes"] + row.get("shared_passes", 0) for row in found.rows) > 0
    found.save(tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert kept["rows"] == list(found.rows) and (tmp_path / "out" / "figure.html").stat().st_size > 10**6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figure.html", "summary.json"]


def test_from_the_terminal(wb: Wb, tmp_path: Path, tiny_folder: str) -> None:
    path = written(tmp_path, plan(tiny_folder, tasks="ioi", methods=["eap"], seeds=[0]))
    code, out, _ = wb("batch", str(path), "--json")
    told = json.loads(out)
    assert code == 0 and told["runs"] == told["computed"] == 1
    assert (Path(told["folder"]) / "summary.json").is_file() and Path(told["folder"]).parent.name == "batches"
    code, out, _ = wb("batch", str(path), "--out", str(tmp_path / "mine"))
    assert code == 0 and "found" in out and (tmp_path / "mine" / "figure.html").is_file()
    for words, sentence in (
        ([str(tmp_path / "none.yaml")], "No such file"),
        ([str(path), "--workers", "0"], "0 workers compute nothing"),
    ):
        code, _, err = wb("batch", *words)
        assert code == 2 and sentence in err and err.count("\n") == 1


def start(path: Path, *words: str) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("wb")), "batch", str(path), "--json", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stamps() -> dict[str, str]:
    """When each run that is there was made."""
    return {run.id: run.record["created"] + str(run.folder.stat().st_mtime_ns) for run in runs.all_runs()[0]}


def kill_a_worker(process: subprocess.Popen[str], is_worker: Any) -> dict[str, str]:
    """Once some runs are there and others are not; the runs that were there."""
    for _ in range(1200):
        found = stamps()
        workers = [one for one in psutil.Process(process.pid).children(recursive=True) if is_worker(one)]
        if found and len(found) < 12 and workers:
            os.kill(workers[0].pid, signal.SIGKILL)
            return found
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("nothing to kill")


def check(process: subprocess.Popen[str], before: dict[str, str], model: str) -> None:
    """Nothing lost, nothing twice, and the numbers those of one process."""
    out, err = process.communicate(timeout=300)
    told = json.loads(out)
    assert process.returncode == 0, err
    assert told["runs"] == 12 and told["failed"] == 0 and 0 < len(before) < 12
    after = stamps()
    assert len(after) == 12 and {id: after[id] for id in before} == before
    results = {run.id: run.result for run in runs.all_runs()[0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(settings.home() / "alone"))
        for cell in batch.cells(plan(model)):
            run = runs.run(cell.method, model=model, **cell.asked)
            assert not run.hit and equal(run.result, results[run.id])


def test_a_worker_is_killed_and_nothing_is_lost_or_done_twice(tmp_path: Path, tiny_folder: str) -> None:
    process = start(written(tmp_path, plan(tiny_folder)), "--workers", "2")
    before = kill_a_worker(process, lambda one: "spawn_main" in " ".join(one.cmdline()))
    check(process, before, tiny_folder)


@RAY
@pytest.mark.slow
def test_a_worker_of_ray_is_killed_and_nothing_is_lost_or_done_twice(tmp_path: Path, tiny_folder: str) -> None:
    process = start(written(tmp_path, plan(tiny_folder)), "--ray", "local", "--workers", "2")
    before = kill_a_worker(process, lambda one: one.name().startswith("ray::work"))
    check(process, before, tiny_folder)


@RAY
@pytest.mark.slow
def test_where_no_ray_answers_it_is_a_sentence(tiny_folder: str) -> None:
    with pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 "):
        batch.run(batch.cells(plan(tiny_folder)), ray="127.0.0.1:1")


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is here")
def test_without_ray_it_is_a_sentence(tiny_folder: str) -> None:
    with pytest.raises(UserError, match="Ray is not installed"):
        batch.run(batch.cells(plan(tiny_folder)), ray="local")
