"""Which cached tokens attention can lose: scores of keys and values, held to exact removal and to real eviction.

For a head let a be the attention of query q to key i, s the logit it comes from, v_i the value and o_q = sum_i a v_i
the output. Ways to lose the token, and how far each moves the output:

    value    v_i := 0    - a v_i                       exact
    key      k_i := 0    - a s (v_i - o_q)             to first order in the logit, which becomes 0
    joint    both        - a v_i - a s (v_i - o_q)     to first order
    exact    no token    a / (1 - a) (o_q - v_i)       the others' attention is made to sum to 1 again

A score is the squared length of that, summed over queries: the second-order loss of optimal brain damage, of a squared
error whose gradient is 0 at the model itself. So joint = value + key + 2 a^2 s v_i.(v_i - o_q). Beside them stands the
attention itself, summed over queries (heavy hitters). `exact` is the truth that the others are held to, taken after the
output projection. Eviction takes keys away, it does not make them 0: a key of zeros draws attention still, and the key
score depends on which logit is called 0, of which softmax knows nothing.

Keys and values that several query heads share (grouped queries) are one entry of the cache: its score is the sum over
the group (of `exact`, the squared length of the sum), and it is evicted for the whole group. Scores are summed over
queries before the last position, as a cache is pruned before the next query is known. Then the last position alone is
run again from the cache, with the keys of least score masked in all layers at once; how the prompt was read stays as it
was. Its own key and the `recent` ones before it are always kept. What is exact for one token is not for many: no score
knows what the others took away. A sink (weight-sparse models) goes on drawing its share, and belongs to what sums to 1.

After Gu et al. 2025, "OBCache: Optimal Brain KV Cache Pruning for Efficient Long-Context LLM Inference" (arXiv
2510.07651): the three scores as in the published code, derived here again. Optimal brain damage: LeCun et al. 1989;
heavy hitters: Zhang et al. 2023, "H2O" (arXiv 2306.14048); exact, of one head before the projection: Goel et al. 2025,
"CAOTE" (arXiv 2504.14051); scores by the last queries alone: Li et al. 2024, "SnapKV" (arXiv 2404.14469).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any, NamedTuple

import plotly.graph_objects as go
import scipy
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from plotly.subplots import make_subplots
from torch import Tensor

from workbench import canvas, metrics, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel, Resume
from workbench.passes import Edit
from workbench.plots import definition, figure
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis
from workbench.sites import Site

SCORES = ("value", "key", "joint", "attention", "exact")
SHARES = (0.25, 0.375, 0.5, 0.75)  # of cached tokens, besides the one asked for
TOKENS = 128  # of prompts whose attention, and whose caches with anything evicted, are in memory at once
NUMBERS = 2**23  # in memory at once while each token is removed by itself


@dataclass(frozen=True)
class KvSaliency:
    """
    agreement  Spearman correlation of each score with the exact one, over the cached tokens of a key-value head; mean
               over those heads and prompts
    ahead      the same with the exact one at the last position, which no score has seen
    shares     of cached tokens that were kept
    ways       the scores, and random eviction, averaged over draws
    error      squared error of a layer's attention output at the last position over its squared length, with tokens
               evicted in this layer alone; mean over layers and prompts
    kl         nats from the model's prediction to that with tokens evicted in all layers
    metric     the task's, of that prediction; whole: of the model's own
    keep       the share that the summary is about
    definition what was done
    """

    scores: tuple[str, ...]
    agreement: Float[Tensor, "score layer"]
    ahead: Float[Tensor, "score layer"]
    shares: tuple[float, ...]
    ways: tuple[str, ...]
    error: Float[Tensor, "way share"]
    kl: Float[Tensor, "way share prompt"]
    metric: Float[Tensor, "way share prompt"]
    whole: Float[Tensor, " prompt"]
    keep: float
    unit: str
    definition: str

    def summary(self) -> dict[str, Any]:
        at = self.shares.index(self.keep)

        def told(names: Sequence[str], values: Tensor) -> dict[str, float]:
            return {name: round(x, 4) for name, x in zip(names, values.tolist(), strict=True)}

        return {
            "share_kept": round(self.keep, 4),
            "kl_by_score": told(self.ways, self.kl[:, at].mean(-1)),
            "metric_by_score": told(self.ways, self.metric[:, at].mean(-1)),
            "whole_metric": round(float(self.whole.mean()), 4),
            "error_by_score": told(self.ways, self.error[:, at]),
            "agreement_by_score": told(self.scores, self.agreement.nanmean(1)),
            "ahead_by_score": told(self.scores, self.ahead.nanmean(1)),
            "unit": self.unit,
            "definition": self.definition,
        }


@analysis("kv-saliency", version=1, n=16)
def kv_saliency(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    seed: int,
    *,
    keep: float = 0.5,
    window: int | None = 8,
    recent: int = 2,
    first: int = 0,
    draws: int = 3,
) -> KvSaliency:
    """Score cached tokens by how far losing them moves attention's output; evict those of least score, and measure.

    keep    share of cached tokens kept, in the summary; the figure has others beside it
    window  how many queries before the last position are summed over; none: all, as heavy hitters are
    recent  tokens before the last position that are kept whatever their score, as published methods do
    first   tokens at the beginning that are kept whatever their score
    draws   random evictions, averaged, as a control

    Raises UserError for prompts of fewer than three tokens.
    """
    limits = {"window": (window, 1), "recent": (recent, 0), "first": (first, 0), "draws": (draws, 1)}
    for name, (value, least) in limits.items():
        if value is not None and value < least:
            raise UserError(f"{name}={value} is too few; ask for at least {least}.")
    if not 0 < keep < 1:
        raise UserError(f"keep={keep} is no share between 0 and 1; the default is 0.5.")
    if min(map(len, batch.clean)) < 3:
        raise UserError(f"a prompt of {batch.task.name} has fewer than 3 tokens, and none to evict; use another task.")
    shares, n_ways = tuple(sorted({*SHARES, keep})), len(SCORES) + draws
    generator = torch.Generator().manual_seed(seed)
    agreement, ahead, error = [], [], []
    kl, metric = (torch.empty(len(batch), 1 + n_ways * len(shares)) for _ in range(2))
    for index, some in track(list(batch.parts(tokens=TOKENS)), "prompts"):
        caches, masks = Caches.of(model, store, some.clean), []
        for i, at in itertools.product(range(len(some)), range(model.config.n_layers)):
            layer = caches.layer(model, at, i)
            scores, last = scores_of(layer, window)
            agreement.append(rank_agreement(scores, scores[-1:]))
            ahead.append(rank_agreement(scores, last[None]))
            every = torch.cat([scores, torch.rand(draws, *last.shape, generator=generator, dtype=torch.float64)])
            kept = torch.stack([largest(every, share, recent, first) for share in shares], 1).flatten(0, 1)
            error.append(output_error(layer, kept))
            masks.append(torch.cat([torch.ones_like(kept[:1]), kept]))  # the model itself, in the same pass
        logits = caches.last_logits(model, torch.stack(masks).unflatten(0, (len(some), -1)).transpose(0, 1))
        for i, prompt in enumerate(index.tolist()):
            kl[prompt] = metrics.kl(logits[i], logits[i, :1].expand_as(logits[i]))
            metric[prompt] = torch.cat([some.select([i]).score(row[None]) for row in logits[i]])

    def by_layer(found: list[Tensor]) -> Float[Tensor, "score layer"]:
        mean: Tensor = torch.stack(found).unflatten(0, (len(batch), -1)).nanmean((0, 3))  # over prompts and heads
        return mean.T.float()

    def by_way(x: Float[Tensor, "*any row"]) -> Float[Tensor, "way share *any"]:
        table = x.unflatten(-1, (n_ways, len(shares))).movedim((-2, -1), (0, 1))
        return torch.cat([table[: len(SCORES)], table[len(SCORES) :].mean(0, keepdim=True)]).float()

    return KvSaliency(
        SCORES,
        by_layer(agreement),
        by_layer(ahead),
        shares,
        (*SCORES, "random"),
        by_way(torch.stack(error)).mean(2),
        by_way(kl[:, 1:].clamp_min(0)),  # rounding falls below
        by_way(metric[:, 1:]),
        metric[:, 0],
        keep,
        batch.task.metric,
        f"scores summed over {'all' if window is None else f'the {window}'} queries before the last position, where "
        f"tokens are then evicted in all layers at once, for each key-value head by itself; always kept: the last "
        f"{recent} before it and the first {first}; random: mean of {draws} draws",
    )


# ---- one layer, one prompt ----


class Layer(NamedTuple):
    """Attention of one layer on one prompt, in float64.

    attention  of each query to each key; a sink's share is missing from the sums over keys
    rest       1 - attention, without the rounding of that difference
    logits     what attention is the softmax of; -inf where a query may not look
    """

    attention: Float[Tensor, "head query key"]
    rest: Float[Tensor, "head query key"]
    logits: Float[Tensor, "head query key"]
    values: Float[Tensor, "kv_head key d_head"]
    out: Float[Tensor, "head d_head d_model"]

    @classmethod
    def of(cls, logits: Tensor, pattern: Tensor, values: Tensor, out: Tensor, rounding: float = 1e-5) -> Layer:
        """`pattern` tells of a sink: what its sums lack of 1, where that is more than rounding."""
        total = pattern.double().sum(-1, keepdim=True)
        total = total.where(total < 1 - rounding, 1.0)
        attention = logits.double().softmax(-1) * total
        before = F.pad(attention.cumsum(-1)[..., :-1], (1, 0))
        after = F.pad(attention.flip(-1).cumsum(-1)[..., :-1], (1, 0)).flip(-1)
        return cls(attention, 1 - total + before + after, logits.double(), values.double(), out.double())


def scores_of(
    layer: Layer, window: int | None = None
) -> tuple[Float[Tensor, "score kv_head key"], Float[Tensor, "kv_head key"]]:
    """All scores of the cached tokens, those before the last position, by the queries before it; and the exact one of
    the last query.

    The first query is left out: it sees one key, and nothing is left without it.
    """
    end = layer.attention.shape[1] - 1
    start = max(1, end - (window or end))
    moved = torch.cat([first_order(layer, slice(start, end)), layer.attention[None, :, start:end]])
    summed = moved.sum(-2).unflatten(1, (len(layer.values), -1)).sum(2)[..., :-1]
    exact = removals(layer, slice(start, end + 1))
    return torch.cat([summed, exact[:, :-1].sum(1)[None]]), exact[:, -1]


def first_order(layer: Layer, queries: slice) -> Float[Tensor, "3 head query key"]:
    """Squared perturbation of each head's output where value, key or both are set to 0, to first order."""
    a = layer.attention[:, queries]
    s = layer.logits[:, queries].where(a > 0, 0.0)
    v = _to_heads(layer.values, len(a))
    o = a @ v
    vv, oo, ov = v.square().sum(-1)[:, None], o.square().sum(-1)[..., None], o @ v.mT
    value = a.square() * vv
    key = (a * s).square() * (vv + oo - 2 * ov).clamp_min(0)
    return torch.stack([value, key, value + key + 2 * a.square() * s * (vv - ov)])


def removals(layer: Layer, queries: slice) -> Float[Tensor, "kv_head query key"]:
    """Squared perturbation of the layer's attention output where a cached token is taken from the heads that share it.

    Heads m and n of a group write o_m and o_n instead of v_m and v_n: of each pair the product of the two differences.
    """
    n_kv = len(layer.values)
    a, rest = layer.attention[:, queries], layer.rest[:, queries]
    v = _to_heads(layer.values, len(a))
    o = (a @ v @ layer.out).unflatten(0, (n_kv, -1))
    v = (v @ layer.out).unflatten(0, (n_kv, -1))[:, :, :-1]
    factor = (a / rest)[..., :-1].unflatten(0, (n_kv, -1))
    vv = torch.einsum("gmkd,gnkd->gmnk", v, v)[..., None, :]
    size, found = max(1, NUMBERS // vv.numel()), []
    for c, part in zip(factor.split(size, 2), o.split(size, 2), strict=True):
        oo = torch.einsum("gmqd,gnqd->gmnq", part, part)[..., None]
        ov = torch.einsum("gmqd,gnkd->gmnqk", part, v)
        found.append((c[:, :, None] * c[:, None] * (oo + vv - 2 * ov)).sum((1, 2)).clamp_min(0))
    return torch.cat(found, 1)


def output_error(layer: Layer, kept: Bool[Tensor, "row kv_head key"]) -> Float[Tensor, " row"]:
    """Squared error of the layer's attention output at the last position, with tokens evicted, over its squared length.

    `kept` is of cached tokens; the last position's own stays.
    """
    a, v = layer.attention[:, -1], _to_heads(layer.values, len(layer.attention))
    evicted = ~_to_heads(F.pad(kept, (0, 1), value=True), len(a), 1)
    gone = (a * evicted).sum(-1, keepdim=True)
    stays = 1 - a.sum(-1, keepdim=True) + (a * ~evicted).sum(-1, keepdim=True)  # 1 - gone, without its rounding
    o = torch.einsum("hk,hkd->hd", a, v)
    moved = (gone * o - torch.einsum("rhk,hkd->rhd", a * evicted, v)) / stays
    written = torch.einsum("rhd,hdm->rm", moved, layer.out)
    return written.square().sum(-1) / torch.einsum("hd,hdm->m", o, layer.out).square().sum()


def largest(scores: Float[Tensor, "*any key"], share: float, recent: int, first: int) -> Bool[Tensor, "*any key"]:
    """Which tokens are kept: so many of the largest score, of which the last and the first count as largest."""
    n = scores.shape[-1]
    at = torch.arange(n)
    always = (at >= n - recent) | (at < first)
    count = min(n, max(math.floor(share * n + 0.5), int(always.sum())))
    order = scores.masked_fill(always, torch.inf).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def rank_agreement(a: Float[Tensor, "*#any key"], b: Float[Tensor, "*#any key"]) -> Float[Tensor, "*any"]:
    """Spearman correlation over keys; not a number where all are equal."""
    ranks = [torch.as_tensor(scipy.stats.rankdata(x.numpy(), axis=-1)) for x in (a, b)]
    left, right = (x - x.mean(-1, keepdim=True) for x in ranks)
    return (left * right).sum(-1) / (left.square().sum(-1) * right.square().sum(-1)).sqrt()


def _to_heads(x: Tensor, n_heads: int, axis: int = 0) -> Tensor:
    """What key-value heads have, for the query heads that share each."""
    heads: Tensor = x.repeat_interleave(n_heads // x.shape[axis], axis)
    return heads


# ---- the cache ----


class Caches(NamedTuple):
    """Prompts of one length up to their last position, and that position's own residual stream."""

    tokens: Tensor
    found: Mapping[str, list[Tensor]]
    keys: str

    @classmethod
    def of(cls, model: LanguageModel, store: ActivationStore, sequences: Sequence[Tensor]) -> Caches:
        keys = "attn.hook_rot_k" if sites.block(0, "attn.hook_rot_k") in model.hook_points else "attn.hook_k"
        names = ("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_v", keys)
        hooks = [sites.block(layer, name) for layer in range(model.config.n_layers) for name in names]
        hooks.append(sites.block(0, "hook_resid_pre"))
        return cls(torch.stack(list(sequences)), store.get(model, sequences, hooks), keys)

    def layer(self, model: LanguageModel, at: int, prompt: int) -> Layer:
        names = ("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_v")
        logits, pattern, values = (self.found[sites.block(at, name)][prompt] for name in names)
        rounding = max(1e-5, 2 * torch.finfo(model.dtype).eps)
        return Layer.of(logits, pattern, values.transpose(0, 1), model.out_weight(at).cpu(), rounding)

    def last_logits(
        self, model: LanguageModel, kept: Bool[Tensor, "layer prompt row kv_head key"]
    ) -> Float[Tensor, "prompt row vocab"]:
        """The prediction after the last position, run from the cache with keys masked in it: once for each row."""
        n = kept.shape[2]

        def rows(hook: str, at: slice) -> Tensor:
            some = torch.stack([x[at] for x in self.found[hook]]).to(model.device, model.dtype)
            return some.repeat_interleave(n, 0)

        def mask(stays: Tensor, scores: Tensor) -> Tensor:
            own = F.pad(stays.flatten(0, 1), (0, 1), value=True)
            return scores.masked_fill(~_to_heads(own, scores.shape[1], 1)[:, :, None], -torch.inf)

        past: dict[int, tuple[Tensor, Tensor]] = {}
        edits: dict[str | Site, Edit] = {}
        for layer, stays in enumerate(kept.to(model.device)):
            key, value = (rows(sites.block(layer, name), slice(-1)) for name in (self.keys, "attn.hook_v"))
            past[layer] = (key, value)
            edits[sites.block(layer, "attn.hook_attn_scores")] = partial(mask, stays)
        start = Resume(0, rows(sites.block(0, "hook_resid_pre"), slice(-1, None)), past)
        logits = model.run(self.tokens.repeat_interleave(n, 0), edit=edits, logits="last", start=start).logits
        assert logits is not None
        last: Tensor = logits[:, -1].float().cpu().unflatten(0, (-1, n))
        return last


# ---- figure ----

LOOKS = {
    "value": ("rgba(26,115,200,1)", "circle"),
    "key": ("rgba(226,98,16,1)", "diamond"),
    "joint": ("rgba(150,90,180,1)", "square"),
    "attention": ("rgba(64,160,112,1)", "triangle-up"),
    "exact": ("rgba(128,128,128,1)", "x"),
    "random": ("rgba(128,128,128,0.6)", "circle-open"),
    "the whole model": (canvas.FAINT, "line-ew"),
}


@figure.register
def saliency_figure(result: KvSaliency) -> go.Figure:
    """Rank agreement with exact removal by layer, of the queries that were seen and of the next; below what eviction
    costs, over the share that is kept."""
    unit = escape(result.unit)
    titles = ["rank agreement with exact removal, same queries", "the same, last position, which no score has seen",
              "KL from the model, nats", f"{unit} after eviction"]  # fmt: skip
    fig = make_subplots(rows=2, cols=2, horizontal_spacing=0.1, vertical_spacing=0.2, subplot_titles=titles)
    layers, kept = list(range(result.agreement.shape[1])), list(result.shares)
    for i, name in enumerate(result.ways):
        curves: list[tuple[list[Any], Tensor, int, int]] = [(kept, result.kl[i].mean(-1), 2, 1)]
        curves.append((kept, result.metric[i].mean(-1), 2, 2))
        if name in result.scores:
            curves += [(layers, result.agreement[i], 1, 1)] if name != "exact" else []
            curves.append((layers, result.ahead[i], 1, 2))
        for x, y, row, col in curves:
            fig.add_trace(_curve(name, x, y, named=(row, col) == (2, 1)), row=row, col=col)
    whole = _curve("the whole model", kept, result.whole.mean().expand(len(kept)), named=True)
    fig.add_trace(whole.update(mode="lines"), row=2, col=2)
    fig.update_xaxes(title_text="layer", dtick=canvas.step(len(layers), 10), tick0=0, row=1)
    fig.update_xaxes(title_text="cached tokens kept", tickvals=kept, tickformat=".3~p", row=2)
    fig.update_xaxes(title_standoff=6)
    fig.update_yaxes(range=[min(0.0, float(result.agreement.min())) - 0.03, 1.03], row=1, col=1)
    fig.update_yaxes(zeroline=True, zerolinecolor=canvas.FAINT, row=1)
    fig.update_yaxes(type="log", tickformat="~g", dtick=1, row=2, col=1)
    fig.update_yaxes(zeroline=True, zerolinecolor=canvas.FAINT, row=2, col=2)
    fig.update_annotations(font_size=13)
    fig.update_layout(legend={"orientation": "h", "y": -0.12, "yanchor": "top", "x": 0})
    return canvas.finish(fig, 520, top=34, bottom=96)


def _curve(name: str, x: Sequence[Any], y: Tensor, *, named: bool) -> go.Scatter:
    colour, symbol = LOOKS[name]
    return go.Scatter(
        x=x, y=canvas.cells(y), name=name, legendgroup=name, showlegend=named, mode="lines+markers",
        line={"color": colour, "width": 2, "dash": "solid" if name in SCORES else "dot"},
        marker={"size": 6, "symbol": symbol}, hovertemplate="%{x}: %{y:.3g}<extra>" + name + "</extra>",
    )  # fmt: skip


@definition.register
def _(result: KvSaliency) -> str:
    return (
        f"{result.definition}. Agreement: Spearman correlation over the cached tokens of a key-value head with the "
        "squared perturbation of the layer's attention output when one of them is taken away"
    )
