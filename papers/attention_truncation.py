"""Certified top-k attention truncation: how many keys a head needs, and how many its logits alone can vouch for.

Let p be a row of attention over the n keys that a query sees, p_1 >= ... >= p_n, and p^ the same with only the k
largest kept and renormalised: p^_i = p_i / (1 - t) for i <= k, with t = sum_{i>k} p_i the dropped mass.

    tail mass    TV(p, p^) = 1/2 (sum_{i<=k} p_i (1 / (1 - t) - 1) + t) = 1/2 (t + t) = t            Lemma 4.1
    KL           KL(p^ || p) = sum_{i<=k} p^_i log(p^_i / p_i) = -log(1 - t), so TV = 1 - exp(-KL)     Theorem 4.3
    head-tail    TV <= (n-k) exp s_{k+1} / (sum_{i<=k} exp s_i + (n-k) exp s_{k+1})
                 With T = sum_{i>k} exp s_i and H = sum_{i<=k} exp s_i, TV = T / (H + T) grows with T, and each of the
                 n-k logits in T is at most s_{k+1}. Nothing but k + 1 sorted logits and n is needed.
    gap          TV <= 1 / (1 + k / (n-k) exp(s_k - s_{k+1}))                                          Theorem 4.5
                 The head-tail bound falls with H, and each of the k logits in H is at least s_k.
    output       sum_i p_i v_i - sum_i p^_i v_i = t (mean of tail values - mean of head values), means weighted by p,
                 as the first sum is (1 - t) head + t tail, the second head                            Theorem 5.2
                 Both means lie in the ball of radius max ||v||: the norm is at most 2 t max ||v||   Proposition 5.1

So TV <= head-tail <= gap, with equality on the left where one key is dropped. k_eps is the least k with TV <= eps; the
least k whose bound is at most eps is what a method that looks at sorted logits can stop at *with proof*.

All is computed in double precision from the attention scores as the softmax gets them, after a soft cap and with
minus infinity where a mask or a window hides a key: n counts visible keys. A learned sink (weight-sparse models) is
always kept and counts as no key: it costs nothing to read and its value is zero. Then exp(sink) stands in H and in
every denominator above, and k_eps may be 0. Rows with one key are left out, as nothing can be dropped there.

Tzachristas, Deng, Tzachristas, Zhang & Chen 2025, "A Mathematical Theory of Top-k Sparse Attention via Total Variation
Distance", arXiv 2512.07647 (numbers of theorems are theirs; the head-tail bound keeps more of the head than their
Theorem 4.5, which follows from it). Total variation says nothing of what the model does with the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from workbench import canvas, scores
from workbench.activations import ActivationStore
from workbench.attention_rows import PATTERN, SCORES, by_layer, with_sink
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.plots import definition, figure
from workbench.prompts import Batch
from workbench.registry import analysis

ROUNDING = 1e-12  # of double precision: a bound may be an equality
NEEDED = ("needed", "head-tail bound", "gap bound")


@dataclass(frozen=True)
class Truncation:
    """Per head, over all prompts and all queries that see two keys or more.

    keys       k_eps, mean
    most       k_eps, largest
    share      k_eps as a share of the keys that are seen, mean
    certified  the same for the least k at which the head-tail bound is at most eps
    by_gap     the same for the gap bound
    error      ||output - truncated output|| / ||output|| at k_eps, mean
    rows       how many rows need 0, 1, 2, ... keys: in fact, by the head-tail bound, by the gap bound
    checks     comparisons: TV with both bounds at every k, and the output's error with its bound at k_eps
    violations               comparisons in which a bound was broken by more than rounding
    identity_error           largest difference of the tail mass from half the L1 distance, and from 1 - exp(-KL)
    output_identity_error    largest difference of the two sides of Theorem 5.2, relative to the largest value vector
    pattern_error            largest difference of the probabilities from the model's own pattern
    """

    eps: float
    keys: Float[Tensor, "layer head"]
    most: Int[Tensor, "layer head"]
    share: Float[Tensor, "layer head"]
    certified: Float[Tensor, "layer head"]
    by_gap: Float[Tensor, "layer head"]
    error: Float[Tensor, "layer head"]
    rows: Int[Tensor, "way k"]
    checks: int
    violations: int
    identity_error: float
    output_identity_error: float
    pattern_error: float

    def summary(self) -> dict[str, Any]:
        flat = self.share.flatten()
        narrow, wide = (divmod(int(i), self.share.shape[1]) for i in (flat.argmin(), flat.argmax()))
        return {
            "mean_keys": round(float(self.keys.mean()), 4),
            "key_share": round(float(self.share.mean()), 4),
            "certified_share": round(float(self.certified.mean()), 4),
            "gap_share": round(float(self.by_gap.mean()), 4),
            "output_error": round(float(self.error.mean()), 6),
            "fewest": {"head": scores.head(*narrow), "share": round(float(flat.min()), 4)},
            "most": {"head": scores.head(*wide), "share": round(float(flat.max()), 4)},
            "checks": int(self.checks),
            "violations": int(self.violations),
            "identity_error": float(f"{self.identity_error:.1e}"),
        }


@analysis("attention-truncation", version=1, n=32)
def attention_truncation(
    model: LanguageModel, batch: Batch, store: ActivationStore, *, eps: float = 0.01
) -> Truncation:
    """How few keys each head needs for nearly the same attention, and how few its logits can certify.

    eps  total variation that may be lost: the share of attention that is dropped

    Tzachristas et al. 2025. Raises UserError if eps is not between 0 and 1, and for prompts of one token.
    """
    if not 0 < eps < 1:
        raise UserError(f"eps={eps:g} is no share of attention; give one above 0 and below 1, such as 0.01.")
    longest = max(len(tokens) for tokens in batch.clean)
    if longest < 2:
        raise UserError("every prompt is one token, so no query sees two keys; take a task with longer prompts.")
    c = model.config
    sums = torch.zeros(5, c.n_layers, c.n_heads, dtype=torch.float64)
    n_rows = torch.zeros(c.n_layers, 1, dtype=torch.long)
    most = torch.zeros(c.n_layers, c.n_heads, dtype=torch.long)
    rows = torch.zeros(3, longest + 1, dtype=torch.long)
    checks = violations = 0
    worst = torch.zeros(3, dtype=torch.float64)
    for _, layer, (found, pattern, values) in by_layer(model, store, batch.clean, (SCORES, PATTERN, "attn.hook_v")):
        logits = with_sink(found, pattern, torch.finfo(model.dtype).eps)
        p = logits.softmax(-1)
        heads = values.double().transpose(0, 1).repeat_interleave(c.n_heads // c.n_kv_heads, 0)
        cut = truncate(logits, heads, eps)
        seen = cut.visible[0] > 1  # the same for all heads of a layer
        shares = cut.least / cut.visible
        each = [cut.least[0].double(), *shares, cut.error]
        sums[:, layer] += torch.stack([x[:, seen].sum(-1) for x in each])
        most[layer] = torch.maximum(most[layer], (cut.least[0] * seen).amax(-1))
        n_rows[layer] += seen.sum()
        rows += torch.stack([torch.bincount(way[:, seen].flatten(), minlength=longest + 1) for way in cut.least])
        checks += cut.checks
        violations += cut.violations
        own = (p[..., :-1] - pattern.double()).abs().amax()
        worst = torch.maximum(worst, torch.stack([cut.identity_error, cut.output_identity_error, own]))
    keys, share, certified, by_gap, error = (sums / n_rows).float()
    return Truncation(
        float(eps), keys, most, share, certified, by_gap, error, rows, checks, violations, *worst.tolist()
    )


# ---- the maths ----


class Cut(NamedTuple):
    """Of every row: how many keys are seen, the least k in three ways (see NEEDED), and what was checked."""

    visible: Int[Tensor, "head query"]
    least: Int[Tensor, "3 head query"]
    error: Float[Tensor, "head query"]
    checks: int
    violations: int
    identity_error: Float[Tensor, ""]
    output_identity_error: Float[Tensor, ""]


def truncate(logits: Float[Tensor, "head query outcome"], values: Float[Tensor, "head key d_head"], eps: float) -> Cut:
    """Everything about one layer of one prompt; the last outcome is the sink's, minus infinity where there is none."""
    ranked, order = logits[..., :-1].sort(dim=-1, descending=True, stable=True)
    visible, p = ranked.isfinite().sum(-1), logits.softmax(-1)
    k = torch.arange(ranked.shape[-1] + 1)
    rank = torch.empty_like(order).scatter_(-1, order, k[:-1].expand_as(order))
    tail = tails(p[..., :-1].gather(-1, order))
    bounds = head_tail_bound(ranked, logits[..., -1:]), gap_bound(ranked)
    least = torch.stack([first_below(x, eps) for x in (tail, *bounds)])
    many = visible > 1
    counted = (k >= 1) & (k < visible[..., None]) & many[..., None]
    broken = ((tail > bounds[0] + ROUNDING) | (bounds[0] > bounds[1] + ROUNDING)) & counted
    identity = [identity_error(p, rank, kept, tail) for kept in (torch.ones_like(least[0]), least[0])]

    dropped = tail.gather(-1, least[0][..., None])[..., 0]
    whole, left = (x[..., :-1] @ values for x in (p, truncated(p, rank, least[0])))
    change = (whole - left).norm(dim=-1)
    head, rest = head_and_tail(p, rank, least[0], values)
    size = values.norm(dim=-1)
    radius = torch.where(logits[..., :-1].isfinite(), size[:, None], 0.0).amax(-1)
    wide = (change > 2 * dropped * radius + ROUNDING * radius) & many
    return Cut(
        visible,
        least,
        change / whole.norm(dim=-1).clamp_min(1e-30),
        2 * int(counted.sum()) + int(many.sum()),
        int(broken.sum()) + int(wide.sum()),
        torch.stack(identity).amax(),
        (change - dropped * (rest - head).norm(dim=-1)).abs().amax() / size.amax().clamp_min(1e-30),
    )


def tails(p: Float[Tensor, "*row key"]) -> Float[Tensor, "*row k"]:
    """Mass beyond the first k = 0, 1, ..., n probabilities, largest first; small ones are added first."""
    return torch.nn.functional.pad(p.flip(-1).cumsum(-1).flip(-1), (0, 1))


def head_tail_bound(
    ranked: Float[Tensor, "*row key"], sink: Float[Tensor, "*row 1"] | None = None
) -> Float[Tensor, "*row k"]:
    """(n-k) exp s_{k+1} / (sum_{i<=k} exp s_i + (n-k) exp s_{k+1}) at k = 0, 1, ..., n, from sorted logits."""
    sink = torch.full_like(ranked[..., :1], -torch.inf) if sink is None else sink
    head = torch.cat([sink, ranked], -1).logcumsumexp(-1)
    return torch.sigmoid(_largest_tail(ranked) - head)


def gap_bound(ranked: Float[Tensor, "*row key"]) -> Float[Tensor, "*row k"]:
    """1 / (1 + k / (n-k) exp(s_k - s_{k+1})) at k = 0, 1, ..., n, from sorted logits; nothing (1) is said of k = 0."""
    k = torch.arange(ranked.shape[-1] + 1, dtype=ranked.dtype)
    before = torch.nn.functional.pad(ranked, (1, 0), value=0.0)
    gone = ~before.isfinite()  # nothing is left to drop
    return torch.sigmoid(_largest_tail(ranked) - k.log() - before.masked_fill(gone, 0.0)).masked_fill(gone, 0.0)


def _largest_tail(ranked: Float[Tensor, "*row key"]) -> Float[Tensor, "*row k"]:
    """log((n-k) exp s_{k+1}), with n the number of finite logits; minus infinity where nothing is left."""
    k = torch.arange(ranked.shape[-1] + 1, dtype=ranked.dtype)
    left = (ranked.isfinite().sum(-1, keepdim=True) - k).clamp_min(0)
    return left.log() + torch.nn.functional.pad(ranked, (0, 1), value=-torch.inf)


def first_below(x: Float[Tensor, "*row k"], eps: float) -> Int[Tensor, "*row"]:
    """The least k at which x is at most eps; it is 0 at the last."""
    return (x <= eps).int().argmax(-1)


def truncated(
    p: Float[Tensor, "head query outcome"], rank: Int[Tensor, "head query key"], kept: Int[Tensor, "head query"]
) -> Float[Tensor, "head query outcome"]:
    """The row with its `kept` largest keys and the sink alone, renormalised."""
    stays = torch.nn.functional.pad(rank < kept[..., None], (0, 1), value=True)
    some = p * stays
    return some / some.sum(-1, keepdim=True)


def identity_error(
    p: Float[Tensor, "head query outcome"],
    rank: Int[Tensor, "head query key"],
    kept: Int[Tensor, "head query"],
    tail: Float[Tensor, "head query k"],
) -> Float[Tensor, ""]:
    """How far the tail mass is from half the L1 distance, and from 1 - exp(-KL), both taken as they are defined."""
    half_l1, kl = distances(p, truncated(p, rank, kept))
    dropped = tail.gather(-1, kept[..., None])[..., 0]
    return torch.maximum((half_l1 - dropped).abs(), (-torch.expm1(-kl) - dropped).abs()).amax()


def distances(
    p: Float[Tensor, "*row outcome"], q: Float[Tensor, "*row outcome"]
) -> tuple[Float[Tensor, "*row"], Float[Tensor, "*row"]]:
    """Total variation of two distributions as half their L1 distance, and KL(q || p)."""
    kl = torch.where(q > 0, q * (q.log() - p.log()), 0.0)
    return (p - q).abs().sum(-1) / 2, kl.sum(-1)


def head_and_tail(
    p: Float[Tensor, "head query outcome"],
    rank: Int[Tensor, "head query key"],
    kept: Int[Tensor, "head query"],
    values: Float[Tensor, "head key d_head"],
) -> tuple[Float[Tensor, "head query d_head"], Float[Tensor, "head query d_head"]]:
    """Mean value of the keys that are kept, with the sink's zero among them, and of those that are dropped."""
    head = p[..., :-1] * (rank < kept[..., None])
    tail = p[..., :-1] - head
    whole = 1 - tail.sum(-1, keepdim=True)
    return head @ values / whole, tail @ values / tail.sum(-1, keepdim=True).clamp_min(1e-300)


# ---- figure ----


@figure.register
def truncation_figure(result: Truncation) -> go.Figure:
    """Which share of its keys each head needs, and which it can certify; below, over all rows, how many suffice."""
    n_layers, n_heads = result.share.shape
    height, below, gap = n_heads * min(24, max(9, 300 // n_heads)), 190, 76
    inside = height + gap + below
    fig = make_subplots(
        rows=2,
        cols=2,
        specs=[[{}, {}], [{"colspan": 2}, None]],
        row_heights=[height, below],
        vertical_spacing=gap / inside,
        horizontal_spacing=0.05,
        subplot_titles=[
            "needed",
            "certified by the head-tail bound",
            f"rows of which k keys hold all but {result.eps:g}",
        ],
    )
    for col, grid in enumerate((result.share, result.certified), 1):
        hover = [
            [f"{scores.head(layer, h)} {value:.1%}" for layer, value in enumerate(row)]
            for h, row in enumerate(grid.T.tolist())
        ]
        fig.add_trace(canvas.heatmap(grid.T, hover, coloraxis="coloraxis"), row=1, col=col)
        fig.update_xaxes(
            title={"text": "layer", "standoff": 4}, dtick=canvas.step(n_layers, 16), tick0=0, row=1, col=col
        )
        ticks = {"dtick": canvas.step(n_heads, 10), "tick0": 0}
        title = "head" if col == 1 else None
        fig.update_yaxes(title_text=title, autorange="reversed", **ticks, row=1, col=col)
    for name, counts, dash in zip(NEEDED, result.rows.double(), ("solid", "dash", "dot"), strict=True):
        line = {
            "color": canvas.POSITIVE.format(0.9 if dash == "solid" else 0.7),
            "width": 2,
            "dash": dash,
            "shape": "hv",
        }
        y = canvas.cells(counts.cumsum(0) / counts.sum())
        told = f"%{{y:.1%}} of rows: %{{x}} keys or fewer, {name}<extra></extra>"
        fig.add_trace(go.Scatter(y=y, name=name, mode="lines", line=line, hovertemplate=told), row=2, col=1)
    fig.update_xaxes(title={"text": "k", "standoff": 4}, rangemode="tozero", row=2, col=1)
    fig.update_yaxes(title_text="share of rows", tickformat=".0%", range=[0, 1.03], row=2, col=1)
    fig.update_annotations(font_size=13, yshift=4)
    bar = canvas.colorbar("share of keys", height / inside) | {"tickformat": ".0%"}
    axis = {"colorscale": canvas.SEQUENTIAL, "cmin": 0, "cmax": 1, "colorbar": bar}
    legend = {"x": 0.99, "xanchor": "right", "y": 0.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"}
    return canvas.finish(fig.update_layout(coloraxis=axis, legend=legend), inside, top=34)


@definition.register
def _(result: Truncation) -> str:
    return (
        f"share of the keys a query sees that must be kept for at most {result.eps:g} of its attention to be dropped, "
        "mean over queries that see two keys or more and over prompts; and the share at which the sorted logits alone "
        "prove that no more is dropped. A learned sink is always kept and is no key"
    )
