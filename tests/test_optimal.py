"""Optimal ablation: never worse than the mean it starts from, and as good as another optimiser on the same problem."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuits import optimal
from circuits.evaluate import curve, faithfulness
from circuits.graph import EdgeScores, Graph
from circuits.wiring import Wiring
from tests.test_wiring import draw
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.metrics import kl
from workbench.models import LanguageModel
from workbench.prompts import Batch


@pytest.fixture
def halves(tiny: LanguageModel) -> tuple[Batch, Batch]:
    batch = draw(tiny, n=6)
    return batch.select([0, 1, 2, 3]), batch.select([4, 5])


def without(graph: Graph, *edges: str) -> Tensor:
    flat = torch.ones(len(graph))
    flat[[graph.index[name] for name in edges]] = 0
    return graph.dense(flat)


def test_another_optimiser_finds_nothing_better(
    tiny: LanguageModel, halves: tuple[Batch, Batch], store: ActivationStore
) -> None:
    """One edge into the logits is cut: with all else known, the loss is a function of one vector."""
    fit, graph = halves[0], Graph.of(tiny.config)
    run = Wiring(tiny, store, fit, "mean")
    constants, losses = optimal.fitted([run], without(graph, "m2->logits"), steps=300)
    at = graph.sources.index("m2")
    biases = sum(b for layer in range(3) if (b := tiny.out_bias(layer)) is not None)
    rest = run.clean[:, :, -1].sum(0) - run.clean[at, :, -1] + biases
    target = run.run(without(graph)[None])[0]

    def loss(vector: Tensor) -> Tensor:
        return kl(tiny.unembed((rest + vector)[:, None], grad=True)[:, 0], target).mean()

    vector = run.clean[at].mean((0, 1)).clone().requires_grad_()
    assert losses[0] == pytest.approx(float(loss(vector).detach()), rel=1e-4)  # the first step is the mean's
    search = torch.optim.LBFGS([vector], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(vector)
        value.backward()
        return value

    search.step(closure)
    best = float(loss(vector).detach())
    assert best < 0.9 * losses[0]
    assert float(loss(constants[at])) == pytest.approx(min(losses), rel=1e-3)
    assert min(losses) < best + 0.02 * (losses[0] - best)


def test_no_worse_than_the_mean_for_any_circuit(
    tiny: LanguageModel, halves: tuple[Batch, Batch], store: ActivationStore
) -> None:
    graph = Graph.of(tiny.config)
    run = Wiring(tiny, store, halves[0], "mean")
    for seed in range(3):
        flat = (torch.rand(len(graph), generator=torch.Generator().manual_seed(seed)) < 0.5).float()
        _, losses = optimal.fitted([run], graph.dense(flat), steps=15)
        assert min(losses) < losses[0]


def test_with_nothing_cut_it_is_the_model(
    tiny: LanguageModel, halves: tuple[Batch, Batch], store: ActivationStore
) -> None:
    fit, judge = halves
    graph = Graph.of(tiny.config)
    _, losses = optimal.fitted([Wiring(tiny, store, fit, "mean")], without(graph))
    assert len(losses) == 1 and losses[0] < 1e-6
    found = optimal.metric(tiny, judge, fit, store, without(graph)[None])[0]
    whole = tiny.run(torch.stack(judge.clean), logits="last").logits
    assert whole is not None
    torch.testing.assert_close(found, judge.score(whole[:, -1]), atol=1e-4, rtol=1e-4)


def test_the_best_step_is_kept_however_it_goes_on(
    tiny: LanguageModel, halves: tuple[Batch, Batch], store: ActivationStore
) -> None:
    run, keep = Wiring(tiny, store, halves[0], "mean"), without(Graph.of(tiny.config), "m2->logits", "m0->m1")
    constants, losses = optimal.fitted([run], keep, steps=4, lr=1000.0)
    assert losses[-1] > 2 * min(losses)  # such steps lead away
    whole = run.run(torch.ones_like(keep)[None])[0]
    again = float(kl(run.replaced(constants).run(keep[None])[0], whole).mean())
    assert again == pytest.approx(min(losses), rel=1e-4)


def test_prompts_are_judged_with_the_constants_that_were_fitted(
    tiny: LanguageModel, halves: tuple[Batch, Batch], store: ActivationStore
) -> None:
    fit, judge = halves
    graph = Graph.of(tiny.config)
    keep, at = without(graph, "m2->logits"), graph.sources.index("m2")
    constants, _ = optimal.fitted([Wiring(tiny, store, fit, "mean")], keep, steps=20)
    run = Wiring(tiny, store, judge, "mean")
    biases = sum(b for layer in range(3) if (b := tiny.out_bias(layer)) is not None)
    resid = run.clean[:, :, -1].sum(0) - run.clean[at, :, -1] + biases + constants[at]
    found = optimal.metric(tiny, judge, fit, store, keep[None], steps=20)[0]
    torch.testing.assert_close(found, judge.score(tiny.unembed(resid)), atol=1e-4, rtol=1e-4)
    assert float((found - judge.score(run.run(keep[None])[0])).abs().max()) > 1e-2  # what the mean would give


def test_faithfulness_and_curves_take_it(
    tiny: LanguageModel, halves: tuple[Batch, Batch], store: ActivationStore
) -> None:
    fit, judge = halves
    graph = Graph.of(tiny.config)
    kept = torch.ones(1, len(graph), dtype=torch.bool)
    assert float(faithfulness(tiny, judge, store, graph, kept, ablation="optimal", fit=fit).value) == pytest.approx(1)
    scores = EdgeScores(graph, torch.arange(len(graph)).float(), "by number", "none")
    drawn = curve(tiny, judge, store, scores, ablation="optimal", fit=fit.select([0]), fractions=[0.5, 1.0])
    assert drawn.faithfulness.value[1] == pytest.approx(1, abs=1e-4) and "(optimal)" in drawn.definition


def test_prompts_that_judge_do_not_fit(
    tiny: LanguageModel, halves: tuple[Batch, Batch], store: ActivationStore
) -> None:
    _, judge = halves
    graph = Graph.of(tiny.config)
    with pytest.raises(UserError, match="then judge it"):
        optimal.metric(tiny, judge, judge, store, without(graph)[None])
    with pytest.raises(UserError, match="pass them as fit"):
        faithfulness(tiny, judge, store, graph, torch.ones(1, len(graph), dtype=torch.bool), ablation="optimal")
