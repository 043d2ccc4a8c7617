"""Attention sinks and massive activations: attention that goes to the first token, and the few huge numbers behind it.

Sink. In most language models many heads attend to the first token whatever it is: Xiao et al. 2023 keep it in the cache
so that the rest may be dropped. Gu et al. 2024 (section 3.2) measure it: the importance of key k in a head is the mean
attention of the queries that see it, and the sink metric is the share of heads in which it is above a threshold,

    alpha_k = 1 / (T - k + 1) sum_{i=k}^{T} A_{i,k}        Sink_k = share of prompts, layers, heads with alpha_k > 0.3

for prompts of T tokens, k from 1. It falls as T grows (their figure 3; they fix T = 64), as the first query can see
nothing but the first key: even attention to all alike has alpha_1 = (1 + 1/2 + ... + 1/T) / T. So T is in the result,
and numbers of different T cannot be compared. `strongest` is the position of the largest alpha, among keys that four
queries see. A learned sink (weight-sparse models) is no key: what it draws is missing from the pattern and is in
`on_no_key`.

Massive activations (Sun et al. 2024; see `papers.massive_activations`) stand in a few fixed channels of the first token
and some delimiters, and the heads that read them have their sink there.

Intervention (their section 3, table 3). In the residual stream after the first block where more than half of the
prompts have massive activations, those are set to 0; or each to its mean over the prompts, by channel, at the first
position and at later ones apart; or, as a control, as many other channels at the same positions are set to 0, chosen
at random. Their result: zero destroys the model, the mean changes nothing. Beside the loss stands the sink metric of
the later blocks. Values at the first position depend on the first token alone, so they vary only as first tokens do.

Xiao, Tian, Chen, Han & Lewis 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453. Gu,
Pang, Du, Liu, Zhang, Du, Wang & Lin 2024, "When Attention Sink Emerges in Language Models: An Empirical View", arXiv
2410.10781. Sun, Chen, Kolter & Liu 2024, "Massive Activations in Large Language Models", arXiv 2402.17762.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from papers.massive_activations import Entry, Massive, by_channel, elsewhere, massive_at, placing, with_means
from workbench import canvas, scores, sites, texts
from workbench.activations import ActivationStore
from workbench.attention_rows import PATTERN, by_layer
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.passes import Edit
from workbench.plots import Table, definition, figure, tables
from workbench.prompts import Batch
from workbench.registry import analysis

SEEN_BY = 4  # queries, without which a position's alpha says little
TOKENS_PER_PASS = 512
RESID = "hook_resid_post"
UNCHANGED, MEAN, ZERO, CONTROL = "unchanged", "set to mean", "set to zero", "others set to zero"


@dataclass(frozen=True)
class Peak:
    """The largest activation of the residual stream after a block, over all prompts; ratio: to the median there."""

    value: float
    ratio: float
    channel: int
    position: int
    token: str


@dataclass(frozen=True)
class Sinks:
    """
    first       alpha of the first key, mean over prompts
    sink        Sink_1, the share of prompts, layers and heads whose alpha_1 is above the threshold
    strongest   position of the largest alpha, of means over prompts
    highest     that alpha
    on_no_key   attention that a learned sink draws, mean over queries
    length      tokens of a prompt, mean
    largest     the three largest magnitudes of the residual stream after each block, mean over prompts
    median      its median magnitude
    peaks       the largest activation after each block
    layer       where massive activations first appear; None: nowhere
    massive     them there, those of most prompts first
    losses      next-token loss in nats, mean over tokens, by intervention
    sinks       Sink_1 of the blocks after `layer`, by intervention; empty where there are none
    """

    threshold: float
    magnitude: float
    ratio: float
    first: Float[Tensor, "layer head"]
    sink: float
    strongest: Int[Tensor, "layer head"]
    highest: Float[Tensor, "layer head"]
    on_no_key: Float[Tensor, "layer head"]
    length: float
    largest: Float[Tensor, "layer 3"]
    median: Float[Tensor, " layer"]
    peaks: list[Peak]
    layer: int | None = None
    massive: list[Massive] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    sinks: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        changed = {
            "next_token_loss": {name: round(value, 4) for name, value in self.losses.items()},
            "sink_metric_by_intervention": {name: round(value, 4) for name, value in self.sinks.items()},
        }
        top = max(range(len(self.peaks)), key=lambda layer: abs(self.peaks[layer].value))
        best = divmod(int(self.first.argmax()), self.first.shape[1])
        return {
            "sink_metric": round(self.sink, 4),
            "alpha_first": round(float(self.first.mean()), 4),
            "strongest_sink": {"head": scores.head(*best), "alpha": round(float(self.first.max()), 4)},
            "sinks_elsewhere": int((self.strongest != 0).sum()),
            "prompt_length": round(self.length, 2),
            "on_no_key": round(float(self.on_no_key.mean()), 4),
            "largest_activation": round(self.peaks[top].value, 2),
            "ratio_to_median": round(self.peaks[top].ratio, 1),
            "largest_at": {"layer": top, "channel": self.peaks[top].channel, "position": self.peaks[top].position},
            "massive_from_layer": self.layer,
            "massive_channels": sorted({one.channel for one in self.massive}),
            **{name: values for name, values in changed.items() if values},
        }


@analysis("attention-sinks", version=1, n=32)
def attention_sinks(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    seed: int,
    *,
    threshold: float = 0.3,
    magnitude: float = 100.0,
    ratio: float = 1000.0,
    controls: int = 3,
    text: str = "",
    length: int = 64,
) -> Sinks:
    """Heads that attend to the first token, the massive activations, and what becomes of the model without them.

    threshold  mean attention above which a head has a sink at the first token
    magnitude  of a massive activation, at least
    ratio      of its magnitude to the median of the hidden state, at least
    controls   how often random channels are chosen
    text       look at this text instead of the task's prompts: a name, or a file
    length     tokens of each sequence of that text

    Raises UserError for prompts of one token, and for thresholds that say nothing.
    """
    if not 0 <= threshold < 1 or magnitude <= 0 or ratio < 1 or controls < 1:
        raise UserError(
            f"threshold={threshold:g} must be a share below 1, magnitude={magnitude:g} above 0, ratio={ratio:g} and "
            f"controls={controls} at least 1; try 0.3, 100, 1000 and 3."
        )
    sequences: Sequence[Tensor] = batch.clean
    if text:
        sequences = texts.sequences(texts.load(text), model, length, length * len(batch), seed)[: len(batch)]
    if min(len(tokens) for tokens in sequences) < 2:
        raise UserError("a prompt of one token has no next token to predict; take longer prompts.")
    read = _read(model, store, sequences, threshold, magnitude, ratio)
    share = [len({one.prompt for one in some}) / len(sequences) for some in read.massive]
    layer = next((layer for layer, part in enumerate(share) if part > 0.5), None)
    if layer is None:
        return Sinks(threshold, magnitude, ratio, *read[:-1])
    entries = read.massive[layer]
    generator = torch.Generator().manual_seed(seed)
    others = [elsewhere(entries, model.config.d_model, generator) for _ in range(controls)]
    zeros = [one._replace(value=0.0) for one in entries]
    trials: dict[str, list[list[Entry]]]
    trials = {UNCHANGED: [[]], MEAN: [with_means(entries)], CONTROL: others, ZERO: [zeros]}
    found = {
        name: [
            sum(x) / len(each) for x in zip(*(_run(model, sequences, layer, e, threshold) for e in each), strict=True)
        ]
        for name, each in trials.items()
    }
    losses, sinks = ({name: x[i] for name, x in found.items() if math.isfinite(x[i])} for i in range(2))
    return Sinks(threshold, magnitude, ratio, *read[:-1], layer, by_channel(entries), losses, sinks)


# ---- reading ----


class _Read(NamedTuple):
    """Fields of `Sinks`, in order; massive: entries after each block."""

    first: Tensor
    sink: float
    strongest: Tensor
    highest: Tensor
    on_no_key: Tensor
    length: float
    largest: Tensor
    median: Tensor
    peaks: list[Peak]
    massive: list[list[Entry]]


def _read(
    model: LanguageModel,
    store: ActivationStore,
    sequences: Sequence[Tensor],
    threshold: float,
    magnitude: float,
    ratio: float,
) -> _Read:
    c, n = model.config, len(sequences)
    longest = max(len(tokens) for tokens in sequences)
    alphas = torch.zeros(c.n_layers, c.n_heads, longest, dtype=torch.float64)
    counts = torch.zeros(longest, dtype=torch.float64)
    above, largest = torch.zeros(c.n_layers, c.n_heads), torch.zeros(c.n_layers, 3, dtype=torch.float64)
    missing, median = torch.zeros_like(alphas[..., 0]), torch.zeros_like(largest[:, 0])
    peaks: list[Peak | None] = [None] * c.n_layers
    massive: list[list[Entry]] = [[] for _ in range(c.n_layers)]
    for i, layer, (pattern, resid) in by_layer(model, store, sequences, (PATTERN, RESID)):
        alpha = importance(pattern)
        last = max(1, alpha.shape[-1] - SEEN_BY + 1)
        alphas[layer, :, :last] += alpha[:, :last]
        counts[:last] += float(layer == 0)
        above[layer] += alpha[:, 0] > threshold
        missing[layer] += 1 - pattern.double().sum(-1).mean(-1)
        size = resid.abs()
        middle = float(size.median())
        largest[layer] += size.flatten().topk(3).values
        median[layer] += middle
        position, channel = divmod(int(size.argmax()), size.shape[1])
        value = float(resid[position, channel])
        before = peaks[layer]
        if before is None or abs(value) > abs(before.value):
            token = model.token_strings(sequences[i][position : position + 1].tolist())[0]
            peaks[layer] = Peak(value, abs(value) / max(middle, 1e-30), channel, position, token)
        massive[layer] += [Entry(i, *at, float(resid[*at])) for at in massive_at(resid, magnitude, ratio)]
    means = alphas / counts.clamp_min(1)
    highest, strongest = means.max(-1)
    return _Read(
        means[..., 0].float(), float(above.mean() / n), strongest, highest.float(),
        (missing / n).clamp_min(0).float(), sum(map(len, sequences)) / n, (largest / n).float(), (median / n).float(),
        [one for one in peaks if one is not None], massive,
    )  # fmt: skip


def importance(pattern: Float[Tensor, "head query key"]) -> Float[Tensor, "head key"]:
    """alpha: the mean attention that each key gets from the queries at or after it (Gu et al. 2024, section 3.2)."""
    queries = torch.arange(pattern.shape[-1], 0, -1, dtype=torch.float64, device=pattern.device)
    return pattern.double().sum(-2) / queries


# ---- intervening ----


def _run(
    model: LanguageModel, sequences: Sequence[Tensor], layer: int, entries: Sequence[Entry], threshold: float
) -> tuple[float, float]:
    """Next-token loss, mean over tokens, with these entries in the residual stream after a block, and the Sink_1 of the
    blocks after it; not a number where there are none."""
    hooks = [sites.block(each, PATTERN) for each in range(layer + 1, model.config.n_layers)]
    loss, tokens_seen, sinks = 0.0, 0, 0.0
    for some in _passes(sequences):
        tokens = torch.stack([sequences[i] for i in some])
        edit: dict[str | sites.Site, Edit] = {sites.block(layer, RESID): placing(entries, some)} if entries else {}
        out = model.run(tokens, capture=hooks, edit=edit)
        assert out.logits is not None
        said, then = out.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().to(out.logits.device)
        loss += float(F.cross_entropy(said, then, reduction="sum"))
        tokens_seen += then.numel()
        sinks += sum(float((out[hook].double().mean(-2)[..., 0] > threshold).sum()) for hook in hooks)
    heads = len(sequences) * len(hooks) * model.config.n_heads
    return loss / tokens_seen, sinks / heads if heads else math.nan


def _passes(sequences: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of sequences of one length, as many as a pass can hold."""
    lengths: dict[int, list[int]] = defaultdict(list)
    for i, tokens in enumerate(sequences):
        lengths[len(tokens)].append(i)
    for size, some in sorted(lengths.items()):
        step = max(1, TOKENS_PER_PASS // size)
        yield from (some[start : start + step] for start in range(0, len(some), step))


# ---- figure ----


@figure.register
def sinks_figure(result: Sinks) -> go.Figure:
    """Attention to the first token by head; the largest activations by layer; the loss without the massive ones."""
    n_layers, n_heads = result.first.shape
    height, below, gap = n_heads * min(24, max(9, 300 // n_heads)), 220, 84
    inside = height + gap + below
    titles = ["attention to the first token", "largest activations after each block"]
    titles += [f"next-token loss, changed after block {result.layer}"] if result.losses else []
    fig = make_subplots(
        rows=2,
        cols=2,
        specs=[[{"colspan": 2}, None], [{}, {}] if result.losses else [{"colspan": 2}, None]],
        row_heights=[height, below],
        column_widths=[0.5, 0.5],
        vertical_spacing=gap / inside,
        horizontal_spacing=0.23,
        subplot_titles=titles,
    )
    told = [
        [f"{scores.head(layer, h)} {value:.3f}" for layer, value in enumerate(row)]
        for h, row in enumerate(result.first.T.tolist())
    ]
    bar = canvas.share("alpha of the first key")
    bar["colorbar"] |= {"len": height / inside}
    fig.add_trace(canvas.heatmap(result.first.T, told, **bar), row=1, col=1)
    fig.update_xaxes(title={"text": "layer", "standoff": 4}, dtick=canvas.step(n_layers, 30), tick0=0, row=1, col=1)
    ticks = {"dtick": canvas.step(n_heads, 10), "tick0": 0}
    fig.update_yaxes(title_text="head", autorange="reversed", **ticks, row=1, col=1)
    _activations(fig, result)
    if result.losses:
        _losses(fig, result)
    fig.update_annotations(font_size=13, yshift=4)
    return canvas.finish(fig, inside, top=34)


def _activations(fig: go.Figure, result: Sinks) -> None:
    """On a logarithmic scale the three largest magnitudes and the median; a dot where one is massive by definition."""
    col = {"row": 2, "col": 1}
    for i, (name, strength) in enumerate((("largest", 0.95), ("second", 0.55), ("third", 0.3))):
        line = {"color": canvas.POSITIVE.format(strength), "width": 2}
        told = f"layer %{{x}}, {name}: %{{y:.5g}}<extra></extra>"
        y = canvas.cells(result.largest[:, i])
        fig.add_trace(go.Scatter(y=y, mode="lines", line=line, name=name, showlegend=False, hovertemplate=told), **col)
    grey = {"color": "rgba(128,128,128,0.7)", "width": 2, "dash": "dot"}
    told = "layer %{x}, median: %{y:.3g}<extra></extra>"
    y = canvas.cells(result.median)
    label = ["<br>median" if layer == len(y) // 2 else "" for layer in range(len(y))]
    style = {"mode": "lines+text", "text": label, "textposition": "bottom center", "line": grey}
    fig.add_trace(go.Scatter(y=y, **style, name="median", showlegend=False, hovertemplate=told), **col)
    huge = [
        (layer, p)
        for layer, p in enumerate(result.peaks)
        if abs(p.value) > result.magnitude and p.ratio >= result.ratio
    ]
    said = [
        f"layer {layer}: {p.value:.5g} in channel {p.channel}, position {p.position} ({canvas.token(p.token)}), "
        f"{p.ratio:.0f} times the median"
        for layer, p in huge
    ]
    dots = go.Scatter(
        x=[layer for layer, _ in huge],
        y=[float(result.largest[layer, 0]) for layer, _ in huge],
        mode="markers",
        marker={"color": canvas.NEGATIVE.format(0.95), "size": 6},
        hovertext=said,
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    fig.add_trace(dots, **col)
    fig.update_xaxes(title={"text": "layer", "standoff": 4}, dtick=canvas.step(len(result.median), 12), tick0=0, **col)
    fig.update_yaxes(type="log", title_text="magnitude", exponentformat="none", dtick=1, **col)


def _losses(fig: go.Figure, result: Sinks) -> None:
    names = list(result.losses)[::-1]
    losses = [result.losses[name] for name in names]
    sink = [f", sinks {result.sinks[name]:.0%}" if name in result.sinks else "" for name in names]
    bars = go.Bar(
        x=canvas.cells(torch.tensor(losses, dtype=torch.float64)),
        y=names,
        orientation="h",
        marker_color=[(canvas.NEGATIVE if name == ZERO else canvas.POSITIVE).format(0.6) for name in names],
        marker_line_width=0,
        text=[f"{loss:.2f}{said}" for loss, said in zip(losses, sink, strict=True)],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{text}<extra></extra>",
        showlegend=False,
    )
    fig.add_trace(bars, row=2, col=2)
    most = 1.5 * max(losses)  # room for what is written beside the longest
    fig.update_xaxes(title={"text": "nats", "standoff": 4}, range=[0, most], row=2, col=2)
    fig.update_yaxes(ticksuffix=" ", row=2, col=2)


@definition.register
def _(result: Sinks) -> str:
    return (
        "mean attention that a prompt's first token gets from the queries that see it, mean over prompts; the sink "
        f"metric is the share of prompts and heads in which it is above {result.threshold:g}, and depends on how long "
        "prompts are. Below, the largest activations of the residual stream, and what the loss becomes when massive "
        "ones (orange) are changed after the block where they first appear; sinks: the metric of later blocks"
    )


@tables.register
def _(result: Sinks) -> list[Table]:
    """The massive activations where they first appear."""
    some = result.massive[:10]
    if not some:
        return []
    columns = {
        "channel": [str(one.channel) for one in some],
        "position": ["first" if one.first else "later" for one in some],
        "prompts": [str(one.prompts) for one in some],
        "mean": canvas.numbers([one.mean for one in some]),
        "standard deviation": canvas.numbers([one.std for one in some], signed=False),
    }
    return [Table(f"Massive activations after block {result.layer}", columns)]
