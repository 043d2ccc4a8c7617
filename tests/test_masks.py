"""Learned gates: their distribution, their gradient, and that they find the only head that matters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from circuits.graph import Graph
from circuits.masks import edge_pruning, gate, node_pruning, open_share
from circuits.patching import patching
from tests.test_attribution import draw
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel

Make = Callable[..., LanguageModel]


def test_the_share_of_open_gates_is_what_sampling_gives() -> None:
    logit = torch.linspace(-4, 4, 9)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([gate(logit, "hard-concrete", generator) for _ in range(20_000)])
    torch.testing.assert_close((drawn > 0).float().mean(0), open_share(logit, "hard-concrete"), atol=0.01, rtol=0)
    assert float(drawn.min()) == 0 and float(drawn.max()) == 1


def test_straight_through_gates_are_steps_with_a_slope() -> None:
    logit = torch.tensor([-1.0, 2.0], requires_grad=True)
    found = gate(logit, "straight-through", torch.Generator())
    assert found.tolist() == [0, 1]
    (slope,) = torch.autograd.grad(found.sum(), logit)
    torch.testing.assert_close(slope, logit.sigmoid() * (1 - logit.sigmoid()))


@pytest.fixture
def one_sided(make_tiny: Make) -> LanguageModel:
    """A model in which only one head and one MLP tell clean from corrupted at the end: all others write nothing."""
    model = make_tiny(seed=3)
    for layer in range(3):
        for h in range(4):
            if (layer, h) != (1, 2):
                model.out_weight(layer)[h].zero_()
            else:
                model.out_weight(layer)[h].mul_(20)
        if layer != 2:
            model._block(layer).get_submodule("mlp.down_proj").weight.zero_()
    model.unembed_weight.mul_(30)  # predictions that are worth keeping
    return model


@pytest.mark.parametrize("gates", ["hard-concrete", "straight-through"])
def test_the_nodes_that_matter_stay_open(gates: str, one_sided: LanguageModel, store: ActivationStore) -> None:
    batch = draw(one_sided, n=8)
    effects = patching(one_sided, batch, store)
    truth = {name for name, effect in zip(effects.nodes, effects.scores.tolist(), strict=True) if abs(effect) > 1e-5}
    assert truth == {"a1.h2", "m2"}
    found = node_pruning(one_sided, batch, store, keep=2 / 15, steps=150, gates=gates)  # type: ignore[arg-type]
    assert set(sorted(found.nodes, key=lambda n: -float(found.scores[found.nodes.index(n)]))[:2]) == truth
    assert found.headline["open"] <= 4


def test_edge_gates_keep_the_path_that_matters(one_sided: LanguageModel, store: ActivationStore) -> None:
    batch = draw(one_sided, n=8)
    graph = Graph.of(one_sided.config)
    found = edge_pruning(one_sided, batch, store, keep=0.05, steps=150)
    ranked = [graph.names[i] for i in found.scores.argsort(descending=True).tolist()]
    assert "a1.h2->logits" in ranked[:13] or "a1.h2->m2" in ranked[:13]
    assert any(name in ranked[:13] for name in ("input->a1.h2<v>", "input->a1.h2<q>", "input->a1.h2<k>"))
    assert not any(name.startswith("a0.h0->") for name in ranked[:4])


def test_the_same_seed_gives_the_same_gates(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=4)
    one, other = (node_pruning(tiny, batch, store, steps=5) for _ in range(2))
    assert torch.equal(one.scores, other.scores)
    assert not torch.equal(node_pruning(tiny, batch, store, steps=5, mask_seed=1).scores, one.scores)


def test_bad_requests_are_sentences(tiny: LanguageModel, store: ActivationStore) -> None:
    with pytest.raises(UserError, match="keep=1 must lie between 0 and 1"):
        node_pruning(tiny, draw(tiny), store, keep=1.0)
