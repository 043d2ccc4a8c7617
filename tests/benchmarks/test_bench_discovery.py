"""Speed of circuit discovery on smollm2-135m with two threads, and the memory of a long prompt.

Predictions, written before the first measurement:

- EAP-IG against the same maths in TransformerLens, written as its users write it (split query, key and value inputs,
  a tensor of all differences, one product per destination in backward hooks): 4 to 8 times faster. Splitting the inputs
  of 9 heads into 27 residual streams costs about 3 forward passes each way, and products of gradients and differences
  are made at every step there, once per batch here.
- Discrete codes of 270 heads on 500 prompts (250 pairs), activations stored: under 10 s for one SAE.
- Peak memory of EAP-IG at 2,048 tokens: under 6 GB, of which one block's graph is less than 1 GB; the goal is only
  that it is bounded, by (hooks of all layers + one block's graph + 0.5 GB for products).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits.attribution import eap, eap_ig
from circuits.graph import Graph
from saes.codes import sae_codes
from tests.benchmarks import harness, peers
from workbench import registry
from workbench.activations import ActivationStore
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample

STEPS = 5
VERSIONS = ("transformer-lens",)


def transformer_lens_eap_ig(hooked: Any, graph: Graph, batch: Batch, steps: int) -> Tensor:
    """EAP-IG (inputs) in TransformerLens, as Hanna et al. describe it: [edge], summed over prompts of one length."""
    clean, corrupted = torch.stack(batch.clean), torch.stack(batch.corrupted)
    c, n_sources = hooked.cfg, len(graph.sources)
    difference = torch.zeros(*clean.shape, n_sources, c.d_model)
    scores = torch.zeros(n_sources, len(graph.destinations))
    source = {name: i for i, name in enumerate(graph.sources)}
    destination = {name: i for i, name in enumerate(graph.destinations)}

    def wrote(at: slice | int, sign: int) -> Any:
        def hook(x: Tensor, hook: Any) -> None:
            difference[:, :, at] += sign * x.detach()

        return hook

    def read(before: int, at: slice | int) -> Any:
        def hook(grad: Tensor, hook: Any) -> None:
            dims = "bpsm,bpdm->sd" if grad.ndim == 4 else "bpsm,bpm->s"
            scores[:before, at] += torch.einsum(dims, difference[:, :, :before], grad)

        return hook

    forward: dict[int, list] = {1: [], -1: []}
    backward = []
    for sign in forward:
        forward[sign].append(("hook_embed", wrote(0, sign)))
        for layer in range(c.n_layers):
            first = source[f"a{layer}.h0"]
            forward[sign].append((f"blocks.{layer}.attn.hook_result", wrote(slice(first, first + c.n_heads), sign)))
            forward[sign].append((f"blocks.{layer}.hook_mlp_out", wrote(source[f"m{layer}"], sign)))
    for layer in range(c.n_layers):
        first = source[f"a{layer}.h0"]
        for port in "qkv":
            column = destination[f"a{layer}.h0<{port}>"]
            backward.append((f"blocks.{layer}.hook_{port}_input", read(first, slice(column, column + c.n_heads))))
        backward.append((f"blocks.{layer}.hook_mlp_in", read(first + c.n_heads, destination[f"m{layer}"])))
    backward.append((f"blocks.{c.n_layers - 1}.hook_resid_post", read(n_sources, destination["logits"])))

    embeds: dict[str, Tensor] = {}
    for sign, tokens in ((1, clean), (-1, corrupted)):
        keep = ("hook_embed", lambda x, hook, sign=sign: embeds.__setitem__(str(sign), x.detach().clone()))
        with torch.no_grad(), hooked.hooks(fwd_hooks=[*forward[sign], keep]):
            hooked(clean if sign == 1 else tokens)
    for step in range(1, steps + 1):
        between = torch.lerp(embeds["-1"], embeds["1"], step / steps)
        start = ("hook_embed", lambda x, hook, between=between: between.clone().requires_grad_())
        with hooked.hooks(fwd_hooks=[start], bwd_hooks=backward):
            logits = hooked(clean)
            batch.score(logits[:, -1]).sum().backward()
    return graph.flat(scores) / steps


@pytest.mark.slow
def test_eap_ig_against_transformer_lens(smollm: LanguageModel, tmp_path: Path) -> None:
    torch.set_num_threads(harness.THREADS)
    graph = Graph.of(smollm.config)
    batch = sample(registry.get_task("ioi"), smollm, 64, seed=0)
    batch = batch.select(batch.buckets()[0][: harness.size(16, 4)].tolist())
    hooked = peers.hooked_transformer(smollm)
    hooked.requires_grad_(False)
    hooked.set_use_attn_result(True)
    hooked.set_use_split_qkv_input(True)
    hooked.set_use_hook_mlp_in(True)
    hooked.set_ungroup_grouped_query_attention(True)
    expected = transformer_lens_eap_ig(hooked, graph, batch, STEPS) / len(batch)
    differences = {}

    def check(name: str, value: Tensor) -> None:
        differences[name] = float((value - expected).abs().max() / expected.abs().max())
        assert differences[name] < 1e-3, differences

    folders = iter(range(100))
    sides = {
        "ours, nothing stored": harness.Side(
            lambda store: eap_ig(smollm, batch, store, steps=STEPS).scores,
            setup=lambda: ActivationStore(tmp_path / str(next(folders))),
        ),
        "TransformerLens": lambda: transformer_lens_eap_ig(hooked, graph, batch, STEPS) / len(batch),
    }
    timings = harness.interleave(sides, rounds=harness.size(5, 1), check=check)
    harness.record(
        "eap-ig",
        {
            "model": smollm.name,
            "prompts": len(batch),
            "tokens": len(batch.clean[0]),
            "steps": STEPS,
            "edges": len(graph),
            "largest difference": differences,
            "timings": timings,
            "TransformerLens to ours": harness.ratio(timings, "TransformerLens", "ours, nothing stored", at_least=3),
        },
        VERSIONS,
    )


@pytest.mark.slow
def test_codes_of_all_heads_on_500_prompts(smollm: LanguageModel, tmp_path: Path) -> None:
    torch.set_num_threads(harness.THREADS)
    batch = sample(registry.get_task("ioi"), smollm, harness.size(250, 20), seed=0)
    store = ActivationStore(tmp_path / "s")
    sae_codes(smollm, batch, store, trials=1, steps=1)  # stores what it needs
    timings = harness.interleave(
        {
            "one SAE, fixed": lambda: sae_codes(smollm, batch, store, trials=1),
            "one SAE, paper": lambda: sae_codes(smollm, batch, store, trials=1, mode="paper"),
            "untrained": lambda: sae_codes(smollm, batch, store, trials=1, steps=0),
        },
        rounds=harness.size(3, 1),
    )
    seconds = {name: timings[name]["wall"]["median"] for name in timings}
    harness.record(
        "codes",
        {
            "model": smollm.name,
            "heads": 270,
            "prompts": 2 * len(batch),
            "timings": timings,
            "seconds": {name: harness.judge(value, at_most=10) for name, value in seconds.items()},
        },
    )


@pytest.mark.slow
def test_memory_of_a_long_prompt(smollm: LanguageModel, tmp_path: Path) -> None:
    """2,048 tokens of one prompt and its corruption, as a language model reads them."""
    torch.set_num_threads(harness.THREADS)
    short = sample(registry.get_task("ioi"), smollm, 1, seed=0)
    length = harness.size(2048, 256)
    generator = torch.Generator().manual_seed(0)
    filler = torch.randint(smollm.config.d_vocab, (length - len(short.clean[0]),), generator=generator)
    long = Batch(
        short.task, short.prompts, (torch.cat([filler, short.clean[0]]),),
        (torch.cat([filler, short.corrupted[0]]),), short.answers, short.wrong, 1,
    )  # fmt: skip
    early = long.corrupted[0].clone()
    early[1] = (early[1] + 1) % smollm.config.d_vocab  # so that every position after it differs
    long = Batch(long.task, long.prompts, long.clean, (early,), long.answers, long.wrong, 1)
    store = ActivationStore(tmp_path / "s")
    store.fill(smollm, [*long.clean, *long.corrupted], [h for h in smollm.hook_points if h.endswith(("z", "mlp_out"))])
    figures = {}
    for name, run in {
        "eap": lambda: eap(smollm, long, store),
        "eap-ig, 5 steps": lambda: eap_ig(smollm, long, store, steps=STEPS),
    }.items():
        with harness.peak_growth() as grown:
            run()
        figures[name] = grown["mb"]
    c = smollm.config
    reads = 4 * length * c.n_layers * (3 * c.n_heads * c.d_head + 2 * c.d_model)
    harness.record(
        "eap-ig-memory",
        {
            "model": smollm.name,
            "tokens": length,
            "megabytes": figures,
            "of which values and gradients at all hook points": round(reads / 1e6),
        },
    )
