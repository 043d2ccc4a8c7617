"""What each method finds on real models, where no truth is known: smallest faithful circuits and the agreement with
exact patching, as `wb run compare` gives them. Minutes per method; a run that was stopped goes on.

Gemma runs only where its terms are accepted (WORKBENCH_ACCEPT_TERMS=gemma-3-270m). CD-T has no rules for the norms
after its blocks.

Predictions, written before the first whole run: exact patching's heads are the fewest on each task (a tenth to a third
of all); EAP-IG over activations agrees with it best (.9); codes need most heads, about as many as a random order
(80 %); edge circuits of 90 % need 10 to 40 % of all edges, whatever ranks them.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks import harness
from workbench import runs, settings
from workbench.models import LanguageModel

N = 32
METHODS = "patching,attribution-patching,eap,eap-ig,eap-ig-activations,relp,node-pruning,sae-codes,code-effects,cd-t"
CASES = {
    "smollm2-135m": ("ioi", "induction", "docstring"),
    "gemma-3-270m": ("ioi",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_methods_on_real_models(name: str) -> None:
    if name == "gemma-3-270m" and name not in settings.accepted_terms():
        pytest.skip("its terms are not accepted")
    model = LanguageModel.load(name)
    found: dict[str, Any] = {}
    for task in CASES[name][: harness.size(3, 1)]:
        methods = harness.size(METHODS, "patching,eap")
        run = runs.run("compare", model=model, task=task, n=harness.size(N, 8), methods=methods)
        result, truth = run.result, run.record["task"]
        found[task] = {
            "accuracy": truth["accuracy"],
            "run": run.id,
            "command": run.record["command"],
            "heads": len(result.heads),
            **run.summary,
        }
    harness.record(f"compare-{name}", {"prompts": N, "tasks": found})
