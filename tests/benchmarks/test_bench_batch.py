"""A batch of three models, four tasks and three methods, killed twice and started again: forward passes against those
of every run alone, each with an empty store, and the numbers against theirs.

    pytest tests/benchmarks/test_bench_batch.py -m slow -s -o addopts=

Prediction, written before the first run: with methods that only read (patterns, lens, codes) every task but the first
of all costs two passes a length of prompts, at least five times fewer than alone. Where methods patch or take gradients
those passes are their own, and the store saves less than half.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from circuits.sparse.shipped import DATA
from tests.benchmarks import harness
from tests.test_runs import equal
from workbench import batch, places, runs

PLANS: dict[str, list[Any]] = {
    "reading": ["logit-lens", "attention-patterns", {"sae-codes": {"steps": 20, "trials": 1, "permutations": 20}}],
    "patching": ["logit-lens", "attention-patterns", "patching"],
}
PLAN: dict[str, Any] = {
    "models": ["pycode-small-dense", "pycode-small", "pycode-bridged"],
    "tasks": ["with_as", "for_while", "class_init", "lambda_func"],
    "n": harness.size(32, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_passes_of_a_batch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places.ship(DATA / "runs")
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(PLAN | {"methods": PLANS[name]}))
    home = tmp_path / "home"
    kills = [killed(path, home) for _ in range(2)]
    done = json.loads(start(path, home).communicate()[0])
    assert done["failed"] == 0 and done["runs"] == 36
    monkeypatch.setenv("WORKBENCH_HOME", str(home))
    together = {row["run"]: runs.get_run(row["run"]).result for row in done["rows"]}
    alone = 0
    for i, cell in enumerate(batch.read(path)):
        monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / f"alone-{i}"))
        run = runs.run(cell.method, model=cell.model, **cell.asked)
        assert not run.hit and equal(run.result, together[run.id])
        alone += run.forward_passes
    whole = json.loads(start(path, tmp_path / "undisturbed").communicate()[0])
    figures = {
        "methods": PLANS[name],
        "runs": done["runs"],
        "runs_there_when_killed": kills,
        "passes_alone": alone,
        "passes_together": whole["passes"],
    }
    ratio = harness.judge(round(alone / whole["passes"], 2), at_least=5 if name == "reading" else 1)
    harness.record(f"batch-{name}", figures | ratio)


def start(path: Path, home: Path) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("wb")), "batch", str(path), "--json"]
    env = os.environ | {"WORKBENCH_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def killed(path: Path, home: Path) -> int:
    """Once a few more runs are there; how many."""
    process, folder = start(path, home), home / "runs"
    before = len(list(folder.glob("[a-z]*"))) if folder.is_dir() else 0
    while process.poll() is None:
        found = len(list(folder.glob("[a-z]*"))) if folder.is_dir() else 0
        if found >= before + 5:
            process.kill()
            process.wait()
            return found
        time.sleep(0.02)
    raise AssertionError("it ended before it was killed")
