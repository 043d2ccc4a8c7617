"""Path patching against two full passes per sender, against arithmetic on the residual stream, and at its limits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import pytest
import torch

from circuits.graph import INPUT, LOGITS, Graph
from circuits.path_patching import nodes, path_metrics, path_patching, precedes, read_heads, read_receivers
from tests.conftest import CONFIGS
from workbench import registry, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.interventions import resample
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample
from workbench.sites import Site, block

Make = Callable[..., LanguageModel]
CASES = [
    ("logits", "all", False),
    ("logits", "last", True),
    ("a1.h1<q>,a2.h0<k>", "all", False),
    ("a2.h3<v>,a2.h0<q>", "all", True),
    ("a1.h2<v>,m1,m2", "last", False),
]


def draw(model: LanguageModel, task: str = "ioi", n: int = 3) -> Batch:
    return sample(registry.get_task(task), model, n, seed=0)


def site_of(receiver: str) -> Site:
    if receiver[0] == "m":
        return Site(block(int(receiver[1:]), "hook_mlp_in"))
    layer, rest = receiver[1:].split(".h")
    return Site(block(int(layer), f"attn.hook_{rest[-2]}"), head=int(rest[0]))


def written(model: LanguageModel) -> list[str]:
    return [hook for hook in model.hook_points if hook.endswith(("attn.hook_z", "hook_mlp_out"))]


def two_passes(
    model: LanguageModel,
    clean: torch.Tensor,
    on_clean: Mapping[str | Site, torch.Tensor],
    on_corrupted: Mapping[str | Site, torch.Tensor],
    senders: Collection[str],
    receivers: Sequence[str],
    position: str,
    freeze_mlps: bool,
) -> torch.Tensor:
    """Logits at the last position, from whole forward passes over the whole prompt."""
    last = block(model.config.n_layers - 1, "hook_resid_post")
    edit: dict[str | Site, Callable[[torch.Tensor], torch.Tensor]] = {}
    for hook in written(model):
        layer, name = sites.split(hook)
        if name == "attn.hook_z":
            value = on_clean[hook].clone()
            for h in range(model.config.n_heads):
                if f"a{layer}.h{h}" in senders:
                    here = slice(None) if position == "all" else -1
                    value[:, here, h] = on_corrupted[hook][:, here, h]
            edit[hook] = resample(value)
        elif f"m{layer}" in senders and position == "all":
            edit[hook] = resample(on_corrupted[hook])
        elif f"m{layer}" in senders:
            edit[Site(hook, pos=-1)] = resample(on_corrupted[hook][:, -1])  # before it the MLP reads what it did
        elif freeze_mlps:
            edit[hook] = resample(on_clean[hook])
    wanted = [last] if LOGITS in receivers else [site_of(name) for name in receivers]
    read = model.run(clean[None], capture=wanted, edit=edit, ungroup=True)
    put = {site: resample(read[site]) for site in wanted}
    logits = model.run(clean[None], edit=put, ungroup=True).logits
    assert logits is not None
    return logits[:, -1]


@pytest.mark.parametrize(
    ("kind", "receiver", "position", "freeze"),
    [(kind, *case) for i, kind in enumerate(CONFIGS) for j, case in enumerate(CASES) if i < 5 or j in (i % 5, 2)],
)
def test_equals_two_full_passes_per_sender(
    kind: str, receiver: str, position: str, freeze: bool, make_tiny: Make, store: ActivationStore
) -> None:
    model = make_tiny(kind)
    batch = draw(model, n=1)
    found = path_patching(model, batch, store, receiver=receiver, position=position, freeze_mlps=freeze)  # type: ignore[arg-type]
    clean, corrupted = batch.clean[0], batch.corrupted[0]
    values = [model.run(x[None], capture=written(model)).activations for x in (clean, corrupted)]
    logits = model.run(clean[None], logits="last").logits
    assert logits is not None and found.per_prompt is not None
    before = batch.score(logits[:, -1])
    for k, node in list(enumerate(found.nodes))[CASES.index((receiver, position, freeze)) % 3 :: 3]:
        after = batch.score(two_passes(model, clean, *values, [node], receiver.split(","), position, freeze))
        assert float(found.per_prompt[k]) == pytest.approx(float(before - after), abs=2e-5), node
    torch.testing.assert_close(found.per_prompt.mean(1), found.scores)
    assert found.scores.abs().max() > 1e-4


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_direct_effect_is_the_heads_write_swapped_in_the_final_residual_stream(
    kind: str, make_tiny: Make, store: ActivationStore
) -> None:
    model = make_tiny(kind)
    batch = draw(model)
    found = path_patching(model, batch, store, freeze_mlps=True)
    assert found.per_prompt is not None
    last = model.hook_points[-1]
    for layer in range(model.config.n_layers):
        hook, out = block(layer, "attn.hook_z"), block(layer, "hook_mlp_out")
        norm = model.post_attention_norm(layer) or (lambda x: x)
        for i, (clean, corrupted) in enumerate(zip(batch.clean, batch.corrupted, strict=True)):
            a, b = (model.run(x[None], capture=[hook, out, last]) for x in (clean, corrupted))
            mine, theirs = (model.head_results(layer, run[hook][:, -1]) for run in (a, b))
            before = batch.select([i]).score(model.unembed(a[last][:, -1], clean[-1:]))

            def change(delta: torch.Tensor, a=a, before=before, i=i, end=clean[-1:]) -> float:  # type: ignore[no-untyped-def]
                return float(before - batch.select([i]).score(model.unembed(a[last][:, -1] + delta, end)))

            for h in range(model.config.n_heads):
                swapped = mine.clone()
                swapped[:, h] = theirs[:, h]
                with torch.no_grad():
                    delta = norm(swapped.sum(1)) - norm(mine.sum(1))
                k = found.nodes.index(f"a{layer}.h{h}")
                assert float(found.per_prompt[k, i]) == pytest.approx(change(delta), abs=2e-5)
            k = found.nodes.index(f"m{layer}")
            assert float(found.per_prompt[k, i]) == pytest.approx(change((b[out] - a[out])[:, -1]), abs=2e-5)


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("freeze", [False, True])
def test_everything_as_one_sender_is_the_corrupted_run(
    kind: str, freeze: bool, make_tiny: Make, store: ActivationStore
) -> None:
    model = make_tiny(kind)
    batch = draw(model, "greater_than")
    everything = (INPUT, *nodes(model.config))
    found = path_metrics(model, batch, store, [everything, ()], [LOGITS], freeze_mlps=freeze)
    torch.testing.assert_close(found.patched[0], found.corrupted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.patched[1], found.clean, rtol=1e-4, atol=1e-5)
    assert (found.clean - found.corrupted).abs().max() > 5e-5  # beyond the tolerance above


def test_all_inputs_corrupted_for_every_reader_is_the_corrupted_run_of_what_follows(
    tiny: LanguageModel, store: ActivationStore
) -> None:
    """Every head and MLP of the last layer reads the corrupted stream: but what went past them is clean."""
    batch = draw(tiny, n=1)
    readers = [f"a2.h{h}<{port}>" for port in "qkv" for h in range(4)] + ["m2"]
    found = path_metrics(tiny, batch, store, [(INPUT, *nodes(tiny.config))], readers)
    writes = [block(2, "attn.hook_z"), block(2, "hook_mlp_out")]
    source = tiny.run(batch.corrupted[0][None], capture=writes)
    logits = tiny.run(batch.clean[0][None], edit={hook: resample(source[hook]) for hook in writes}).logits
    assert logits is not None
    torch.testing.assert_close(found.patched[0], batch.score(logits[:, -1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_senders_are_the_sources_of_the_graphs_edges(kind: str, make_tiny: Make) -> None:
    config = make_tiny(kind).config
    graph = Graph.of(config)
    edges = {(graph.sources[s], graph.destinations[d]) for s, d in graph.edges.tolist()}
    for receiver in graph.destinations:
        expected = {node for node in nodes(config) if (node, receiver) in edges}
        assert {node for node in nodes(config) if precedes(node, receiver, config)} == expected


@pytest.mark.parametrize("receiver", ["logits", "a1.h0<q>,a2.h3<k>"])
def test_batching_changes_nothing(
    receiver: str, tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = draw(tiny, n=3)
    together = path_patching(tiny, batch, store, receiver=receiver)
    monkeypatch.setattr("circuits.path_patching.TOKENS_PER_PASS", 1)
    monkeypatch.setattr("circuits.path_patching.PROMPTS_AT_ONCE", 1)
    found = path_patching(tiny, batch, store, receiver=receiver)
    torch.testing.assert_close(found.scores, together.scores, rtol=1e-3, atol=1e-6)


def test_one_pass_per_layer_serves_all_senders_to_the_logits(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny)
    path_patching(tiny, batch, store)
    before = tiny.forward_passes
    path_patching(tiny, batch, store)
    assert tiny.forward_passes - before == len(batch.buckets()) * tiny.config.n_layers


def test_a_head_that_writes_nothing_has_no_path(make_tiny: Make, store: ActivationStore) -> None:
    model = make_tiny(seed=3)
    model.out_weight(0)[2].zero_()
    for receiver in ("logits", "a1.h0<q>,a2.h0<v>"):
        effects = path_patching(model, draw(model), store, receiver=receiver).heads()
        assert abs(effects["a0.h2"]) < 1e-6
        assert abs(effects["a0.h1"]) > 1e-6


@pytest.mark.parametrize(
    ("receiver", "message"),
    [
        ("a9.h0<q>", "no receiver is called 'a9.h0<q>'; did you mean"),
        ("a1.h0", "did you mean 'a1.h0<"),
        ("", "no receiver is named"),
        ("logits,a1.h0<q>", "paths to logits include all others"),
        ("a0.h0<q>", "no head or MLP comes before a0.h0<q>"),
    ],
)
def test_receivers_that_cannot_be_are_a_sentence(
    receiver: str, message: str, tiny: LanguageModel, store: ActivationStore
) -> None:
    with pytest.raises(UserError, match=message):
        path_patching(tiny, draw(tiny), store, receiver=receiver)


def test_unknown_nodes_are_a_sentence(tiny: LanguageModel, store: ActivationStore) -> None:
    with pytest.raises(UserError, match=r"no head of this model is called 'a7\.h0'"):
        read_heads("a7.h0", tiny.config)
    with pytest.raises(UserError, match="no node of tiny-llama is called 'm9'"):
        path_metrics(tiny, draw(tiny), store, [["m9"]], read_receivers("logits", tiny.config))
