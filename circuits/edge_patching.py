"""Exact patching of edges: cut one edge, keep all others, and look at the metric.

The causal truth for edge attributions (Goldowsky-Dill et al. 2023; ACDC's first step). One edge u -> v is cut by giving
v alone its input with u's write replaced by the ablated one; everything after v is recomputed, and sees v's new output.

A cut in layer L changes nothing below L, so a run starts at block L from the stored residual stream, leaves out the
positions before the prompts differ, and shares one batch with other cuts of that layer. Edges into `logits` need no run
of the model at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.attribution import eap_ig
from circuits.graph import LOGITS, PORTS, EdgeScores, Graph
from circuits.writes import Ablation, Writes, copies, stored_past
from workbench import sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel, Resume
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis

TOKENS_PER_PASS = 2048
PROMPTS_AT_ONCE = 16  # bounds memory: what all sources write on this many prompts is held at a time


@analysis("edge-patching", version=1, n=8)
def edge_patching(
    model: LanguageModel, batch: Batch, store: ActivationStore, *, edges: int = 0, ablation: Ablation = "resample"
) -> EdgeScores:
    """Exact effect of cutting each edge alone: one run per edge and prompt, from its layer on.

    edges     patch only this many, those of largest EAP-IG score, and give the others 0; 0 patches all
    ablation  what a cut edge carries: resample (corrupted prompt), mean (over corrupted prompts), zero
    """
    if edges < 0:
        raise UserError(f"edges={edges} is negative; 0 patches all of them.")
    graph = Graph.of(model.config)
    chosen = torch.ones(len(graph), dtype=torch.bool)
    if 0 < edges < len(graph):
        chosen = torch.zeros(len(graph), dtype=torch.bool)
        chosen[eap_ig(model, batch, store).scores.abs().topk(edges).indices] = True
    effect = exact(model, batch, store, chosen, ablation)
    unit = batch.task.metric
    which = "" if bool(chosen.all()) else f"; only the {edges} edges of largest EAP-IG score are patched, others are 0"
    return EdgeScores(
        graph,
        effect.mean(0),
        f"{unit}(clean) - {unit}(clean run with the edge ablated: {ablation}), all positions, mean over prompts; "
        f"positive: the edge helps{which}",
        unit,
        per_prompt=effect,
        headline={"prompts": len(batch), "edges_patched": int(chosen.sum()), "ablation": ablation},
    )


def exact(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    chosen: Bool[Tensor, " edge"],
    ablation: Ablation = "resample",
) -> Float[Tensor, "batch edge"]:
    """metric(clean) - metric(edge cut) for the chosen edges; 0 for the others."""
    graph = Graph.of(model.config)
    out = torch.zeros(len(batch), len(graph))
    parts = list(batch.parts(PROMPTS_AT_ONCE))
    with track(total=len(parts) * int(chosen.sum()), desc="edge-patching") as bar:
        for part, some in parts:
            cuts = _Cuts(model, store, some, batch, graph, ablation)
            before = some.score(cuts.unpatched())
            for wanted in cuts.passes(chosen):
                logits = cuts.run(wanted)
                effect = torch.stack([before - some.score(rows.cpu()) for rows in logits], 1)
                out[part[:, None], torch.tensor(wanted)] = effect
                bar.update(len(wanted))
    return out


class _Cuts:
    """Every run of some prompts of one length with one edge cut."""

    def __init__(
        self,
        model: LanguageModel,
        store: ActivationStore,
        batch: Batch,
        whole: Batch,
        graph: Graph,
        ablation: Ablation,
    ):
        self.model, self.graph = model, graph
        self.tokens = torch.stack(batch.clean)
        writes = Writes(model, store, batch, whole, ablation)
        at = slice(writes.prefix, None)
        self.delta = writes.differences(at)  # [source, batch, pos, d_model]
        self.past = stored_past(model, store, batch.clean, writes.prefix)
        layers = range(model.config.n_layers)
        self.pres = [sites.block(layer, "hook_resid_pre") for layer in layers]
        found = store.get(model, list(batch.clean), [*self.pres, model.hook_points[-1]])
        stacked = {hook: torch.stack(rows).to(model.device, model.dtype) for hook, rows in found.items()}
        self.resid = {hook: rows[:, at] for hook, rows in stacked.items()}
        self.last = stacked[model.hook_points[-1]][:, -1]

    def unpatched(self) -> Float[Tensor, "batch vocab"]:
        return self.model.unembed(self.last, self.tokens[:, -1]).cpu()

    def passes(self, chosen: Bool[Tensor, " edge"]) -> list[list[int]]:
        """Edges that are cut in one pass, each in a copy of its own: of one layer, as many as fit."""
        per_layer = 3 * self.model.config.n_heads + 1
        groups: dict[int, list[int]] = {}
        for edge in chosen.nonzero()[:, 0].tolist():
            groups.setdefault(int(self.graph.edges[edge, 1]) // per_layer, []).append(edge)
        n_prompts, n_positions = self.delta.shape[1:3]
        size = max(1, TOKENS_PER_PASS // (n_prompts * n_positions))
        return [edges[i : i + size] for edges in groups.values() for i in range(0, len(edges), size)]

    def run(self, edges: Sequence[int]) -> Float[Tensor, "edge batch vocab"]:
        """Logits at the last position, for edges into one layer."""
        c = self.model.config
        sources, destinations = self.graph.edges[list(edges)].T.tolist()
        if self.graph.destinations[destinations[0]] == LOGITS:
            return self.model.unembed(self.last - self.delta[sources][:, :, -1], self.tokens[:, -1])
        layer, n = destinations[0] // (3 * c.n_heads + 1), len(edges)
        columns = [d % (3 * c.n_heads + 1) for d in destinations]
        ports: dict[int, list[tuple[int, int, int]]] = {}  # port -> (copy, source, head); 3 is the MLP
        for copy, (source, column) in enumerate(zip(sources, columns, strict=True)):
            ports.setdefault(column // c.n_heads if column < 3 * c.n_heads else 3, []).append(
                (copy, source, column % c.n_heads)
            )
        edit: dict[str | sites.Site, Callable[[Tensor], Tensor]] = {}
        for port, cuts in ports.items():
            name = "hook_mlp_in" if port == 3 else f"attn.hook_{PORTS[port]}"
            change = self._mlp if port == 3 else partial(self._head, layer, port)
            edit[sites.block(layer, name)] = partial(change, n, torch.tensor(cuts))
        start = Resume(layer, self.resid[self.pres[layer]].repeat(n, 1, 1), copies(self.past, n, layer))
        out = self.model.run(self.tokens.repeat(n, 1), edit=edit, logits="last", start=start, ungroup=True).logits
        assert out is not None
        logits: Tensor = out[:, -1].unflatten(0, (n, -1))
        return logits

    def _head(self, layer: int, port: int, n: int, cuts: Tensor, x: Tensor) -> Tensor:
        """Queries, keys or values, in each copy those of one head from an input of its own."""
        weight, bias = self.model.in_weights(layer)
        copy, source, head = cuts.T
        mixed = self.resid[self.pres[layer]] - self.delta[source]
        normed = self.model.attention_norm(layer)(mixed)
        rows = torch.einsum("nbpm,ndm->nbpd", normed, weight[port, head]) + bias[port, head][:, None, None]
        x = x.unflatten(0, (n, -1)).clone()
        x[copy, :, :, head] = rows.to(x.dtype)
        return x.flatten(0, 1)

    def _mlp(self, n: int, cuts: Tensor, x: Tensor) -> Tensor:
        copy, source, _ = cuts.T
        x = x.unflatten(0, (n, -1)).clone()
        x[copy] -= self.delta[source].to(x.dtype)
        return x.flatten(0, 1)
