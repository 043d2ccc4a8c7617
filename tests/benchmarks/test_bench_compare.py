"""What each method finds on real models, where no truth is known: smallest faithful circuits and the agreement with
exact patching, as `wb run compare` gives them. Minutes per method; a run that was stopped goes on.

Gemma runs only where its terms are accepted (WORKBENCH_ACCEPT_TERMS=gemma-3-270m). CD-T has no rules for the norms
after its blocks.

Predictions, written before the first whole run: exact patching's heads are the fewest on each task (a tenth to a third
of all); EAP-IG over activations agrees with it best (.9); codes need most heads, about as many as a random order
(80 %); edge circuits of 90 % need 10 to 40 % of all edges, whatever ranks them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import harness
from workbench import runs, settings
from workbench.pretrained import DEFAULT

GEMMA = "gemma-3-270m"
N = 32
METHODS = "patching,attribution-patching,eap,eap-ig,eap-ig-activations,relp,node-pruning,sae-codes,code-effects,cd-t"
CASES = [(DEFAULT, "ioi"), (DEFAULT, "induction"), (DEFAULT, "docstring"), (GEMMA, "ioi")]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "task"), CASES)
def test_methods_on_real_models(model: str, task: str, shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(shared_home))  # where a run that was stopped is found again
    if model == GEMMA and model not in settings.accepted_terms():
        pytest.skip("its terms are not accepted")
    methods = harness.size(METHODS, "patching,eap")
    run = runs.run("compare", model=model, task=task, n=harness.size(N, 8), methods=methods)
    figures = {
        "model": model,
        "task": task,
        "accuracy": run.record["task"]["accuracy"],
        "prompts": run.record["key"]["n"],
    }
    figures |= {"run": run.id, "command": run.record["command"], "heads": len(run.result.heads)}
    harness.record(f"compare-{model}-{task}", figures | run.summary)
