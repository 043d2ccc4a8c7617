"""How spread out each head's attention is: its entropy, the least that its logits allow, and heads at the extremes.

A query that sees n keys and attends to them with p has entropy Ent = -sum_i p_i log p_i nats: 0 where it picks one key,
log n where it attends to all alike. Divided by log n it is between 0 and 1 whatever n is.

    collapse   entropy near 0: nearly every query of a head picks one key. In training, entropies that fall to 0 come
               with instability (Zhai et al. 2023); a head that copies the previous token has collapsed and is healthy
    overload   "a disproportionately large fraction of the attention heads exhibit higher entropy values (between
               3max/4 and max)", with max the largest mean entropy of any head of the model; in healthy models most
               heads lie between max/4 and 3max/4 (Jha & Reagen 2025, section 3 and figure 2a, their equation 7)
    uniform    normalised entropy near 1: nearly every query of a head attends to all keys alike, which cannot choose

Least entropy (Zhai et al. 2023, theorem 3.1). A softmax does not change when a number is added to a row of logits; let
u be the row less its mean. Of all u of norm sigma over T keys, the one with one high logit and the others alike has the
least entropy: gap u_1 - u_2 = sigma sqrt(T / (T-1)), so with beta = exp(-gap)

    Ent >= log(1 + (T-1) beta) + sigma sqrt(T (T-1)) beta / (1 + (T-1) beta)

which is that row's entropy and falls as sigma grows. The theorem bounds ||u|| by the spectral norm of the whole matrix
of logits, and that by norms of weights, ||W_K W_Q^T|| ||X X^T||, which rotated queries and keys do not have. Here sigma
is measured from the logits themselves, in two ways: for each row its own norm (the tightest), and for each head and
prompt the spectral norm of the matrix of centred rows with 0 where a key is not seen, which no row's norm exceeds.
Neither bound can be broken, and each is checked on every row.

A learned sink (weight-sparse models) is one more outcome of each of the head's rows, with its own logit. Rows of one
outcome, the first query's of other models, have no normalised entropy and are left out.

Zhai, Likhomanenko, Littwin, Busbridge, Ramapuram, Zhang, Gu & Susskind 2023, "Stabilizing Transformer Training by
Preventing Attention Entropy Collapse", arXiv 2303.06296. Jha & Reagen 2025, "Entropy-Guided Attention for Private
LLMs", arXiv 2501.03489. Attention is not importance: entropy says how a head looks, not whether that matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
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

ROUNDING = 1e-9  # nats
QUARTERS = ("0 to max/4", "max/4 to max/2", "max/2 to 3max/4", "3max/4 to max")


@dataclass(frozen=True)
class Entropy:
    """Per head, means over queries that see two outcomes or more and over prompts.

    entropy      nats
    normalised   as a share of the largest entropy over as many keys
    picking      share of queries whose normalised entropy is below `low`
    flat         share of queries whose normalised entropy is above `high`
    least        the lower bound from each row's own logits, nats
    spectral     the lower bound from the spectral norm of the head's logits on a prompt, nats
    sigma        that spectral norm, mean over prompts
    checks, violations   rows times bounds that were compared, and how often the entropy was below its bound
    """

    low: float
    high: float
    most: float
    entropy: Float[Tensor, "layer head"]
    normalised: Float[Tensor, "layer head"]
    picking: Float[Tensor, "layer head"]
    flat: Float[Tensor, "layer head"]
    least: Float[Tensor, "layer head"]
    spectral: Float[Tensor, "layer head"]
    sigma: Float[Tensor, "layer head"]
    checks: int
    violations: int

    def collapsed(self) -> list[str]:
        return _named(self.picking >= self.most)

    def uniform(self) -> list[str]:
        return _named(self.flat >= self.most)

    def quarters(self) -> Float[Tensor, " quarter"]:
        """Share of heads by mean entropy, in quarters of the largest of any head."""
        return quarters(self.entropy)

    def summary(self) -> dict[str, Any]:
        collapsed, uniform = self.collapsed(), self.uniform()
        return {
            "mean_entropy": round(float(self.entropy.mean()), 4),
            "normalised_entropy": round(float(self.normalised.mean()), 4),
            "entropic_overload": round(float(self.quarters()[-1]), 4),
            "quarters": [round(x, 4) for x in self.quarters().tolist()],
            "collapsed_heads": len(collapsed),
            "uniform_heads": len(uniform),
            "collapsed": collapsed[:10],
            "uniform": uniform[:10],
            "least_entropy": round(float(self.least.mean()), 4),
            "logit_norm": round(float(self.sigma.mean()), 3),
            "checks": int(self.checks),
            "violations": int(self.violations),
        }


def _named(grid: Tensor) -> list[str]:
    return [scores.head(layer, h) for layer, h in grid.nonzero().tolist()]


@analysis("attention-entropy", version=1, n=32)
def attention_entropy(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    low: float = 0.1,
    high: float = 0.9,
    most: float = 0.9,
) -> Entropy:
    """How spread out each head's attention is, which heads pick one key or attend to all alike, and the least possible.

    low    normalised entropy below which a query picks one key
    high   normalised entropy above which it attends to all alike
    most   share of its queries that makes a head collapsed, or uniform

    Zhai et al. 2023; Jha & Reagen 2025. Raises UserError for shares that are none, and for prompts of one token.
    """
    if not 0 <= low < high <= 1 or not 0 < most <= 1:
        raise UserError(
            f"low={low:g}, high={high:g} and most={most:g} are shares with low below high; try 0.1, 0.9 and 0.9."
        )
    c = model.config
    sums = torch.zeros(6, c.n_layers, c.n_heads, dtype=torch.float64)
    sigmas, n_rows = torch.zeros_like(sums[0]), torch.zeros_like(sums[0])
    checks = violations = 0
    for _, layer, (found, pattern) in by_layer(model, store, batch.clean, (SCORES, PATTERN)):
        logits = with_sink(found, pattern, torch.finfo(model.dtype).eps)
        outcomes = logits.isfinite().sum(-1)
        seen = outcomes > 1
        ent, centred = entropy(logits.softmax(-1)), centre(logits)
        share = ent / outcomes.double().log().where(seen, 1.0)
        sigma = torch.linalg.matrix_norm(centred, ord=2)
        bounds = [least_entropy(x, outcomes) for x in (centred.norm(dim=-1), sigma[:, None].expand_as(outcomes))]
        each = torch.stack([ent, share, (share < low).double(), (share > high).double(), *bounds])
        sums[:, layer] += (each * seen).sum(-1)
        n_rows[layer] += seen.sum(-1)
        sigmas[layer] += sigma
        checks += 2 * int(seen.sum())
        violations += sum(int(((ent < bound - ROUNDING) & seen).sum()) for bound in bounds)
    if not n_rows.all():
        raise UserError("every prompt is one token, so no query sees two keys; take a task with longer prompts.")
    ent, share, picking, flat, least, spectral = (sums / n_rows).float()
    sigma = (sigmas / len(batch)).float()
    return Entropy(low, high, most, ent, share, picking, flat, least, spectral, sigma, checks, violations)


# ---- the maths ----


def entropy(p: Float[Tensor, "*row outcome"]) -> Float[Tensor, "*row"]:
    """In nats; nothing is as good as impossible."""
    found: Tensor = torch.special.entr(p).sum(-1)
    return found


def centre(logits: Float[Tensor, "*row outcome"]) -> Float[Tensor, "*row outcome"]:
    """Each row less the mean of its finite logits, and 0 where it has none."""
    finite = logits.isfinite()
    some = logits.where(finite, 0.0)
    return (some - some.sum(-1, keepdim=True) / finite.sum(-1, keepdim=True)).where(finite, 0.0)


def least_entropy(sigma: Float[Tensor, "*row"], n: Tensor) -> Float[Tensor, "*row"]:
    """The least entropy of a softmax over n logits whose norm about their mean is at most sigma."""
    t = n.to(sigma.dtype).clamp_min(2.0)
    beta = torch.exp(-sigma * (t / (t - 1)).sqrt())
    return torch.log1p((t - 1) * beta) + sigma * (t * (t - 1)).sqrt() * beta / (1 + (t - 1) * beta)


def quarters(entropy: Float[Tensor, "layer head"]) -> Float[Tensor, " quarter"]:
    """Share of heads in [0, max/4), [max/4, max/2), [max/2, 3max/4) and [3max/4, max]."""
    place = (4 * entropy / entropy.max().clamp_min(1e-30)).long().clamp_max(3).flatten()
    return torch.bincount(place, minlength=4).float() / place.numel()


# ---- figure ----


@figure.register
def entropy_figure(result: Entropy) -> go.Figure:
    """Normalised entropy of each head; below, entropies over the least that logits allow, and how they are spread."""
    n_layers, n_heads = result.entropy.shape
    height, below, gap = n_heads * min(24, max(9, 300 // n_heads)), 230, 84
    inside = height + gap + below
    fig = make_subplots(
        rows=2,
        cols=2,
        specs=[[{"colspan": 2}, None], [{}, {}]],
        row_heights=[height, below],
        column_widths=[0.6, 0.4],
        vertical_spacing=gap / inside,
        horizontal_spacing=0.11,
        subplot_titles=["normalised entropy", "entropy and the least its logits allow", "heads, by mean entropy"],
    )
    names = [[scores.head(layer, h) for layer in range(n_layers)] for h in range(n_heads)]
    told = [
        [f"{name} {value:.3f}, {nats:.2f} nats" for name, value, nats in zip(*row, strict=True)]
        for row in zip(names, result.normalised.T.tolist(), result.entropy.T.tolist(), strict=True)
    ]
    bar = canvas.share("share of log n")
    bar["colorbar"] |= {"lenmode": "fraction", "len": height / inside}
    fig.add_trace(canvas.heatmap(result.normalised.T, told, **bar), row=1, col=1)
    ticks = {"dtick": canvas.step(n_heads, 10), "tick0": 0}
    fig.update_yaxes(title_text="head", autorange="reversed", **ticks, row=1, col=1)
    layers = {"dtick": canvas.step(n_layers, 30), "tick0": 0}
    fig.update_xaxes(title={"text": "layer", "standoff": 4}, **layers, row=1, col=1)
    dots = go.Scatter(
        x=canvas.cells(result.least.T.flatten()),
        y=canvas.cells(result.entropy.T.flatten()),
        mode="markers",
        marker={"color": canvas.POSITIVE.format(0.6), "size": 6},
        text=[name for row in names for name in row],
        hovertemplate="%{text}: %{y:.3f} nats, at least %{x:.3f}<extra></extra>",
        showlegend=False,
    )
    fig.add_trace(dots, row=2, col=1)
    end = float(result.entropy.max()) * 1.04
    line = {"color": "rgba(128,128,128,0.7)", "width": 1, "dash": "dash"}
    fig.add_shape(type="line", x0=0, y0=0, x1=end, y1=end, line=line, row=2, col=1)
    nats = {"range": [0, end], "rangemode": "tozero"}
    fig.update_xaxes(title={"text": "lower bound, nats", "standoff": 4}, **nats, row=2, col=1)
    fig.update_yaxes(title_text="entropy, nats", **nats, row=2, col=1)
    shares = result.quarters().tolist()
    colour = [canvas.POSITIVE.format(0.6)] * 3 + [canvas.NEGATIVE.format(0.8)]
    said = "%{x}: %{y:.1%} of heads<extra></extra>"
    bars = go.Bar(x=QUARTERS, y=shares, marker_color=colour, marker_line_width=0, hovertemplate=said, showlegend=False)
    fig.add_trace(bars, row=2, col=2)
    fig.update_xaxes(tickvals=QUARTERS, ticktext=["0–¼", "¼–½", "½–¾", "¾–1"], row=2, col=2)
    fig.update_xaxes(title={"text": "share of the largest head's", "standoff": 4}, row=2, col=2)
    fig.update_yaxes(tickformat=".0%", rangemode="tozero", row=2, col=2)
    fig.update_annotations(font_size=13, yshift=4)
    return canvas.finish(fig, inside, top=34)


@definition.register
def _(_: Entropy) -> str:
    return (
        "entropy of a head's attention as a share of log n, with n the number of keys a query sees (a learned sink is "
        "one more), mean over queries and prompts: 0 it picks one key, 1 it attends to all alike. Below, in nats, with "
        "the least that logits of the same norm allow; orange: heads in the top quarter, whose number is overload"
    )
