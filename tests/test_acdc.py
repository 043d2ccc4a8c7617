"""ACDC against a second implementation that runs the whole graph for every trial, and at its two ends."""

from __future__ import annotations

import pytest
import torch

from circuits import wiring
from circuits.acdc import acdc, acdc_scores
from circuits.graph import Graph
from tests.test_wiring import draw
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.metrics import kl
from workbench.models import LanguageModel


def by_hand(model: LanguageModel, store: ActivationStore, threshold: float) -> list[str]:
    batch = draw(model, n=2)
    graph = Graph.of(model.config)
    run = wiring.Wiring(model, store, batch)
    left = torch.ones(len(graph))
    whole = run.run(graph.dense(left)[None])[0]

    def loss(kept: torch.Tensor) -> float:
        return float(kl(run.run(graph.dense(kept)[None])[0], whole).mean())

    for destination in reversed(graph.destinations):
        into = [i for i, name in enumerate(graph.names) if name.split("->")[1] == destination]
        for i in reversed(into):
            trial = left.clone()
            trial[i] = 0
            if loss(trial) - loss(left) < threshold:
                left = trial
    return [graph.names[i] for i in left.nonzero()[:, 0].tolist()]


def test_equals_the_algorithm_written_out(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=2)
    found = acdc(tiny, batch, store, threshold=2e-4)
    assert found.edges == by_hand(tiny, store, 2e-4)
    assert 0 < len(found) < len(found.graph)
    assert found.task == "ioi" and found.method == "acdc" and "0.0002" in found.definition


def test_a_huge_threshold_cuts_everything_and_a_circuit_is_as_good_as_it_says(
    tiny: LanguageModel, store: ActivationStore
) -> None:
    batch = draw(tiny, n=2)
    assert len(acdc(tiny, batch, store, threshold=1e9)) == 0
    found = acdc(tiny, batch, store, threshold=1e-4)
    run = wiring.Wiring(tiny, store, batch)
    both = torch.stack([found.graph.dense(torch.ones(len(found.graph))), found.graph.dense(found.kept.float())])
    whole, circuit = run.run(both)
    assert float(kl(circuit, whole).mean()) == pytest.approx(found.headline["final_kl"], abs=1e-6)


def test_scores_are_the_largest_threshold_that_keeps_an_edge(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=2)
    low, high = (acdc(tiny, batch, store, threshold=t) for t in (1e-4, 1e-3))
    found = acdc_scores(tiny, batch, store, [1e-3, 1e-4])
    expected = torch.where(high.kept, 1e-3, torch.where(low.kept, 1e-4, 0.0))
    torch.testing.assert_close(found.scores, expected)


def test_a_negative_threshold_is_a_sentence(tiny: LanguageModel, store: ActivationStore) -> None:
    with pytest.raises(UserError, match=r"threshold=-0\.1 is negative"):
        acdc(tiny, draw(tiny), store, threshold=-0.1)
