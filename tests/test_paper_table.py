"""The table of the discrete-SAE paper (O'Neill & Bui, arXiv 2405.12522): how well its codes recover published heads.

Published, mean and standard deviation over 10 trials, on the paper's own lists:

                     nodes            pairs, folded back to heads
    IOI              0.868 ± 0.008    0.840 ± 0.024
    Greater-Than     0.855 ± 0.036    0.873 ± 0.020
    Docstring        0.869 ± 0.038    0.896 ± 0.017

It needs the hub: `pytest -m network tests/test_paper_table.py`. Prompts are this repository's, of the paper's make-up
(250 pairs, the same corruptions), so a difference of up to 0.03 is allowed. The AUC against the lists without their
transcription errors, and of pairs, are recorded beside it (`--junit-xml`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import mean, pstdev

import pytest
import torch

from circuits import known
from saes.code_statistics import fold_back
from saes.codes import sae_codes
from workbench import registry
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample
from workbench.scores import NodeScores, head_auc

TOLERANCE = 0.03


@dataclass(frozen=True)
class Auc:
    """Mean and standard deviation over trials of the AUC of heads, by their codes and by pairs of codes."""

    node: float
    node_std: float
    folded: float
    folded_std: float


def aucs(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    lists: Mapping[str, Iterable[str]],
    *,
    lam: float,
    trials: int = 10,
    steps: int = 500,
) -> dict[str, Auc]:
    """One column of the table, for each list of heads: every trial has an AUC of its own, as published."""
    prompts = begun(batch, model)
    nodes: dict[str, list[float]] = {name: [] for name in lists}
    folded: dict[str, list[float]] = {name: [] for name in lists}
    for seed in range(trials):
        # Two permutations, as few as there may be: the published score uses none.
        found = sae_codes(
            model, prompts, store, mode="paper", lam=lam, steps=steps, trials=1, permutations=2, pairs=True,
            sae_seed=seed,
        )  # fmt: skip
        assert found.pairs is not None
        ends = NodeScores(found.scores.nodes, fold_back(found.pairs).float(), "pairs, folded back", "ends")
        for name, heads in lists.items():
            nodes[name].append(head_auc(found.scores, heads))
            folded[name].append(head_auc(ends, heads))
    return {
        name: Auc(mean(nodes[name]), pstdev(nodes[name]), mean(folded[name]), pstdev(folded[name])) for name in lists
    }


def begun(batch: Batch, model: LanguageModel) -> Batch:
    """The prompts with the token in front that the paper's have and GPT-2's tokenizer does not add."""
    first = model.tokenizer.bos_token_id
    if first is None or int(batch.clean[0][0]) == first:
        return batch
    start = torch.tensor([first])
    clean, corrupted = (tuple(torch.cat([start, one]) for one in side) for side in (batch.clean, batch.corrupted))
    return replace(batch, clean=clean, corrupted=corrupted)


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "task", "lam", "lists", "published"),
    [
        ("gpt2", "ioi", 0.02, ("ioi-sae-paper", "ioi"), 0.868),
        ("gpt2", "greater_than", 0.02, ("greater-than",), 0.855),  # whose heads are the paper's list
        pytest.param(
            "attn-only-4l", "docstring", 0.05, ("docstring-sae-paper", "docstring"), 0.869,
            marks=pytest.mark.skip(
                reason="attn-only-4l is published as a pickle of an architecture of TransformerLens' own: the "
                "workbench reads no pickles and maps no attention-only family"
            ),
        ),
    ],
    ids=["ioi", "greater-than", "docstring"],
)  # fmt: skip
def test_the_published_node_auc_is_reproduced(
    name: str,
    task: str,
    lam: float,
    lists: tuple[str, ...],
    published: float,
    store: ActivationStore,
    record_property: Callable[[str, object], None],
) -> None:
    try:
        model = LanguageModel.load(name)
    except UserError as error:
        if "hub cannot be reached" not in str(error):
            raise
        pytest.skip(f"needs the model hub: {error}")
    batch = sample(registry.get_task(task), model, 250, seed=0)
    found = aucs(model, batch, store, {one: known.get(one).heads for one in lists}, lam=lam)
    for one, value in found.items():
        record_property(str(known.get(one)), value)
    assert found[lists[0]].node == pytest.approx(published, abs=TOLERANCE), found


@pytest.mark.parametrize("task", ["ioi", "greater_than", "docstring"])
def test_the_same_on_a_small_model_of_the_family(
    task: str, make_tiny: Callable[..., LanguageModel], store: ActivationStore
) -> None:
    """Heads that score above the median in a trial are recovered by it, the others the worse for it: AUC 1 and 0."""
    model = make_tiny("gpt2")
    batch = sample(registry.get_task(task), model, 12, seed=0)
    codes = sae_codes(model, batch, store, mode="paper", steps=5, trials=1, permutations=2, pairs=True, sae_seed=0)
    assert codes.pairs is not None
    by_score, by_pairs = (
        {name for name, one in zip(codes.scores.nodes, values.tolist(), strict=True) if one > values.median()}
        for values in (codes.scores.scores, fold_back(codes.pairs))
    )
    lists = {"top": by_score, "rest": {*codes.scores.nodes} - by_score, "pairs": by_pairs}
    found = aucs(model, batch, store, lists, lam=0.02, trials=1, steps=5)
    assert (found["top"].node, found["rest"].node, found["pairs"].folded) == pytest.approx((1, 0, 1))
    both = aucs(model, batch, store, lists, lam=0.02, trials=2, steps=5)["top"]
    assert both.node_std == pytest.approx(1 - both.node)  # of 1 and another: half their difference, as is their mean


def test_prompts_begin_as_the_papers_do(make_tiny: Callable[..., LanguageModel]) -> None:
    model = make_tiny("gpt2")
    model.tokenizer = copy.deepcopy(model.tokenizer)  # shared by all tests
    batch = sample(registry.get_task("ioi"), model, 3, seed=0)
    assert begun(batch, model) is batch  # this tokenizer has no such token
    model.tokenizer.bos_token = model.tokenizer.decode([7])
    with_start = begun(batch, model)
    assert all(one[0] == 7 for one in (*with_start.clean, *with_start.corrupted))
    assert [len(one) - 1 for one in with_start.clean] == [len(one) for one in batch.clean]
    assert begun(with_start, model) is with_start
