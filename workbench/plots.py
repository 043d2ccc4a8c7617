"""Figures of results, one function per type of result: `figure(result)`.

Every figure is transparent and takes its text colour from where it is shown, so it works on light and dark pages.
Blue is positive, orange negative (told apart by every common form of colour blindness), the range is symmetric, and
the sign is always written too: in the strongest cells, in the hover text, or by the direction of a bar. Tokens are
escaped, as Plotly reads a little HTML in any text.

A package draws its own results with `@figure.register`; a result that carries `scores` is drawn as its scores.
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

from workbench.errors import UserError
from workbench.lenses import AttentionResult, LensResult
from workbench.scores import NodeScores, head

POSITIVE, NEGATIVE = "rgba(26,115,200,{})", "rgba(226,98,16,{})"
# Zero is nearly transparent rather than white: a white cell glares on a dark page. The ends keep some transparency
# too, so that text in the page's own colour stays readable on them.
DIVERGING = [
    [0.0, NEGATIVE.format(0.85)],
    [0.25, NEGATIVE.format(0.45)],
    [0.5, "rgba(128,128,128,0.09)"],
    [0.75, POSITIVE.format(0.45)],
    [1.0, POSITIVE.format(0.85)],
]
SEQUENTIAL = [[0.0, "rgba(128,128,128,0.09)"], [0.5, POSITIVE.format(0.45)], [1.0, POSITIVE.format(0.85)]]
FAINT = "rgba(128,128,128,0.25)"
THEME = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12, "color": "#7d858f"},  # readable on white and on black; the app puts its own in its place
        "xaxis": {"showgrid": False, "zeroline": False},
        "yaxis": {"showgrid": False, "zeroline": False},
    }
)
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


# ---- scores of nodes ----


@figure.register
def scores_figure(result: NodeScores) -> go.Figure:
    """Heads as a map of layers (across) and heads (down); MLPs as bars below it, on a scale of their own."""
    mlps, errors = result.mlps(), standard_errors(result)
    grid = result.grid().T if result.heads() else torch.empty(0, 0)  # [head, layer]
    n_heads, n_layers = grid.shape[0], max(grid.shape[1], 1 + max((int(name[1:]) for name in mlps), default=-1))
    heat = n_heads * min(28, max(14, 420 // max(n_heads, 1))) if n_heads else 0
    panels = [height for height in (heat, 84 if mlps else 0) if height]
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
        _heads(fig, grid, result, errors, bar_length=heat / inside)
    if mlps:
        _mlps(fig, mlps, errors, row=len(panels))
    fig.update_xaxes(range=[-0.5, n_layers - 0.5], dtick=_step(n_layers, 40), tick0=0)
    fig.update_xaxes(title_text="layer", row=len(panels), col=1)
    return _finish(fig, inside)


def _heads(fig: go.Figure, grid: Tensor, result: NodeScores, errors: Mapping[str, float], bar_length: float) -> None:
    top = [(name, score) for name, score in result.top(NAMED) if math.isfinite(score) and score]
    limit = _limit(grid)
    text = [
        [_hover(head(layer, h), value, errors) for layer, value in enumerate(row)]
        for h, row in enumerate(grid.tolist())
    ]
    fig.add_trace(
        go.Heatmap(
            z=_cells(grid),
            text=text,
            hovertemplate="%{text}<extra></extra>",
            colorscale=DIVERGING,
            zmin=-limit,
            zmax=limit,
            xgap=1,
            ygap=1,
            colorbar=_colorbar(result.unit, y=1, yanchor="top", len=bar_length),
            name="heads",
        ),
        row=1,
        col=1,
    )
    wide = grid.shape[1] <= 36  # otherwise a cell has room for the sign alone
    digits = _digits(limit)
    for name, score in top:
        layer, h = name[1:].split(".h")
        written = _signed(score, digits) if wide else _signed(score, 0)[0]
        fig.add_annotation(x=int(layer), y=int(h), text=written, showarrow=False, font_size=10, row=1, col=1)
    n_heads = grid.shape[0]
    fig.update_yaxes(title_text="head", autorange="reversed", dtick=_step(n_heads, 16), tick0=0, row=1, col=1)


def _mlps(fig: go.Figure, mlps: Mapping[str, float], errors: Mapping[str, float], row: int) -> None:
    bars = [
        [_signed_colour(score) for score in mlps.values()],
        [_hover(name, score, errors) for name, score in mlps.items()],
    ]
    fig.add_trace(
        go.Bar(
            x=[int(name[1:]) for name in mlps],
            y=_cells(torch.tensor(list(mlps.values()))),
            marker_color=bars[0],
            marker_line_width=0,
            hovertext=bars[1],
            hovertemplate="%{hovertext}<extra></extra>",
            error_y={
                "array": [errors[name] for name in mlps],
                "color": "rgba(128,128,128,0.8)",
                "thickness": 1,
                "width": 0,
            }
            if errors
            else None,
            name="MLPs",
            showlegend=False,
        ),
        row=row,
        col=1,
    )
    fig.update_yaxes(title_text="MLP", nticks=4, zeroline=True, zerolinecolor=FAINT, row=row, col=1)


# ---- logit lens ----


@figure.register
def lens_figure(result: LensResult) -> go.Figure:
    """The metric after each block with one standard deviation over prompts; beside it how often the answer is first."""
    fig = make_subplots(rows=1, cols=2, column_widths=[0.6, 0.4], horizontal_spacing=0.09)
    mean, std = result.metric, result.metric_std
    x = [layer - 1 for layer in range(len(mean))]
    where = ["embedding" if layer < 0 else f"after block {layer}" for layer in x]
    band = {"mode": "lines", "line_width": 0, "hoverinfo": "skip", "showlegend": False}
    fig.add_trace(go.Scatter(x=x, y=_cells(mean - std), name="mean - std", **band), row=1, col=1)
    fig.add_trace(
        go.Scatter(
            x=x, y=_cells(mean + std), name="mean + std", fill="tonexty", fillcolor=POSITIVE.format(0.18), **band
        ),
        row=1,
        col=1,
    )
    for col, (values, name) in enumerate([(mean, result.unit), (result.top1, "top-1")], start=1):
        spread = std.tolist() if col == 1 else None
        text = [
            f"{at}: {_signed(value, 3) if spread else f'{value:.0%}'}{f' ± {spread[i]:.3f}' if spread else ''}"
            for i, (at, value) in enumerate(zip(where, values.tolist(), strict=True))
        ]
        fig.add_trace(
            go.Scatter(
                x=x,
                y=_cells(values),
                name=name,
                mode="lines+markers",
                line={"color": POSITIVE.format(1), "width": 2},
                marker_size=5,
                hovertext=text,
                hovertemplate="%{hovertext}<extra></extra>",
                showlegend=False,
            ),
            row=1,
            col=col,
        )
    fig.update_yaxes(title_text=f"{escape(result.unit)}, mean ± std", zeroline=True, zerolinecolor=FAINT, row=1, col=1)
    fig.update_yaxes(title_text="answer is the likeliest token", range=[-0.03, 1.03], tickformat=".0%", row=1, col=2)
    step = _step(len(x), 12)
    ticks = [-1, *range(step - 1 if step > 1 else 0, len(x) - 1, step)]
    fig.update_xaxes(
        title_text="after block", tickvals=ticks, ticktext=["embed", *map(str, ticks[1:])], range=[-1.5, len(x) - 1.5]
    )
    return _finish(fig, 260)


def token_map(result: LensResult) -> go.Figure:
    """For the example prompt, the likeliest token at each position after each block, shaded by its probability."""
    probs = result.top_probs
    n_layers, n_positions = probs.shape
    where = ["embed" if layer < 0 else str(layer) for layer in range(-1, n_layers - 1)]
    hover = [
        [
            f"{_token(token)} → {_token(read)} {p:.1%}<br>{'embedding' if layer == 'embed' else f'after block {layer}'}"
            for token, read, p in zip(result.tokens, row, some, strict=True)
        ]
        for layer, row, some in zip(where, result.top_tokens, probs.tolist(), strict=True)
    ]
    written = n_positions <= 20
    fig = go.Figure(
        go.Heatmap(
            z=_cells(probs),
            text=[[_token(token, 9) for token in row] for row in result.top_tokens],
            texttemplate="%{text}" if written else None,
            textfont_size=10,
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            colorbar=_colorbar("probability"),
        )
    )
    _token_axis(fig.update_xaxes, result.tokens)
    step = _step(n_layers, 16)
    fig.update_yaxes(title_text="after block", tickvals=list(range(0, n_layers, step)), ticktext=where[::step])
    return _finish(fig, max(200, min(560, 17 * n_layers)), bottom=90)


# ---- attention ----


@figure.register
def attention_figure(result: AttentionResult) -> go.Figure:
    """One map per class of key: how much each head attends to it."""
    n = len(result.classes)
    rows = math.ceil(n / 2)
    n_heads = next(iter(result.classes.values())).shape[1]
    height = n_heads * min(20, max(9, 300 // n_heads))
    gap = 62
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
        fig.add_trace(
            go.Heatmap(
                z=_cells(grid.T),
                text=[
                    [f"{head(layer, h)} {value:.3f}" for layer, value in enumerate(values)]
                    for h, values in enumerate(grid.T.tolist())
                ],
                hovertemplate="%{text}<extra></extra>",
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                name=name,
            ),
            row=row,
            col=col,
        )
        fig.update_xaxes(
            title_text="layer" if row == rows else None, dtick=_step(len(grid), 16), tick0=0, row=row, col=col
        )
        fig.update_yaxes(
            title_text="head" if col == 1 else None,
            autorange="reversed",
            dtick=_step(n_heads, 10),
            tick0=0,
            row=row,
            col=col,
        )
    fig.update_annotations(font_size=13, yshift=4)
    fig.update_layout(
        coloraxis={
            "colorscale": SEQUENTIAL,
            "cmin": 0,
            "cmax": 1,
            "colorbar": _colorbar("attention", y=1, yanchor="top"),
        }
    )
    return _finish(fig, inside, top=34)


def pattern_figure(result: AttentionResult, name: str) -> go.Figure:
    """Where head `name` looks on the example prompt: queries down, keys across."""
    layer, h = (int(part) for part in name[1:].split(".h"))
    pattern = result.patterns[layer, h]
    n = len(result.tokens)
    future = torch.ones(n, n).triu(1).bool()
    hover = [
        [f"{_token(query)} → {_token(key)} {p:.3f}" for key, p in zip(result.tokens, row, strict=True)]
        for query, row in zip(result.tokens, pattern.tolist(), strict=True)
    ]
    fig = go.Figure(
        go.Heatmap(
            z=_cells(pattern.float().masked_fill(future, torch.nan)),
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            hoverongaps=False,
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            colorbar=_colorbar("attention"),
        )
    )
    _token_axis(fig.update_xaxes, result.tokens)
    _token_axis(fig.update_yaxes, result.tokens)
    fig.update_xaxes(title_text="key")
    fig.update_yaxes(title_text="query", autorange="reversed")
    return _finish(fig, max(240, min(560, 20 * n)), bottom=90, left=110)


# ---- parts ----


def _class_title(name: str, grid: Tensor) -> str:
    title = CLASSES.get(name, escape(name))
    if not grid.isfinite().any():
        return f"{title}: no such position in these prompts"
    layer, h = divmod(int(grid.nan_to_num(-1).argmax()), grid.shape[1])
    return f"{title}: strongest {head(layer, h)}, {float(grid[layer, h]):.2f}"


def _finish(fig: go.Figure, inside: float, *, top: int = 12, bottom: int = 44, left: int = 56) -> go.Figure:
    return fig.update_layout(
        template=THEME,
        height=inside + top + bottom,
        margin={"t": top, "b": bottom, "l": left, "r": 12},
        dragmode=False,
        bargap=0.25,
    )


def _colorbar(title: str, **more: object) -> dict[str, object]:
    return {
        "title": {"text": escape(title), "side": "right"},
        "thickness": 10,
        "outlinewidth": 0,
        "nticks": 5,
        "xpad": 8,
        "ypad": 0,
        **more,
    }


def _token_axis(update: object, tokens: Sequence[str]) -> None:
    assert callable(update)
    update(tickvals=list(range(len(tokens))), ticktext=[_token(token, 12) for token in tokens], tickfont_size=10)


def _token(token: str, width: int = 40) -> str:
    """A token as Plotly text: white space made visible where it is all there is, and no markup."""
    shown = token.replace("\n", "↵").replace("\t", "⇥")
    shown = shown.strip() or shown.replace(" ", "␣")
    return escape(shown if len(shown) <= width else shown[: width - 1] + "…")


def _cells(values: Tensor) -> list[object]:
    """Plain numbers, None for what is not one, as JSON has no NaN."""

    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value if isinstance(value, float) and math.isfinite(value) else None

    return [plain(value) for value in values.float().tolist()]


def _hover(name: str, value: float, errors: Mapping[str, float]) -> str:
    if not math.isfinite(value):
        return f"{name} no score"
    digits = max(3, _digits(abs(value)))
    return f"{name} {_signed(value, digits)}" + (f" ± {errors[name]:.{digits}f}" if name in errors else "")


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _digits(limit: float) -> int:
    """Decimals that give a number of this size two significant digits."""
    return max(0, 1 - math.floor(math.log10(limit))) if limit else 0


def _signed_colour(score: float) -> str:
    return (POSITIVE if score >= 0 else NEGATIVE).format(0.85)


def _limit(values: Tensor) -> float:
    finite = values[values.isfinite()].abs()
    return float(finite.max()) or 1.0 if len(finite) else 1.0


def _step(n: int, most: int) -> int:
    """Distance of ticks such that at most about `most` are drawn."""
    return next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, 100, 1000) if n / step <= most or step == 1000)
