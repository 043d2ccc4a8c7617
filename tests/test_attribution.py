"""Attribution against autograd on split inputs, against itself by another route, and against integrals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from circuits import attribution
from circuits.attribution import attribution_patching, eap, eap_ig
from circuits.graph import PORTS, Graph
from circuits.writes import Writes
from tests.conftest import CONFIGS
from workbench import registry
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample
from workbench.sites import block

Make = Callable[..., LanguageModel]
POST_NORM = ("gemma2", "gemma3_text")


def draw(model: LanguageModel, task: str = "ioi", n: int = 3) -> Batch:
    return sample(registry.get_task(task), model, n, seed=0)


def by_autograd(model: LanguageModel, batch: Batch, store: ActivationStore, points: list[float]) -> Tensor:
    """EAP-IG as defined: a leaf is added to what every destination reads, and is differentiated."""
    graph, c = Graph.of(model.config), model.config
    total = torch.zeros(len(graph.sources), len(graph.destinations))
    for i in range(len(batch)):
        one = batch.select([i])
        writes = Writes(model, store, one, one)
        delta = writes.of(writes.clean) - writes.of(writes.ablated)
        for alpha in points:
            embeds = torch.lerp(writes.ablated[writes.start], writes.clean[writes.start], alpha)
            leaves: dict[str, Tensor] = {}
            edit: dict = {block(0, "hook_resid_pre"): lambda _, e=embeds: e.clone().requires_grad_()}
            resid: dict[int, Tensor] = {}

            def keep(x: Tensor, layer: int, resid: dict = resid) -> Tensor:
                resid[layer] = x
                return x

            def read(_: Tensor, layer: int, part: int, resid: dict = resid, leaves: dict = leaves) -> Tensor:
                weight, bias = model.in_weights(layer)
                leaf = torch.zeros(c.n_heads, *resid[layer].shape, requires_grad=True)
                leaves[f"{layer}{PORTS[part]}"] = leaf
                normed = model.attention_norm(layer)(resid[layer] + leaf)
                return torch.einsum("hbpm,hdm->bphd", normed, weight[part]) + bias[part]

            def add(x: Tensor, name: str, leaves: dict = leaves) -> Tensor:
                leaves[name] = torch.zeros_like(x, requires_grad=True)
                return x + leaves[name]

            for layer in range(c.n_layers):
                pre = block(layer, "hook_resid_pre")
                before = edit.get(pre, lambda x: x)
                edit[pre] = lambda x, layer=layer, before=before: keep(before(x), layer)
                for part, port in enumerate(PORTS):
                    edit[block(layer, f"attn.hook_{port}")] = lambda x, ly=layer, p=part: read(x, ly, p)
                edit[block(layer, "hook_mlp_in")] = lambda x, layer=layer: add(x, f"{layer}m")
            edit[model.hook_points[-1]] = lambda x: add(x, "logits")
            out = model.run(one.clean[0][None], edit=edit, grad=True, ungroup=True)
            assert out.logits is not None
            names = [f"{layer}{part}" for layer in range(c.n_layers) for part in (*PORTS, "m")] + ["logits"]
            grads = torch.autograd.grad(one.score(out.logits[:, -1]).sum(), [leaves[name] for name in names])
            columns = [g if "m" not in n and n != "logits" else g[None] for n, g in zip(names, grads, strict=True)]
            total += torch.einsum("sbpm,dbpm->sd", delta, torch.cat(columns)) / len(points) / len(batch)
    return graph.flat(total)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_edge_scores_equal_autograd_on_split_inputs(kind: str, make_tiny: Make, store: ActivationStore) -> None:
    model = make_tiny(kind)
    batch = draw(model)
    for found, points in (
        (eap(model, batch, store), [1.0]),
        (eap_ig(model, batch, store, steps=3, rule="midpoint"), [1 / 6, 1 / 2, 5 / 6]),
    ):
        expected = by_autograd(model, batch, store, points)
        scale = float(expected.abs().max())
        assert scale > 1e-4
        torch.testing.assert_close(found.scores, expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in POST_NORM])
@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_edges_out_of_a_node_sum_to_the_node(kind: str, ablation: str, make_tiny: Make, store: ActivationStore) -> None:
    """The gradient at a node's output is the sum of the gradients where it is read."""
    model = make_tiny(kind)
    batch = draw(model)
    edges = eap(model, batch, store, ablation=ablation).nodes("sum")  # type: ignore[arg-type]
    nodes = attribution_patching(model, batch, store, ablation=ablation)  # type: ignore[arg-type]
    assert edges.nodes == nodes.nodes
    torch.testing.assert_close(edges.scores, nodes.scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_integrated_gradients_are_complete(kind: str, make_tiny: Make, store: ActivationStore) -> None:
    """What the edges out of the input are given adds up to metric(clean) - metric(corrupted)."""
    model = make_tiny(kind)
    batch = draw(model)
    found = eap_ig(model, batch, store, steps=32, rule="midpoint")
    from_input = sum(float(s) for name, s in zip(found.graph.names, found.scores, strict=True) if name[:5] == "input")
    truth = 0.0
    for i in range(len(batch)):
        for side, sign in ((batch.clean, 1), (batch.corrupted, -1)):
            logits = model.run(side[i][None], logits="last").logits
            assert logits is not None
            truth += sign * float(batch.select([i]).score(logits[:, -1])) / len(batch)
    assert from_input == pytest.approx(truth, rel=0.02, abs=2e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_blockwise_and_chunked_backward_changes_nothing(
    kind: str, make_tiny: Make, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny(kind)
    batch = draw(model)
    whole = eap_ig(model, batch, store).scores, attribution_patching(model, batch, store, steps=2).scores
    monkeypatch.setattr(attribution, "BLOCKWISE_TOKENS", 1)
    monkeypatch.setattr(attribution, "TOKENS_PER_PASS", 1)
    monkeypatch.setattr("circuits.writes.CHUNK_BYTES", 1)
    small = eap_ig(model, batch, store).scores, attribution_patching(model, batch, store, steps=2).scores
    for one, other in zip(whole, small, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_one_step_at_the_clean_prompt_is_plain_attribution(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny)
    assert torch.equal(eap_ig(tiny, batch, store, steps=1).scores, eap(tiny, batch, store).scores)


def test_per_prompt_scores_average_to_the_scores(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=5)
    found = attribution_patching(tiny, batch, store, steps=2)
    for i in range(len(batch)):
        alone = attribution_patching(tiny, batch.select([i]), store, steps=2)
        assert found.per_prompt is not None
        torch.testing.assert_close(found.per_prompt[:, i], alone.scores, rtol=1e-3, atol=1e-6)


def test_bad_requests_are_sentences(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny)
    with pytest.raises(UserError, match="steps=0 gives no gradient"):
        eap_ig(tiny, batch, store, steps=0)
    with pytest.raises(UserError, match="not defined for ablation='mean'"):
        attribution_patching(tiny, batch, store, steps=3, ablation="mean")
    with pytest.raises(UserError, match="ablation='men' is not one of resample, mean, zero"):
        registry.bind(registry.get_analysis("eap"), {"ablation": "men"})
