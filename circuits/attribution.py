"""Attribution: the effect of every node and edge at once, from gradients instead of one run each.

First order, the effect of replacing what source u writes is its difference times the gradient of the metric m where
destination v reads it (attribution patching, Nanda 2023; EAP, Syed et al. 2023, eq. 2):

    score(u -> v) = (clean_u - ablated_u) . dm/d(input of v)       score(u) = (clean_u - ablated_u) . dm/d(output of u)

summed over positions: the estimated m(clean) - m(clean with the edge or node ablated), so positive means it helps.
EAP-IG (Hanna et al. 2024, eq. 3) averages the gradient over runs whose input embeddings lie between the corrupted and
the clean prompt's, which repairs gradients that vanish where the model is sure of itself.

How it is computed. What a head reads passes through a norm and its own W_Q, W_K or W_V, so the gradient at a
destination is that at `hook_q`, `hook_k` or `hook_v` mapped back: with x^ the normed input without gain, s the norm's
scale and W' the weights times the gain, it is s (W'^T g - x^ (x^ . W'^T g) / d_model), all heads in one matrix product;
inputs are never split. Products of gradients and differences are summed in two matrix products per layer, after all
interpolation steps of a batch. Long prompts go backwards one block at a time, with the block recomputed, so that no
more than one block's graph is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph import PORTS, EdgeScores, Graph, nodes_of
from circuits.writes import Ablation, Writes
from workbench import norms, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel, Resume
from workbench.passes import Edit
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis
from workbench.scores import NodeScores

TOKENS_PER_PASS = 1024
BLOCKWISE_TOKENS = 1024  # more tokens than this in one pass (a long prompt): backwards one block at a time
Rule = Literal["right", "midpoint", "left"]


@analysis("attribution-patching", version=1, n=32)
def attribution_patching(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    steps: int = 1,
    rule: Rule = "right",
    ablation: Ablation = "resample",
) -> NodeScores:
    """Estimated effect of every head and MLP from one backward pass, or several between corrupted and clean inputs.

    steps     interpolation points; 1 with rule=right is plain attribution patching, more is node attribution by IG
    rule      where in each step the gradient is taken; right includes the clean prompt and not the corrupted one
    ablation  what replaces a node: resample (corrupted prompt), mean (over corrupted prompts), zero
    """
    per_prompt = torch.zeros(model.config.n_layers * (model.config.n_heads + 1), len(batch))
    for at, run in _runs(model, batch, store, steps, rule, ablation, "attribution-patching"):
        per_prompt[:, at] += run.node_scores().cpu()
    return NodeScores(
        nodes_of(model.config.n_layers, model.config.n_heads),
        per_prompt.mean(1),
        f"estimated {batch.task.metric}(clean) - {batch.task.metric}(node ablated: {ablation}): difference of outputs "
        f"times gradient, {_points(steps, rule)}, summed over positions, mean over prompts; positive: the node helps",
        batch.task.metric,
        per_prompt=per_prompt,
        headline={"prompts": len(batch), "steps": steps, "ablation": ablation},
    )


@analysis("eap", version=1, n=32)
def eap(model: LanguageModel, batch: Batch, store: ActivationStore, *, ablation: Ablation = "resample") -> EdgeScores:
    """Edge attribution patching: every edge's estimated effect from one backward pass.

    ablation  what an edge carries when it is cut: resample (corrupted prompt), mean (over corrupted prompts), zero
    """
    return edge_attribution(model, batch, store, 1, "right", ablation)


@analysis("eap-ig", version=1, n=32)
def eap_ig(
    model: LanguageModel, batch: Batch, store: ActivationStore, *, steps: int = 5, rule: Rule = "right"
) -> EdgeScores:
    """Edge attribution with gradients averaged between the corrupted and the clean prompt's embeddings.

    steps  interpolation points
    rule   where in each step the gradient is taken: right (the paper: clean included, corrupted not), midpoint, left
    """
    return edge_attribution(model, batch, store, steps, rule, "resample")


def edge_attribution(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    steps: int,
    rule: Rule,
    ablation: Ablation,
    *,
    relevance: bool = False,
) -> EdgeScores:
    """EAP (one step), EAP-IG, and RelP (with `relevance`).

    Raises UserError for steps < 1, and for interpolation without a corrupted prompt.
    """
    graph = Graph.of(model.config)
    total = torch.zeros(len(graph.sources), len(graph.destinations), dtype=torch.float64)
    name = "RelP" if relevance else "EAP" if steps == 1 else "EAP-IG (inputs)"
    for _, run in _runs(model, batch, store, steps, rule, ablation, name, relevance):
        total += run.edge_scores(graph).cpu()
    return EdgeScores(
        graph,
        (graph.flat(total) / len(batch)).float(),
        f"{name}: estimated {batch.task.metric}(clean) - {batch.task.metric}(edge ablated: {ablation}), "
        f"{_points(steps, rule)}, summed over positions, mean over prompts; positive: the edge helps",
        batch.task.metric,
        headline={"prompts": len(batch), "steps": steps, "ablation": ablation},
    )


def _points(steps: int, rule: Rule) -> str:
    return "gradient of the clean run" if steps == 1 and rule == "right" else f"{steps} {rule} points between inputs"


def alphas(steps: int, rule: Rule) -> list[float]:
    """Where between the corrupted (0) and the clean (1) embeddings the gradient is taken."""
    offset = {"right": 1.0, "midpoint": 0.5, "left": 0.0}[rule]
    return [(k + offset) / steps for k in range(steps)]


def _runs(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    steps: int,
    rule: Rule,
    ablation: Ablation,
    name: str,
    relevance: bool = False,
) -> Iterator[tuple[Tensor, _Run]]:
    """Forward and backward passes that cover the batch and all steps, with the prompts that each is about."""
    if steps < 1:
        raise UserError(f"steps={steps} gives no gradient; ask for at least 1.")
    points = alphas(steps, rule)
    if points != [1.0] and ablation != "resample":
        raise UserError(f"between which inputs to interpolate is not defined for ablation={ablation!r}; use resample.")
    with track(total=len(batch) * steps, desc=name) as bar:
        for bucket in batch.buckets():
            length = len(batch.clean[int(bucket[0])])
            at_once = max(1, TOKENS_PER_PASS // length)  # sequences in one pass
            together = min(steps, at_once)
            for part in bucket.split(max(1, at_once // together)):
                some = batch.select(part.tolist())
                writes = Writes(model, store, some, batch, ablation)
                for start in range(0, steps, together):
                    now = points[start : start + together]
                    yield part, _Run(model, some, writes, now, 1 / steps, relevance)
                    bar.update(len(part) * len(now))


# ---- one forward and backward pass ----


class Grads(NamedTuple):
    """Values and gradients of one pass, by hook point; `last` is the residual stream before the final norm."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor]


@dataclass
class _Run:
    """Gradients at some points between corrupted and clean embeddings; copies of the prompts are [point * batch]."""

    model: LanguageModel
    batch: Batch
    writes: Writes
    points: Sequence[float]
    weight: float
    relevance: bool = False

    def _gradients(self, hooks: Sequence[str]) -> Grads:
        first, base = self.writes.clean[self.writes.start], self.writes.ablated[self.writes.start]
        if list(self.points) == [1.0]:
            start = first
        else:
            between = torch.tensor(self.points, device=first.device, dtype=first.dtype)[:, None, None, None]
            start = (base + between * (first - base)).flatten(0, 1)
        tokens = torch.stack(self.batch.clean).repeat(len(self.points), 1)
        metric = summed(self.batch, len(self.points), self.weight)
        return gradients(self.model, tokens, Resume(0, start), metric, hooks, relevance=self.relevance)

    def node_scores(self) -> Float[Tensor, "node batch"]:
        """Per prompt, heads and MLP by layer."""
        writes, c = self.writes, self.model.config
        found = self._gradients([*writes.z_hooks, *writes.mlp_hooks])
        out = []
        for z, mlp in zip(writes.z_hooks, writes.mlp_hooks, strict=True):
            for hook in (z, mlp):
                slope = found.grads[hook].unflatten(0, (len(self.points), -1)).sum(0)
                effect = slope * (writes.clean[hook] - writes.ablated[hook])
                out.append(effect.sum((1, 3)).T if hook == z else effect.sum((1, 2))[None])
        assert sum(len(rows) for rows in out) == c.n_layers * (c.n_heads + 1)
        return torch.cat(out)

    def edge_scores(self, graph: Graph) -> Float[Tensor, "source destination"]:
        """Summed over prompts."""
        found = self._gradients(read_hooks(self.model))
        return products(self.model, graph, found, self.writes, len(self.points), exact_norm=not self.relevance)


def summed(batch: Batch, n: int, weight: float) -> Callable[[Float[Tensor, "copy vocab"]], Tensor]:
    """The metric, summed over prompts and over n copies of them, times a weight."""
    return lambda logits: torch.stack([batch.score(rows).sum() for rows in logits.unflatten(0, (n, -1))]).sum() * weight


def read_hooks(model: LanguageModel, layer: int = 0) -> list[str]:
    """Where destinations read, from a layer on: queries, keys, values and MLP inputs, and the last residual stream."""
    names = (*(f"attn.hook_{port}" for port in PORTS), "hook_mlp_in")
    hooks = [sites.block(at, name) for at in range(layer, model.config.n_layers) for name in names]
    return [*hooks, model.hook_points[-1]]


def products(
    model: LanguageModel,
    graph: Graph,
    found: Grads,
    writes: Writes,
    points: int,
    rows: slice = slice(None),
    exact_norm: bool = True,
) -> Float[Tensor, "source destination"]:
    """Differences of the sources in `rows` times gradients at the destinations, summed over points and prompts.

    Destinations whose gradients are not in `found` are left 0. exact_norm: norms depend on what they read; otherwise
    their scale is a constant.
    """
    c = model.config
    first, stop, _ = rows.indices(len(graph.sources))
    out = torch.zeros(stop - first, len(graph.destinations), dtype=torch.float64, device=model.device)
    heads = {
        layer: _Pullback(model, found, layer, points, exact_norm)
        for layer in range(c.n_layers)
        if sites.block(layer, "attn.hook_q") in found.grads
    }

    def slope(hook: str, at: slice) -> Tensor:
        grads: Tensor = found.grads[hook].unflatten(0, (points, -1)).sum(0)
        return grads[:, at]

    for at in writes.chunks():
        delta = writes.differences(at)[rows].flatten(1)  # [source, batch * pos * d_model]
        column, before = 0, 1  # the next destination; how many sources it can read
        for layer in range(c.n_layers):
            n = max(0, min(before, stop) - first)
            if n and layer in heads:
                into = heads[layer].at(at).flatten(1)
                out[:n, column : column + len(into)] += delta[:n] @ into.T
            column += 3 * c.n_heads
            n = max(0, min(before + (0 if c.parallel_attn_mlp else c.n_heads), stop) - first)
            hook = sites.block(layer, "hook_mlp_in")
            if n and hook in found.grads:
                out[:n, column] += delta[:n] @ slope(hook, at).flatten()
            column += 1
            before += c.n_heads + 1
        out[:, column] += delta @ slope(model.hook_points[-1], at).flatten()
    return out


class _Pullback:
    """Gradients at the inputs of one layer's heads, before the norm: [3 * head, batch, pos, d_model]."""

    def __init__(self, model: LanguageModel, found: Grads, layer: int, points: int, exact_norm: bool):
        x = found.values[sites.block(layer, "hook_resid_pre")]
        norm = norms.measure(model.attention_norm(layer), x)
        scale = norm.scale(x)
        weight, _ = model.in_weights(layer)
        self.weight = (weight * norm.gain).flatten(0, 1)  # [3 * head, d_head, d_model]
        normed = norm.flat(x) * scale
        self.exact = exact_norm
        slopes = [found.grads[sites.block(layer, f"attn.hook_{port}")] for port in PORTS]
        slope = torch.stack(slopes, 2).flatten(2, 3) * scale[..., None]  # [copy, pos, 3 * head, d_head]
        inside = torch.einsum("cpm,hdm->cphd", normed, self.weight)
        along = (slope * inside).sum(-1) / x.shape[-1]
        self.slope, self.along, self.normed = (t.unflatten(0, (points, -1)) for t in (slope, along, normed))
        self.mean = (slope * self.weight.mean(-1)).sum(-1).unflatten(0, (points, -1)) if norm.centres else None

    def at(self, at: slice) -> Float[Tensor, "destination batch pos d_model"]:
        """Summed over interpolation points, at some positions."""
        slope = self.slope[:, :, at].sum(0)
        shape = slope.shape[:2]
        out: Tensor = torch.bmm(slope.flatten(0, 1).movedim(1, 0), self.weight).unflatten(1, shape)
        if self.exact:
            out -= torch.einsum("kbph,kbpm->hbpm", self.along[:, :, at], self.normed[:, :, at])
        if self.mean is not None:
            out -= self.mean[:, :, at].sum(0).movedim(-1, 0)[..., None]
        return out


# ---- gradients, with bounded memory ----


def gradients(
    model: LanguageModel,
    tokens: Tensor,
    start: Resume,
    metric: Callable[[Float[Tensor, "copy vocab"]], Tensor],
    hooks: Sequence[str],
    *,
    edit: Mapping[str, Edit] | None = None,
    relevance: bool = False,
) -> Grads:
    """Gradients of a metric of the last position's logits at hook points, and the residual stream entering each block.

    start      the block to begin at, and the residual stream that enters it
    edit       changes on the way, as in `LanguageModel.run`
    relevance  by the rules of relevance propagation instead of plain gradients

    Up to BLOCKWISE_TOKENS tokens one graph holds the whole pass. Beyond, the pass runs without a graph and each block
    is recomputed on the way back: memory for the graph of one block, for a third more time.
    """
    layers = range(start.layer, model.config.n_layers)
    pres = [sites.block(layer, "hook_resid_pre") for layer in layers]
    last = model.hook_points[-1]
    edits: dict[str | sites.Site, Edit] = {hook: fn for hook, fn in (edit or {}).items()}
    options: dict[str, Any] = {"grad": True, "ungroup": True, "relevance": relevance, "edit": edits}
    if tokens.numel() <= BLOCKWISE_TOKENS:
        wanted = list(dict.fromkeys([*hooks, *pres, last]))
        leaf = Resume(start.layer, start.resid.detach().requires_grad_())
        out = model.run(tokens, capture=wanted, logits="last", start=leaf, **options)
        assert out.logits is not None
        slopes = torch.autograd.grad(metric(out.logits[:, -1]), [out[hook] for hook in hooks])
        return Grads({hook: out[hook].detach() for hook in wanted}, dict(zip(hooks, slopes, strict=True)))
    forward = model.run(tokens, capture=[*pres, last], logits="none", start=start, edit=edits, ungroup=True)
    values = {hook: forward[hook].detach() for hook in (*pres, last)}
    end = values[last][:, -1:].clone().requires_grad_()
    logits = model.unembed(end, tokens[:, -1:], grad=True, relevance=relevance)
    (slope,) = torch.autograd.grad(metric(logits[:, -1]), end)
    arriving = torch.zeros_like(values[last])
    arriving[:, -1:] = slope
    found = {last: arriving} if last in hooks else {}
    for layer, pre in zip(reversed(layers), reversed(pres), strict=True):
        inside = [hook for hook in hooks if sites.split(hook)[0] == layer and hook != last]
        here = {hook: fn for hook, fn in (edit or {}).items() if sites.split(hook)[0] == layer}
        leaf = Resume(layer, values[pre].clone().requires_grad_())
        post = sites.block(layer, "hook_resid_post")
        again = model.run(tokens, capture=[*inside, post], stop_after=post, start=leaf, **(options | {"edit": here}))
        slopes = torch.autograd.grad(
            again[post], [leaf.resid, *(again[hook] for hook in inside)], arriving, allow_unused=True
        )
        arriving = slopes[0]
        found |= dict(zip(inside, slopes[1:], strict=True))
    return Grads(values, found)
