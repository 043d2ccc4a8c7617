"""Relevance rules and moved activations: values stay, slopes follow the rules, attributions add up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from circuits import attribution
from circuits.attribution import eap, eap_ig
from circuits.edge_patching import edge_patching
from circuits.graph import Graph
from circuits.ig_activations import eap_ig_activations
from circuits.relp import relp
from tests.conftest import CONFIGS
from tests.test_attribution import draw
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.sites import block

Make = Callable[..., LanguageModel]


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_rules_change_slopes_and_no_value(kind: str, make_tiny: Make) -> None:
    model = make_tiny(kind)
    tokens = torch.randint(500, (2, 9), generator=torch.Generator().manual_seed(0))
    out, pre = block(2, "hook_resid_post"), block(1, "hook_resid_pre")
    plain = model.run(tokens, capture=[pre, out], grad=True)
    ruled = model.run(tokens, capture=[pre, out], grad=True, relevance=True)
    torch.testing.assert_close(ruled.logits, plain.logits, rtol=1e-4, atol=1e-5)
    slopes = [torch.autograd.grad(run[out].square().sum(), run[pre])[0] for run in (plain, ruled)]
    assert not torch.allclose(*slopes, rtol=0.01)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2"])
def test_relevance_of_an_mlp_is_conserved(kind: str, make_tiny: Make) -> None:
    """f(x) = sum of x times slope, where nothing is added on the way: norm, gate and activation pass all of it on."""
    model = make_tiny(kind)
    tokens = torch.randint(500, (1, 6), generator=torch.Generator().manual_seed(0))
    mlp = model._block(1).get_submodule("mlp")
    norm = model.mlp_norm(1)
    for part in (mlp, norm):
        for name, parameter in part.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()  # a bias explains what no input does
    read, wrote = block(1, "hook_mlp_in"), block(1, "hook_mlp_out")
    run = model.run(tokens, capture=[read, wrote], grad=True, relevance=True)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    value = (run[wrote] * direction).sum()
    (slope,) = torch.autograd.grad(value, run[read])
    # A centring norm passes on the input without its mean, which is what it reads.
    x = run[read] - run[read].mean(-1, keepdim=True) if kind == "gpt2" else run[read]
    assert float((x * slope).sum().detach()) == pytest.approx(float(value.detach()), rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_products_of_attention_are_shared_by_halves(kind: str, make_tiny: Make) -> None:
    """A value gets half of what it explains in z; a query half of what the scores get, which is half of that."""
    model = make_tiny(kind)
    tokens = torch.randint(500, (1, 7), generator=torch.Generator().manual_seed(0))
    rotated = "attn.hook_rot_q" if block(1, "attn.hook_rot_q") in model.hook_points else "attn.hook_q"
    v, q, z = (block(1, name) for name in ("attn.hook_v", rotated, "attn.hook_z"))
    slopes = []
    for relevance in (False, True):
        run = model.run(tokens, capture=[v, q, z], logits="none", grad=True, relevance=relevance)
        direction = torch.randn(run[z].shape, generator=torch.Generator().manual_seed(1))
        slopes.append(torch.autograd.grad((run[z] * direction).sum(), [run[v], run[q]]))
    for share, plain, ruled in zip((1 / 2, 1 / 4), *slopes, strict=True):
        torch.testing.assert_close(ruled, share * plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_edges_out_of_a_node_sum_to_its_relevance(kind: str, make_tiny: Make, store: ActivationStore) -> None:
    """By autograd alone at the nodes' outputs; at the edges through norms of constant scale."""
    model = make_tiny(kind)
    batch = draw(model, n=2)
    hooks = [block(layer, name) for layer in range(3) for name in ("attn.hook_z", "hook_mlp_out")]
    expected = torch.zeros(15)
    for i in range(len(batch)):
        one = batch.select([i])
        clean = model.run(one.clean[0][None], capture=hooks, logits="last", grad=True, relevance=True)
        corrupted = model.run(one.corrupted[0][None], capture=hooks)
        assert clean.logits is not None
        slopes = torch.autograd.grad(one.score(clean.logits[:, -1]).sum(), [clean[hook] for hook in hooks])
        rows = []
        for hook, slope in zip(hooks, slopes, strict=True):
            effect = (slope * (clean[hook].detach() - corrupted[hook])).sum((0, 1))
            rows.append(effect.sum(-1) if hook.endswith("z") else effect.sum()[None])
        expected += torch.cat(rows) / len(batch)
    found = relp(model, batch, store).nodes("sum")
    torch.testing.assert_close(found.scores, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_blockwise_relevance_is_the_same(
    kind: str, make_tiny: Make, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny(kind)
    batch = draw(model)
    whole = relp(model, batch, store).scores, eap_ig_activations(model, batch, store, steps=2).scores
    monkeypatch.setattr(attribution, "BLOCKWISE_TOKENS", 1)
    parts = relp(model, batch, store).scores, eap_ig_activations(model, batch, store, steps=2).scores
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_moved_activations_at_the_clean_end_are_eap(kind: str, make_tiny: Make, store: ActivationStore) -> None:
    """One right-hand point is the clean run, for every source."""
    model = make_tiny(kind)
    batch = draw(model)
    found = eap_ig_activations(model, batch, store, steps=1)
    torch.testing.assert_close(found.scores, eap(model, batch, store).scores, rtol=1e-3, atol=1e-5)


def test_moved_embeddings_are_those_of_eap_ig(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny)
    found, other = (f(tiny, batch, store, steps=3) for f in (eap_ig_activations, eap_ig))
    first = Graph.of(tiny.config).edges[:, 0] == 0
    torch.testing.assert_close(found.scores[first], other.scores[first], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(found.scores[~first], other.scores[~first], rtol=1e-2)


def test_moving_a_layer_gives_the_exact_effect_of_its_edges_together(
    tiny: LanguageModel, store: ActivationStore
) -> None:
    """Integrated gradients are complete for what moves: edges out of the last MLP have exact scores."""
    batch = draw(tiny)
    found = eap_ig_activations(tiny, batch, store, steps=32, rule="midpoint")
    truth = edge_patching(tiny, batch, store)
    i = found.graph.index["m2->logits"]
    assert float(found.scores[i]) == pytest.approx(float(truth.scores[i]), rel=1e-2)
    with pytest.raises(UserError, match="steps=0"):
        eap_ig_activations(tiny, batch, store, steps=0)
