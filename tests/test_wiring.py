"""The edge-cutting pass against the model, against patching, and against its definition written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from circuits import wiring
from circuits.attribution import attribution_patching, eap
from circuits.edge_patching import edge_patching
from circuits.graph import PORTS, Graph, node_of
from circuits.ig_activations import eap_ig_activations
from circuits.patching import patching
from circuits.wiring import Wiring
from circuits.writes import Writes
from tests.conftest import CONFIGS
from workbench import registry
from workbench.activations import ActivationStore
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample

Make = Callable[..., LanguageModel]


def draw(model: LanguageModel, task: str = "ioi", n: int = 3) -> Batch:
    """Prompts of one length."""
    batch = sample(registry.get_task(task), model, 4 * n, seed=0)
    return batch.select(batch.buckets()[0][:n].tolist())


def logits_of(model: LanguageModel, sequences: tuple[Tensor, ...]) -> Tensor:
    out = model.run(torch.stack(list(sequences)), logits="last").logits
    assert out is not None
    return out[:, -1]


def one_by_one(model: LanguageModel, store: ActivationStore, batch: Batch, keep: Tensor, ablation: str) -> Tensor:
    """Destination by destination, source by source: the definition, with modules called directly."""
    graph, c = Graph.of(model.config), model.config
    writes = Writes(model, store, batch, batch, ablation)  # type: ignore[arg-type]
    ablated = dict(zip(graph.sources, writes.of(writes.ablated), strict=True))
    now = {"input": writes.clean[writes.start]}
    index = {name: i for i, name in enumerate(graph.destinations)}

    def reads(destination: str, biases: Tensor) -> Tensor:
        total = biases.clone()
        for s, d in graph.edges.tolist():
            if d == index[destination]:
                share, name = keep[s, d], graph.sources[s]
                total = total + share * now[name] + (1 - share) * ablated[name]
        return total

    biases = torch.zeros(c.d_model)
    for layer in range(c.n_layers):
        before = biases
        weight, bias = model.in_weights(layer)
        ports = {}
        for part, port in enumerate(PORTS):
            rows = [
                model.attention_norm(layer)(reads(f"a{layer}.h{h}<{port}>", biases)) @ weight[part, h].T + bias[part, h]
                for h in range(c.n_heads)
            ]
            ports[port] = torch.stack(rows, 2)
        edit = {f"blocks.{layer}.attn.hook_{port}": lambda x, port=port: ports[port] for port in PORTS}  # noqa: B023
        hook = f"blocks.{layer}.attn.hook_z"
        z = model.run(torch.stack(batch.clean), edit=edit, capture=[hook], stop_after=hook, ungroup=True)[hook]  # type: ignore[arg-type]
        wrote = model.head_writes(layer, z)
        attn_bias = model.out_bias(layer)
        biases = biases if attn_bias is None else biases + attn_bias
        heads = {f"a{layer}.h{h}": wrote[:, :, h] for h in range(c.n_heads)}
        if not c.parallel_attn_mlp:
            now |= heads
        mlp_in = reads(f"m{layer}", before if c.parallel_attn_mlp else biases)
        now |= heads
        hook = f"blocks.{layer}.hook_mlp_out"
        edit = {f"blocks.{layer}.hook_mlp_in": lambda x, value=mlp_in: value}
        now[f"m{layer}"] = model.run(torch.stack(batch.clean), edit=edit, capture=[hook], stop_after=hook)[hook]  # type: ignore[arg-type]
    return model.unembed(reads("logits", biases)[:, -1], torch.stack([x[-1] for x in batch.clean]))


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_equals_the_definition_for_any_share_of_any_edge(
    kind: str, ablation: str, make_tiny: Make, store: ActivationStore
) -> None:
    model = make_tiny(kind)
    batch = draw(model, n=2)
    graph = Graph.of(model.config)
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(3, len(graph.sources), len(graph.destinations), generator=generator)
    keep[1] = (keep[1] < 0.7).float()
    late = [i for i, name in enumerate(graph.destinations) if not name.startswith(("a0", "m0"))]
    keep[2] = 1
    keep[2][:, late] = (torch.rand(len(graph.sources), len(late), generator=generator) < 0.5).float()
    runs = Wiring(model, store, batch, ablation)  # type: ignore[arg-type]
    found = runs.run(keep)
    for i in range(3):
        expected = one_by_one(model, store, batch, keep[i], ablation)
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(runs.run(keep[i : i + 1])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_everything_kept_is_the_model_and_everything_cut_the_corrupted_run(
    kind: str, make_tiny: Make, store: ActivationStore
) -> None:
    model = make_tiny(kind)
    batch = draw(model)
    graph = Graph.of(model.config)
    every = torch.stack([graph.dense(torch.ones(len(graph))), torch.zeros(len(graph.sources), len(graph.destinations))])
    whole, nothing = Wiring(model, store, batch).run(every)
    torch.testing.assert_close(whole, logits_of(model, batch.clean), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nothing, logits_of(model, batch.corrupted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("gemma2", "gemma3_text")])
def test_cutting_all_edges_of_a_node_is_patching_it(kind: str, make_tiny: Make, store: ActivationStore) -> None:
    """A head behind a norm (Gemma) is not patched alone there: its norm's scale changes the others' share."""
    model = make_tiny(kind)
    batch = draw(model)
    truth = patching(model, batch, store)
    graph = Graph.of(model.config)
    alone = [graph.dense(graph.between(set(graph.nodes) - {name}).float()) for name in truth.nodes]
    whole = graph.dense(torch.ones(len(graph)))
    found = wiring.metric(model, batch, store, torch.stack([whole, *alone]))
    assert truth.per_prompt is not None
    torch.testing.assert_close(found[0] - found[1:], truth.per_prompt, rtol=1e-3, atol=2e-5)


def test_gradients_reach_the_shares(tiny: LanguageModel, store: ActivationStore) -> None:
    """The slope along a random direction predicts a small step along it."""
    batch = draw(tiny)
    graph = Graph.of(tiny.config)
    generator = torch.Generator().manual_seed(0)
    shape = (1, len(graph.sources), len(graph.destinations))
    keep, step = torch.rand(shape, generator=generator), 1e-2 * torch.randn(shape, generator=generator)
    runs = Wiring(tiny, store, batch)
    leaf = keep.clone().requires_grad_()
    (slope,) = torch.autograd.grad(batch.score(runs.run(leaf, grad=True)[0]).sum(), leaf)
    up, down = (batch.score(runs.run(keep + sign * step)[0]).sum() for sign in (1, -1))
    assert float(up - down) / 2 == pytest.approx(float((slope * step).sum()), rel=0.02)


def test_copies_are_run_apart_when_memory_is_short(
    tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = draw(tiny)
    graph = Graph.of(tiny.config)
    keep = torch.rand(3, len(graph.sources), len(graph.destinations), generator=torch.Generator().manual_seed(0))
    together = Wiring(tiny, store, batch).run(keep)
    monkeypatch.setattr(wiring, "COPY_BYTES", 1)
    torch.testing.assert_close(Wiring(tiny, store, batch).run(keep), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_mean_is_over_the_batch_however_its_prompts_are_split(
    kind: str, make_tiny: Make, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method, prompts together and one at a time; and the mean is that of the corrupted prompts of one length."""
    model = make_tiny(kind)
    drawn = sample(registry.get_task("ioi"), model, 8, seed=0)
    first, *_, last = drawn.buckets()
    batch = drawn.select([*first[:2].tolist(), int(last[0])])  # of two lengths
    graph = Graph.of(model.config)
    keep = torch.stack([graph.dense((torch.arange(len(graph)) % k > 0).float()) for k in (2, 3)])

    def every() -> dict[str, Tensor]:
        return {
            "wiring": wiring.metric(model, batch, store, keep, "mean"),
            "attribution-patching": attribution_patching(model, batch, store, ablation="mean").scores,
            "eap": eap(model, batch, store, ablation="mean").scores,
            "eap-ig-activations": eap_ig_activations(model, batch, store, steps=2, ablation="mean").scores,
            "edge-patching": edge_patching(model, batch, store, ablation="mean").scores,
        }

    together = every()
    for name in ("wiring", "edge_patching", "writes"):
        monkeypatch.setattr(f"circuits.{name}.PROMPTS_AT_ONCE", 1)
    for name in ("attribution", "ig_activations", "edge_patching"):
        monkeypatch.setattr(f"circuits.{name}.TOKENS_PER_PASS", 1)
    for name, alone in every().items():
        torch.testing.assert_close(alone, together[name], rtol=1e-3, atol=1e-5, msg=name)
    bucket = batch.buckets()[0].tolist()
    some = Writes(model, store, batch.select(bucket[:1]), batch, "mean")
    hook = some.mlp_hooks[1]
    expected = torch.stack([model.run(batch.corrupted[i][None], capture=[hook])[hook][0] for i in bucket]).mean(0)
    torch.testing.assert_close(some.ablated[hook][0], expected, rtol=1e-4, atol=1e-5)


def test_names_of_nodes_and_ports() -> None:
    assert [node_of(name) for name in ("a5.h1<q>", "m3", "logits")] == ["a5.h1", "m3", "logits"]


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_sums_of_few_edges_are_the_sums_of_all(
    kind: str, make_tiny: Make, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Circuits of few edges, of most, of whole nodes, and between: shared, complementary and empty sums."""
    model = make_tiny(kind)
    batch, graph = draw(model), Graph.of(model.config)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(len(graph), generator=generator)
    heads = [name for name in graph.nodes if name[0] == "a"]
    ways = [(draws < share).float() for share in (0.02, 0.3, 0.97)]
    ways += [graph.between(set(graph.nodes) - set(heads[::3])).float(), draws, graph.between([]).float()]
    late = torch.ones(len(graph))
    late[-5:] = 0  # the first layers are all kept and shared
    keep = torch.stack([graph.dense(way) for way in ways])
    plain = [wiring.metric(model, batch, store, some) for some in (keep, graph.dense(late)[None])]
    monkeypatch.setattr(wiring, "FEW", 0)
    for some, expected in zip((keep, graph.dense(late)[None]), plain, strict=True):
        torch.testing.assert_close(wiring.metric(model, batch, store, some), expected, rtol=1e-4, atol=1e-5)
