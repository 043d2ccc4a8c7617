"""Figures of one's own texts: what latents make of them, and what is written when one is steered; and a text with a
latent's values behind its tokens, as a page shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from saes.latents import Example, Latent
from saes.steering.languages import LANGUAGES
from saes.steering.play import Played
from saes.try_on import TryOn
from workbench import canvas
from workbench.plots import Table, definition, figure, tables

SHADE = 0.6  # of the largest value: the page's own text colour stays readable on it, dark or light
DRAWN = 256  # tokens of a map; more are no longer told apart
AROUND = 14  # tokens on each side, of an example that is cut


# ---- texts ----


def heat(example: Example, largest: float, around: int | None = None) -> str:
    """A text as HTML: behind each token the latent's value, by how it compares with `largest`, and the value as its
    title. The strongest token is marked by weight and underline as well.

    around  show so many tokens on each side of the strongest alone
    """
    n = len(example.tokens)
    start, stop = (0, n) if around is None else (example.position - around, example.position + around + 1)
    start, stop = max(0, start), min(n, stop)
    spans = [
        _span(example.tokens[i], example.values[i], largest, i == example.position and example.value > 0)
        for i in range(start, stop)
    ]
    return f"<p {_PARAGRAPH}>{'…' if start else ''}{''.join(spans)}{'…' if stop < n else ''}</p>"


_PARAGRAPH = 'style="margin:0 0 .55rem;line-height:1.7;overflow-wrap:anywhere;white-space:pre-wrap"'


def _span(token: str, value: float, largest: float, strongest: bool) -> str:
    shown = escape(token.replace("\n", "↵").replace("\r", "↵").replace("\t", "⇥")) or "·"
    if not math.isfinite(value):
        return f'<span title="the first position is not read" style="opacity:.55">{shown}</span>'
    share = min(1.0, max(0.0, value / largest)) if largest > 0 else 0.0
    style = f"background-color:{canvas.POSITIVE.format(round(SHADE * share, 3))};border-radius:3px" if share else ""
    style += ";font-weight:700;text-decoration:underline" if strongest else ""
    # A token is a place to break a line, as its space is part of it.
    return f'<span title="{canvas.number(value, 3, signed=False)}" style="{style}">{shown}</span>'


def heats(examples: Sequence[Example], largest: float, around: int | None = None) -> str:
    """Texts one below the other."""
    return "".join(heat(one, largest, around) for one in examples)


# ---- one latent ----


def values_figure(one: Latent) -> go.Figure:
    """How often the latent has which value, where it is active: bins are equal steps of the logarithm."""
    counts = torch.tensor(one.histogram)
    inside = counts.nonzero()[:, 0]
    first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (0, len(counts) - 1)
    edges = torch.tensor(one.edges, dtype=torch.float64)[first : last + 2]
    hover = [
        f"{low:.3g} to {high:.3g}: {n:,} positions"
        for low, high, n in zip(edges[:-1].tolist(), edges[1:].tolist(), one.histogram[first:], strict=False)
    ]
    middle = (edges[1:] * edges[:-1]).sqrt()
    fig = go.Figure(
        go.Bar(
            x=canvas.cells(middle), y=canvas.cells(counts[first : last + 1]), width=canvas.cells(edges.diff()),
            marker_line_width=0, marker_color=canvas.POSITIVE.format(0.7), hovertext=hover, showlegend=False,
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )  # fmt: skip
    fig.update_xaxes(title_text="value where it is active", type="log", dtick="D2")
    fig.update_yaxes(title_text="positions", nticks=4)
    return canvas.finish(fig, 150)


# ---- one's own text ----


@figure.register
def try_figure(result: TryOn) -> go.Figure:
    """Latents down, tokens across; each latent by its own largest value in the text."""
    values = result.values[:, :DRAWN]
    most = result.values[:, 1:].amax(1, keepdim=True).clamp(min=1e-12)
    hover = [
        [
            f"latent {latent} · {canvas.token(token) or '·'} · {canvas.number(value, 3, signed=False)}"
            for token, value in zip(result.tokens, row, strict=False)
        ]
        for latent, row in zip(result.latents, values.tolist(), strict=True)
    ]
    scale = canvas.share("share of its largest")
    fig = go.Figure(canvas.heatmap(values / most, hover, **scale))
    names = [f"{latent}{' *' if latent in result.asked else ''}" for latent in result.latents]
    fig.update_xaxes(**(canvas.token_ticks(result.tokens) if values.shape[1] <= 60 else {"title_text": "token"}))
    fig.update_yaxes(tickvals=list(range(len(names))), ticktext=names, autorange="reversed", title_text="latent")
    return canvas.finish(fig, max(60, 24 * len(names)), bottom=80, left=76)


@definition.register
def _(result: TryOn) -> str:
    cut = f"; the first {DRAWN} tokens are drawn" if len(result.tokens) > DRAWN else ""
    return f"{result.definition}; * was asked for{cut}"


@tables.register
def try_tables(result: TryOn) -> list[Table]:
    """The latents and where each is largest."""
    some = [result.example(latent) for latent in result.latents]
    return [
        Table(
            "Latents of the text",
            {
                "latent": [str(latent) for latent in result.latents],
                "largest": canvas.numbers([one.value for one in some], signed=False),
                "at": [_around(one) for one in some],
                "active at": [f"{sum(x > 0 for x in one.values)} of {len(one.values) - 1}" for one in some],
            },
        )
    ]


def _around(one: Example) -> str:
    """The strongest token in brackets, between a few others."""
    if one.value <= 0:
        return ""
    before, after = one.tokens[max(0, one.position - 4) : one.position], one.tokens[one.position + 1 :][:4]
    return f"{''.join(before)}[{one.tokens[one.position]}]{''.join(after)}".replace("\n", "↵")


# ---- steered ----


@figure.register
def played_figure(result: Played) -> go.Figure:
    """By strength, how odd the model finds what it wrote, and how active the latent is on it; the line: unsteered."""
    fig = make_subplots(rows=1, cols=2, horizontal_spacing=0.14)
    for column, (key, title) in enumerate((("bits", "bits per token"), ("value", "mean value of the latent")), 1):
        strengths = result.strengths
        rows = [row for strength in strengths for row in result.at(strength)]
        means = [_mean([getattr(row, key) for row in result.at(strength)]) for strength in strengths]
        fig.add_trace(
            go.Scatter(
                x=strengths, y=canvas.cells(torch.tensor(means)), mode="lines", hoverinfo="skip", showlegend=False,
                cliponaxis=False, line={"color": canvas.POSITIVE.format(0.5), "width": 2},
            ), row=1, col=column,
        )  # fmt: skip
        fig.add_trace(
            go.Scatter(
                x=[row.strength for row in rows], y=canvas.cells(torch.tensor([getattr(row, key) for row in rows])),
                mode="markers", marker={"size": 7, "color": canvas.POSITIVE.format(0.9)}, showlegend=False,
                cliponaxis=False, hovertemplate="strength %{x}: %{y:.3f}<extra></extra>",
            ), row=1, col=column,
        )  # fmt: skip
        plain = _mean([getattr(row, key) for row in result.at(None)])
        if math.isfinite(plain):
            fig.add_hline(y=plain, line={"color": canvas.FAINT, "dash": "dot"}, row=1, col=column)
        fig.update_xaxes(title_text="strength", row=1, col=column)
        fig.update_yaxes(title_text=title, nticks=5, rangemode="tozero", row=1, col=column)
    return canvas.finish(fig, 200)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


@definition.register
def _(result: Played) -> str:
    return result.definition


@tables.register
def played_tables(result: Played) -> list[Table]:
    """The texts, unsteered ones first."""
    rows = sorted(result.rows, key=lambda row: row.strength is not None)
    columns = {
        "strength": ["unsteered" if row.strength is None else f"{row.strength:g}" for row in rows],
        "text": [row.text.replace("\n", "↵") for row in rows],
        "steered at": ["" if row.strength is None else f"{row.applied}/{row.due} positions" for row in rows],
        "bits per token": [canvas.number(row.bits, 2, signed=False) for row in rows],
        "language": [LANGUAGES.get(row.language, row.language) for row in rows],
    }
    return [Table("Texts", columns)]
