"""Figures of results, one function per type of result: `figure(result)`; and the tables and words that go with them.

A package draws its own results with `@figure.register` and says what their number is with `@definition.register`; a
result that carries `scores` is drawn as its scores. What all figures share is in `workbench.canvas`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import singledispatch
from html import escape
from typing import NamedTuple

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from workbench import canvas
from workbench.errors import UserError
from workbench.lenses import AttentionResult, LensResult
from workbench.scores import NodeScores, head

NAMED = 10  # heads whose value is written into their cell
CLASSES = {
    "previous": "previous token",
    "first": "first token",
    "duplicate": "earlier copy of the token",
    "induction": "token after an earlier copy",
}


class Ranked(NamedTuple):
    """A row of a table of nodes; the error is the standard error over prompts, where there are any."""

    node: str
    score: float
    error: float | None


def ranking(result: NodeScores, values: Mapping[str, float], k: int) -> list[Ranked]:
    """The k nodes of largest absolute value among `values`, which are `result.heads()` or `result.mlps()`."""
    errors = standard_errors(result)
    best = sorted(values.items(), key=lambda item: -abs(item[1]) if math.isfinite(item[1]) else 0.0)[:k]
    return [Ranked(name, score, errors.get(name)) for name, score in best]


def standard_errors(result: NodeScores) -> dict[str, float]:
    """Standard error of each score over prompts; empty where a method has no scores per prompt."""
    if result.per_prompt is None or result.per_prompt.shape[1] < 2:
        return {}
    errors = result.per_prompt.float().std(1) / math.sqrt(result.per_prompt.shape[1])
    return dict(zip(result.nodes, errors.tolist(), strict=True))


def node_scores(result: object) -> NodeScores | None:
    """The scores of nodes that a result is or carries."""
    found = result if isinstance(result, NodeScores) else getattr(result, "scores", None)
    return found if isinstance(found, NodeScores) else None


@singledispatch
def figure(result: object) -> go.Figure:
    """The figure of a result. Raises UserError for a type nobody has registered a figure for."""
    inner = node_scores(result)
    if inner is not None:
        return figure(inner)
    raise UserError(f"a {type(result).__name__} has no figure; add one with @workbench.plots.figure.register.")


@singledispatch
def definition(result: object) -> str:
    """What the figure's number is, in words; empty where the result does not say."""
    inner = node_scores(result)
    return inner.definition if inner is not None else ""


class Table(NamedTuple):
    """Words and numbers as they are to be read, by column."""

    title: str
    columns: dict[str, list[str]]


@singledispatch
def tables(result: object) -> list[Table]:
    """What of a result is better read than seen; nothing where nobody has registered any."""
    return []


# ---- scores of nodes ----


@figure.register
def scores_figure(result: NodeScores) -> go.Figure:
    """Heads as a map of layers (across) and heads (down); MLPs as bars below it, on a scale of their own."""
    mlps, errors = result.mlps(), standard_errors(result)
    grid = result.grid().T if result.heads() else torch.empty(0, 0)  # [head, layer]
    n_heads, n_layers = grid.shape[0], max(grid.shape[1], 1 + max((int(name[1:]) for name in mlps), default=-1))
    heat = n_heads * min(28, max(14, 420 // max(n_heads, 1))) if n_heads else 0
    panels = [height for height in (heat, 76 if mlps else 0) if height]
    if not panels:
        raise UserError("there is nothing to draw: no score belongs to a head (a5.h1) or an MLP (m3).")
    inside = sum(panels) + 28 * (len(panels) - 1)
    fig = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        row_heights=panels,
        vertical_spacing=28 / inside if len(panels) > 1 else 0,
    )
    if n_heads:
        _heads(fig, grid, result, errors, heat / inside)
    if mlps:
        _mlps(fig, mlps, errors, row=len(panels))
    fig.update_xaxes(range=[-0.5, n_layers - 0.5], dtick=canvas.step(n_layers, 40), tick0=0)
    fig.update_xaxes(title_text="layer", row=len(panels), col=1)
    return canvas.finish(fig, inside)


def _heads(fig: go.Figure, grid: Tensor, result: NodeScores, errors: Mapping[str, float], height: float) -> None:
    finite = grid[grid.isfinite()].abs()
    limit = (float(finite.max()) if len(finite) else 0.0) or 1.0
    hover = [
        [_hover(head(layer, h), value, errors) for layer, value in enumerate(row)]
        for h, row in enumerate(grid.tolist())
    ]
    colours = {"colorscale": canvas.DIVERGING, "zmin": -limit, "zmax": limit}
    bar = canvas.colorbar(result.unit, height)
    fig.add_trace(canvas.heatmap(grid, hover, **colours, colorbar=bar, name="heads"), row=1, col=1)
    wide = grid.shape[1] <= 36  # otherwise a cell has room for the sign alone
    for name, score in result.top(NAMED):
        if math.isfinite(score) and score:
            layer, h = name[1:].split(".h")
            text = canvas.number(score, canvas.decimals(limit, 2))
            text = text if wide else text[0]
            fig.add_annotation(x=int(layer), y=int(h), text=text, showarrow=False, font=canvas.WRITTEN, row=1, col=1)
    ticks = {"dtick": canvas.step(len(grid), 16), "tick0": 0}
    fig.update_yaxes(title_text="head", autorange="reversed", **ticks, row=1, col=1)


def _mlps(fig: go.Figure, mlps: Mapping[str, float], errors: Mapping[str, float], row: int) -> None:
    error = {"array": [errors.get(name) for name in mlps], "color": "rgba(128,128,128,0.8)", "thickness": 1, "width": 0}
    bars = go.Bar(
        x=[int(name[1:]) for name in mlps],
        y=canvas.cells(torch.tensor(list(mlps.values()))),
        marker_color=[(canvas.POSITIVE if score >= 0 else canvas.NEGATIVE).format(0.85) for score in mlps.values()],
        marker_line_width=0,
        error_y=error if errors else None,
        hovertext=[_hover(name, score, errors) for name, score in mlps.items()],
        hovertemplate="%{hovertext}<extra></extra>",
        name="MLPs",
        showlegend=False,
    )
    fig.add_trace(bars, row=row, col=1)
    fig.update_yaxes(title_text="MLP", nticks=4, zeroline=True, zerolinecolor=canvas.FAINT, row=row, col=1)


def _hover(name: str, value: float, errors: Mapping[str, float]) -> str:
    if not math.isfinite(value):
        return f"{name} no score"
    digits = max(3, canvas.decimals(abs(value), 2))
    return f"{name} {canvas.number(value, digits)}" + (f" ± {errors[name]:.{digits}f}" if name in errors else "")


# ---- logit lens ----


@figure.register
def lens_figure(result: LensResult) -> go.Figure:
    """The metric after each block with one standard deviation over prompts; beside it how often the answer is first."""
    mean, std = result.metric, result.metric_std
    x = [layer - 1 for layer in range(len(mean))]
    where = ["embedding" if layer < 0 else f"after block {layer}" for layer in x]
    pairs = zip(where, mean.tolist(), std.tolist(), strict=True)
    hover = [f"{at}: {canvas.number(value, 3)} ± {spread:.3f}" for at, value, spread in pairs]
    edge = {"x": x, "mode": "lines", "line_width": 0, "hoverinfo": "skip", "showlegend": False}
    line = {
        "x": x,
        "mode": "lines+markers",
        "line": {"color": canvas.POSITIVE.format(1), "width": 2},
        "marker_size": 5,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "showlegend": False,
    }
    fig = make_subplots(rows=1, cols=2, column_widths=[0.6, 0.4], horizontal_spacing=0.09)
    band = {"fill": "tonexty", "fillcolor": canvas.POSITIVE.format(0.18)}
    fig.add_trace(go.Scatter(y=canvas.cells(mean - std), name="mean - std", **edge), row=1, col=1)
    fig.add_trace(go.Scatter(y=canvas.cells(mean + std), name="mean + std", **edge, **band), row=1, col=1)
    fig.add_trace(go.Scatter(y=canvas.cells(mean), name=result.unit, hovertext=hover, **line), row=1, col=1)
    hover = [f"{at}: {value:.0%}" for at, value in zip(where, result.top1.tolist(), strict=True)]
    fig.add_trace(go.Scatter(y=canvas.cells(result.top1), name="top-1", hovertext=hover, **line), row=1, col=2)
    zero = {"zeroline": True, "zerolinecolor": canvas.FAINT}
    fig.update_yaxes(title_text=f"{escape(result.unit)}, mean ± std", **zero, row=1, col=1)
    fig.update_yaxes(title_text="answer is the likeliest token", range=[-0.03, 1.03], tickformat=".0%", row=1, col=2)
    step = canvas.step(len(x), 8)
    ticks = [-1, *range(step if step > 1 else 0, len(x) - 1, step)]
    names = ["embed", *map(str, ticks[1:])]
    fig.update_xaxes(title_text="after block", tickvals=ticks, ticktext=names, range=[-1.5, len(x) - 1.5])
    return canvas.finish(fig, 260)


@definition.register
def _(result: LensResult) -> str:
    return (
        f"{result.unit} with the final norm and the unembedding applied to the residual stream after each block, mean "
        "and standard deviation over prompts; beside it the share of prompts whose right answer is the likeliest token"
    )


def token_map(result: LensResult) -> go.Figure:
    """For the example prompt, the likeliest token at each position after each block, shaded by its probability."""
    probs = result.top_probs
    n_layers, n_positions = probs.shape
    blocks = ["embedding", *(f"after block {layer}" for layer in range(n_layers - 1))]
    hover = [
        [f"{canvas.token(at)} → {canvas.token(read)} {p:.1%}<br>{block}" for at, read, p in zip(*row, strict=True)]
        for block, *row in zip(blocks, [result.tokens] * n_layers, result.top_tokens, probs.tolist(), strict=True)
    ]
    inside = max(200, min(560, 17 * n_layers))
    written = {"texttemplate": "%{text}", "textfont": canvas.WRITTEN} if n_positions <= 20 else {}
    text = [[canvas.token(read, 9) for read in row] for row in result.top_tokens]
    fig = go.Figure(canvas.heatmap(probs, hover, text=text, **written, **canvas.share("probability")))
    fig.update_xaxes(**canvas.token_ticks(result.tokens))
    ticks = list(range(0, n_layers, 2))
    names = ["embed", *(str(tick - 1) for tick in ticks[1:])]
    fig.update_yaxes(title_text="after block", tickvals=ticks, ticktext=names)
    return canvas.finish(fig, inside, bottom=_room_below(n_positions))


# ---- attention ----


@figure.register
def attention_figure(result: AttentionResult) -> go.Figure:
    """One map per class of key: how much each head attends to it."""
    n = len(result.classes)
    rows = math.ceil(n / 2)
    n_heads = next(iter(result.classes.values())).shape[1]
    height = n_heads * min(20, max(9, 300 // n_heads))
    gap = 44
    inside = rows * height + (rows - 1) * gap
    fig = make_subplots(
        rows=rows,
        cols=min(n, 2),
        subplot_titles=[_class_title(name, grid) for name, grid in result.classes.items()],
        horizontal_spacing=0.05,
        vertical_spacing=gap / inside if rows > 1 else 0,
    )
    for i, (name, grid) in enumerate(result.classes.items()):
        row, col = i // 2 + 1, i % 2 + 1
        hover = [
            [f"{head(layer, h)} {value:.3f}" for layer, value in enumerate(values)]
            for h, values in enumerate(grid.T.tolist())
        ]
        fig.add_trace(canvas.heatmap(grid.T, hover, coloraxis="coloraxis", name=name), row=row, col=col)
        below = i + 2 < n  # another map, whose ticks serve both
        fig.update_xaxes(title_text=None if below else "layer", showticklabels=not below, row=row, col=col)
        fig.update_yaxes(title_text="head" if col == 1 else None, row=row, col=col)
    fig.update_xaxes(dtick=canvas.step(len(grid), 16), tick0=0)
    fig.update_yaxes(autorange="reversed", dtick=canvas.step(n_heads, 10), tick0=0)
    fig.update_annotations(font_size=13, yshift=4)
    bar = canvas.colorbar("attention")
    fig.update_layout(coloraxis={"colorscale": canvas.SEQUENTIAL, "cmin": 0, "cmax": 1, "colorbar": bar})
    return canvas.finish(fig, inside, top=34)


@definition.register
def _(_: AttentionResult) -> str:
    return (
        "attention of a head to the named class of earlier positions, averaged over the positions that have such a "
        "class and over prompts; 1 is all of its attention. Where a head looks does not show that it matters"
    )


def pattern_figure(result: AttentionResult, name: str) -> go.Figure:
    """Where head `name` looks on the example prompt: queries down, keys across."""
    layer, h = (int(part) for part in name[1:].split(".h"))
    pattern = result.patterns[layer, h]
    n = len(result.tokens)
    inside = max(240, min(560, 20 * n))
    future = torch.ones(n, n).triu(1).bool()
    hover = [
        [f"{canvas.token(query)} → {canvas.token(key)} {p:.3f}" for key, p in zip(result.tokens, row, strict=True)]
        for query, row in zip(result.tokens, pattern.tolist(), strict=True)
    ]
    seen = pattern.float().masked_fill(future, torch.nan)
    fig = go.Figure(canvas.heatmap(seen, hover, hoverongaps=False, **canvas.share("attention")))
    fig.update_xaxes(title_text="key", **canvas.token_ticks(result.tokens))
    fig.update_yaxes(title_text="query", autorange="reversed", **canvas.token_ticks(result.tokens))
    return canvas.finish(fig, inside, bottom=_room_below(n) + 24, left=110)


def _class_title(name: str, grid: Tensor) -> str:
    title = CLASSES.get(name, escape(name))
    if not grid.isfinite().any():
        return f"{title}: no such position in these prompts"
    layer, h = divmod(int(grid.nan_to_num(-1).argmax()), grid.shape[1])
    return f"{title}: strongest {head(layer, h)}, {float(grid[layer, h]):.2f}"


def _room_below(n_tokens: int) -> int:
    """Token labels are turned where they do not fit side by side."""
    return 40 if n_tokens <= 20 else 80


# ---- curves of what is still computed ----

AXIS = ("tokens", "step")  # of which the first there is


def notes_figure(points: Sequence[Mapping[str, float]], most: int = 4) -> go.Figure:
    """A panel for each of the first numbers noted on the way, over tokens or steps, or else in their order."""
    axis = next((name for name in AXIS if all(name in one for one in points)), None)
    names = [name for name in points[-1] if name not in (*AXIS, "seconds")][:most]
    fig = make_subplots(rows=1, cols=len(names), subplot_titles=[escape(name) for name in names])
    for column, name in enumerate(names, 1):
        some = [(one[axis] if axis else i, one[name]) for i, one in enumerate(points) if name in one]
        x, y = (canvas.cells(torch.tensor(values, dtype=torch.float64)) for values in zip(*some, strict=True))
        line = {"color": canvas.POSITIVE.format(0.9), "width": 2}
        fig.add_trace(
            go.Scatter(
                x=x, y=y, mode="lines+markers", line=line, marker_size=4, showlegend=False,
                hovertemplate=f"%{{x:,.6g}} {axis or ''}: %{{y:.4g}}<extra>{escape(name)}</extra>",
            ), row=1, col=column,
        )  # fmt: skip
        fig.update_xaxes(title_text=axis or "", nticks=4, row=1, col=column)
        fig.update_yaxes(nticks=4, row=1, col=column)
    return canvas.finish(fig, 160, top=30)
