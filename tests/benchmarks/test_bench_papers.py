"""What the published measurements of `papers` give by default, on the embedded model: the figures of docs/papers.md."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks import harness
from workbench import runs
from workbench.models import LanguageModel

OF_A_MODEL = ("attention-truncation", "attention-sinks", "attention-entropy", "cka", "kv-saliency")
OF_NONE = ("modular-addition", "icl-regression")
QUICK: dict[str, dict[str, Any]] = {"modular-addition": {"steps": 100}, "icl-regression": {"steps": 20}}


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_MODEL)
def test_of_a_model(name: str, smollm: LanguageModel) -> None:
    run = runs.run(name, model=smollm, **harness.size({}, {"n": 4}))
    harness.record(f"papers-{name}", {"command": run.record["command"], "summary": run.summary})


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_NONE)
def test_of_one_that_is_trained(name: str) -> None:
    run = runs.run(name, **harness.size({}, QUICK[name]))
    seconds = run.record["cost"]["seconds"]
    harness.record(f"papers-{name}", {"command": run.record["command"], "seconds": seconds, "summary": run.summary})
