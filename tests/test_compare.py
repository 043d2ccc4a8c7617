"""Comparisons: agreement by definition, costs that do not depend on the order, truths of this model alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits import compare as module
from circuits.compare import compare
from circuits.known import get
from circuits.patching import patching
from circuits.recovery import recovery
from tests.test_attribution import draw
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel


def test_rows_do_not_depend_on_which_methods_ran_before(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=8)
    found = compare(tiny, batch, store, methods="patching,eap,relp")
    alone = compare(tiny, batch, store, methods="relp")
    skip = ("seconds", "exact")
    for name, value in alone.table["relp"].items():
        assert name in skip or found.table["relp"][name] == value, name
    assert found.table["patching"]["exact"] == pytest.approx(1) and alone.table["relp"]["exact"] is None
    torch.testing.assert_close(found.agreement, found.agreement.T)
    assert "edges" not in found.table["patching"] and 0.9 <= (found.table["eap"]["edges_f"] or 0) <= 1.1


def test_finding_and_judging_share_no_prompt(tiny: LanguageModel) -> None:
    batch = draw(tiny, n=9)
    find, judge = module.halves(batch)
    assert not set(find.prompts) & set(judge.prompts) and {*find.prompts, *judge.prompts} == set(batch.prompts)


def test_a_truth_of_another_model_or_task_is_refused(tiny: LanguageModel, store: ActivationStore) -> None:
    """Heads of other models have the same names: an AUC against them would look like any other."""
    with pytest.raises(UserError, match="is a circuit of gpt2 on ioi, not of tiny-llama on ioi"):
        compare(tiny, draw(tiny, n=4), store, methods="eap", truth="ioi")


def test_a_truth_of_this_model_gives_its_auc(
    tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = ("a0.h1", "a1.h2", "a2.h0")
    known = replace(get("ioi"), name="t", model=tiny.name, nodes=nodes)
    monkeypatch.setattr(module, "known_circuit", lambda name: known)
    batch = draw(tiny, n=8)
    found = compare(tiny, batch, store, methods="patching", truth="t", edges=False)
    heads = module._heads(patching(tiny, module.halves(batch)[0], store))
    assert found.table["patching"]["auc"] == recovery(heads, nodes, name="t").auc


def test_a_method_that_refuses_does_not_take_the_others_with_it(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=8)  # four pairs to find with are too few for codes
    found = compare(tiny, batch, store, methods="sae-codes,patching", edges=False)
    assert found.methods == ("patching",) and found.scores.shape == (1, 12)
    assert "raise --n" in found.failed["sae-codes"] and "sae-codes" in found.summary()["failed"]
    with pytest.raises(UserError, match=r"every method failed; sae-codes: .*raise --n"):
        compare(tiny, batch, store, methods="sae-codes", edges=False)


@pytest.mark.parametrize(
    ("n", "methods", "message"),
    [(3, "eap", "cannot be halved"), (4, " , ", "methods is empty"), (4, "logit-lens", "scores no nodes or edges")],
)
def test_bad_requests_are_sentences(
    n: int, methods: str, message: str, tiny: LanguageModel, store: ActivationStore
) -> None:
    with pytest.raises(UserError, match=message):
        compare(tiny, draw(tiny, n=n), store, methods=methods)
