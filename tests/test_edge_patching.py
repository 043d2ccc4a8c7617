"""Exact edge patching against the general edge-cutting pass, and attribution against it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from circuits import wiring
from circuits.attribution import eap
from circuits.edge_patching import edge_patching, exact
from circuits.graph import Graph
from tests.conftest import CONFIGS
from tests.test_attribution import draw
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel

Make = Callable[..., LanguageModel]


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_equals_cutting_one_edge_of_the_whole_graph(
    kind: str, ablation: str, make_tiny: Make, store: ActivationStore
) -> None:
    model = make_tiny(kind)
    batch = draw(model, n=4)
    graph = Graph.of(model.config)
    found = edge_patching(model, batch, store, ablation=ablation)  # type: ignore[arg-type]
    alone = torch.ones(len(graph), len(graph)) - torch.eye(len(graph))
    keep = torch.stack([graph.dense(row) for row in torch.cat([torch.ones(1, len(graph)), alone])])
    by_wiring = wiring.metric(model, batch, store, keep, ablation)  # type: ignore[arg-type]
    assert found.per_prompt is not None
    expected = (by_wiring[0] - by_wiring[1:]).T
    torch.testing.assert_close(found.per_prompt, expected, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(found.scores, expected.mean(0), rtol=1e-3, atol=2e-5)


def test_small_passes_give_the_same(
    tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = draw(tiny, n=4)
    together = edge_patching(tiny, batch, store).scores
    monkeypatch.setattr("circuits.edge_patching.TOKENS_PER_PASS", 1)
    monkeypatch.setattr("circuits.edge_patching.PROMPTS_AT_ONCE", 1)
    torch.testing.assert_close(edge_patching(tiny, batch, store).scores, together, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_attribution_is_exact_to_first_order(
    kind: str, make_tiny: Make, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut an edge by a thousandth of its difference: the effect is a thousandth of the attribution."""
    model = make_tiny(kind)
    batch = draw(model, n=2)
    graph = Graph.of(model.config)
    full = eap(model, batch, store).scores
    batch_metric = wiring.metric(
        model,
        batch,
        store,
        torch.stack([graph.dense(torch.ones(len(graph)) - step * 2e-2 * torch.eye(len(graph))[i])
                     for i in range(0, len(graph), 7) for step in (1, -1)]),
    ).mean(1).unflatten(0, (-1, 2))  # fmt: skip
    slope = (batch_metric[:, 1] - batch_metric[:, 0]) / 4e-2
    scale = float(full.abs().max())
    torch.testing.assert_close(slope, full[::7], rtol=0.05, atol=2e-3 * scale)


def test_only_the_best_edges_are_patched_when_asked(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny)
    some = edge_patching(tiny, batch, store, edges=5)
    every = edge_patching(tiny, batch, store)
    patched = some.scores != 0
    assert 0 < int(patched.sum()) <= 5 and some.headline["edges_patched"] == 5
    torch.testing.assert_close(some.scores[patched], every.scores[patched], rtol=1e-3, atol=1e-6)
    assert "others are 0" in some.definition
    with pytest.raises(UserError, match="edges=-1 is negative"):
        edge_patching(tiny, batch, store, edges=-1)


def test_nothing_chosen_is_nothing_run(tiny: LanguageModel, store: ActivationStore) -> None:
    graph = Graph.of(tiny.config)
    assert not exact(tiny, draw(tiny), store, torch.zeros(len(graph), dtype=torch.bool)).any()
