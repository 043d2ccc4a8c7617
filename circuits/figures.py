"""Figures of what circuits are found by, and the words for their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from circuits.intervention import AttentionIntervention, Outcome
from circuits.node_patching import TOGETHER, PatchedNodes
from circuits.path_patching import head_of, layer_of
from circuits.reuse import Overlap
from circuits.subspaces import AttentionClasses, DirectTotal, SubspaceResult
from workbench import canvas
from workbench.lenses import AttentionResult
from workbench.plots import attention_figure, definition, figure

# Told apart by brightness too, not by hue alone.
LINES = ("rgba(26,115,200,1)", "rgba(226,98,16,1)", "rgba(128,128,128,1)", "rgba(64,160,112,1)", "rgba(150,90,180,1)")
NAMED = 12  # nodes with their name beside them
ZERO = {"zeroline": True, "zerolinecolor": canvas.FAINT}

# ---- overlap ----


@figure.register
def overlap_figure(result: Overlap) -> go.Figure:
    """Which heads are in how many of the circuits; beside it the ratio, and what it would be by chance."""
    member = result.members.any(1)
    layers, places = [layer_of(name) for name in result.heads], [head_of(name) for name in result.heads]
    grid = torch.full((max(places) + 1, max(layers) + 1), torch.nan)
    hover = [["" for _ in range(grid.shape[1])] for _ in range(grid.shape[0])]
    for i, name in enumerate(result.heads):
        grid[places[i], layers[i]] = float(member[:, i].double().mean())
        having = [circuit for circuit, has in zip(result.names, member[:, i].tolist(), strict=True) if has]
        hover[places[i]][layers[i]] = escape(f"{name}: {', '.join(having) or 'none'}")
    height = max(160, min(420, len(grid) * min(26, max(12, 360 // len(grid)))))
    titles = ["dark: in every circuit; pale: in some", "shared / union"]
    fig = make_subplots(rows=1, cols=2, column_widths=[0.66, 0.34], horizontal_spacing=0.2, subplot_titles=titles)
    fig.update_annotations(font_size=13, yshift=4)
    colours = {"colorscale": canvas.SEQUENTIAL, "zmin": 0, "zmax": 1, "showscale": False}
    fig.add_trace(canvas.heatmap(grid, hover, name="heads", **colours), row=1, col=1)
    ratios = {"found": result.ratio} | {name: null.mean for name, null in result.nulls.items()} | result.halves
    spread: dict[str, tuple[float | None, float | None]] = dict.fromkeys(ratios, (None, None))
    if result.interval:
        spread["found"] = (max(0.0, result.interval[1] - result.ratio), max(0.0, result.ratio - result.interval[0]))
    for name, null in result.nulls.items():
        spread[name] = (null.high - null.mean, null.mean - null.low)
    fig.add_trace(_bars(ratios, spread), row=1, col=2)
    fig.update_xaxes(title_text="layer", dtick=canvas.step(grid.shape[1], 20), tick0=0, row=1, col=1)
    fig.update_yaxes(title_text="head", autorange="reversed", dtick=canvas.step(len(grid), 16), tick0=0, row=1, col=1)
    fig.update_xaxes(range=[0, 1.03], row=1, col=2)
    fig.update_yaxes(autorange="reversed", row=1, col=2)
    return canvas.finish(fig, height, top=34)


def _bars(values: dict[str, float], spread: dict[str, tuple[float | None, float | None]]) -> go.Bar:
    up, down = ([spread[name][side] for name in values] for side in range(2))
    hover = [f"{escape(name)}: {canvas.number(value, 3, signed=False)}" for name, value in values.items()]
    return go.Bar(
        x=list(values.values()),
        y=[escape(name) for name in values],
        orientation="h",
        marker_color=[canvas.POSITIVE.format(0.85 if name == "found" else 0.35) for name in values],
        marker_line_width=0,
        error_x={"array": up, "arrayminus": down, "symmetric": False, "color": "rgba(128,128,128,0.8)", "thickness": 1},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        name="ratio",
        showlegend=False,
    )


@definition.register
def _(result: Overlap) -> str:
    return (
        f"{result.definition}. By chance: mean and 95 % of circuits of the same size drawn from all heads (random "
        "heads) or from the same layers; within and across: circuits from one half of the prompts each"
    )


# ---- intervention ----


@figure.register
def intervention_figure(result: AttentionIntervention) -> go.Figure:
    """The metric of each prompt before and after; beside it the accuracy, and that with random heads forced."""
    before, after = result.before.metric, result.after.metric
    fig = make_subplots(rows=1, cols=2, column_widths=[0.6, 0.4], horizontal_spacing=0.12)
    hover = [f"prompt {i}: {b:.3f} → {a:.3f}" for i, (b, a) in enumerate(zip(before, after, strict=True))]
    fig.add_trace(_points(before, after, hover, "prompts"), row=1, col=1)
    fig.add_trace(_line_of_no_change(before), row=1, col=1)
    unit = escape(result.unit)
    fig.update_xaxes(title_text=f"{unit} before", **ZERO, row=1, col=1)
    fig.update_yaxes(title_text=f"{unit} after", **ZERO, row=1, col=1)
    shown: list[tuple[str, Sequence[Outcome], str]] = [
        ("before", [result.before], LINES[2]),
        ("these<br>heads", [result.after], LINES[0]),
        ("random<br>heads", result.controls, LINES[1]),
        ("onto the<br>answer", [result.mirrored], LINES[4]),
    ]
    for name, outcomes, colour in shown:
        trace = go.Scatter(
            x=[name] * len(outcomes),
            y=[outcome.accuracy for outcome in outcomes],
            mode="markers",
            marker={"color": colour, "size": 7, "opacity": 0.7},
            hovertemplate="%{y:.1%}<extra></extra>",
            name=name,
            showlegend=False,
        )
        fig.add_trace(trace, row=1, col=2)
    fig.update_yaxes(title_text="accuracy", range=[-0.03, 1.03], tickformat=".0%", row=1, col=2)
    fig.update_xaxes(range=[-0.6, 3.6], tickangle=0, row=1, col=2)
    return canvas.finish(fig, 300)


@definition.register
def _(result: AttentionIntervention) -> str:
    return result.definition


# ---- attention by class of key ----


@figure.register
def classes_figure(result: AttentionClasses) -> go.Figure:
    """One map per class of key: its share of what each head moves to the last position."""
    fig = attention_figure(AttentionResult(result.weighted, [], torch.empty(*result.written.shape, 0, 0)))
    return fig.update_layout(coloraxis_colorbar_title_text="share of attention × size of value")


@definition.register
def _(_: AttentionClasses) -> str:
    return (
        "share of a head's attention from the last position, each key weighted by the length of what its value writes "
        "through W_O, by class of key; each key is in the first class that fits, and the classes sum to 1; mean over "
        "prompts. Where a head looks does not show that it matters"
    )


# ---- direct and total effect ----


@figure.register
def direct_total_figure(result: DirectTotal) -> go.Figure:
    """Every node by its direct and its total effect; off the line, others make something of what it writes."""
    direct, total = result.direct.scores, result.total.scores
    far = set(torch.maximum(direct.abs(), total.abs()).topk(min(NAMED, len(total))).indices.tolist())
    names = result.total.nodes
    rows = zip(names, direct.tolist(), total.tolist(), strict=True)
    hover = [f"{name}: direct {canvas.number(d, 3)}, total {canvas.number(t, 3)}" for name, d, t in rows]
    points = _points(direct, total, hover, "nodes", [name if i in far else "" for i, name in enumerate(names)])
    fig = go.Figure([points, _line_of_no_change(direct)])
    unit = escape(result.total.unit)
    fig.update_xaxes(title_text=f"direct effect on {unit}", **ZERO)
    fig.update_yaxes(title_text=f"total effect on {unit}", **ZERO)
    return canvas.finish(fig, 380)


@definition.register
def _(result: DirectTotal) -> str:
    return f"across: {result.direct.definition}. Up: {result.total.definition}. On the line all of the effect is direct"


# ---- subspaces ----


@figure.register
def subspace_figure(result: SubspaceResult) -> go.Figure:
    """The metric by how many directions are kept, for the task and its mutations; beside it the first two of them."""
    fig = make_subplots(rows=1, cols=2, column_widths=[0.6, 0.4], horizontal_spacing=0.12)
    places = list(range(len(result.ranks)))
    for i, name in enumerate(result.batches):
        colour = LINES[i % len(LINES)]
        triples = zip(result.ranks, result.metric[i].tolist(), result.error[i].tolist(), strict=True)
        hover = [f"{escape(name)}, {rank} directions: {canvas.number(m, 3)} ± {e:.3f}" for rank, m, e in triples]
        trace = go.Scatter(
            x=places,
            y=canvas.cells(result.metric[i]),
            error_y={"array": canvas.cells(result.error[i]), "thickness": 1, "width": 0},
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker_size=5,
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            name=escape(name),
        )
        fig.add_trace(trace, row=1, col=1)
    # Equal steps: doublings of the rank matter alike, and 0 has a place too.
    fig.update_xaxes(title_text="directions kept", tickvals=places, ticktext=list(map(str, result.ranks)), row=1, col=1)
    fig.update_yaxes(title_text=f"{escape(result.unit)}, mean ± error", **ZERO, row=1, col=1)
    for i, label in enumerate(dict.fromkeys(result.labels)):
        some = result.points[[label == one for one in result.labels]]
        hover = [escape(label)] * len(some)
        trace = _points(some[:, 0], some[:, 1], hover, label)
        trace.marker.color = LINES[i % len(LINES)]
        fig.add_trace(trace, row=1, col=2)
        middle = some[:, :2].median(0).values.tolist()
        place = {"x": middle[0], "y": middle[1], "yshift": 12 * (1 if i % 2 else -1), "row": 1, "col": 2}
        fig.add_annotation(text=escape(label), showarrow=False, font=canvas.WRITTEN, **place)
    fig.update_xaxes(title_text=f"{result.subspaces[0].head}, direction 1", **ZERO, row=1, col=2)
    fig.update_yaxes(title_text="direction 2", **ZERO, row=1, col=2)
    fig.update_layout(legend={"orientation": "h", "y": -0.2})
    return canvas.finish(fig, 300, bottom=84)


@definition.register
def _(result: SubspaceResult) -> str:
    return result.definition


# ---- parts ----


def _points(x: Tensor, y: Tensor, hover: list[str], name: str, text: list[str] | None = None) -> go.Scatter:
    return go.Scatter(
        x=canvas.cells(x),
        y=canvas.cells(y),
        mode="markers+text" if text else "markers",
        text=text,
        textposition="top center",
        marker={"color": canvas.POSITIVE.format(0.6), "size": 6},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        name=escape(name),
        showlegend=False,
    )


def _line_of_no_change(x: Tensor) -> go.Scatter:
    ends = [float(x.min()), float(x.max())]
    faint = {"color": canvas.FAINT, "width": 1, "dash": "dot"}
    return go.Scatter(x=ends, y=ends, mode="lines", line=faint, hoverinfo="skip", showlegend=False, name="no change")


# ---- patched nodes ----


@figure.register
def patched_nodes_figure(result: PatchedNodes) -> go.Figure:
    """How far each node alone, and all together, take the metric from one prompt's to the other's, with 95 %."""
    names = [*result.nodes, TOGETHER] if len(result.nodes) > 1 else [*result.nodes]
    value, low, high = (x[: len(names)] for x in result.share())
    text = [
        f"{escape(name)}: {canvas.number(v, 3)} [{canvas.number(a, 3)}, {canvas.number(b, 3)}]"
        for name, v, a, b in zip(names, value.tolist(), low.tolist(), high.tolist(), strict=True)
    ]
    colours = [canvas.POSITIVE.format(0.85 if name == TOGETHER else 0.5) for name in names]
    error = {"array": canvas.cells(high - value), "arrayminus": canvas.cells(value - low), "thickness": 1, "width": 3}
    bar = go.Bar(
        x=canvas.cells(value), y=[escape(name) for name in names], orientation="h", error_x=error, hovertext=text,
        marker_color=colours, marker_line_width=0, hovertemplate="%{hovertext}<extra></extra>", showlegend=False,
    )  # fmt: skip
    fig = go.Figure(bar)
    fig.add_vline(x=1, line={"color": canvas.FAINT, "dash": "dot"})
    fig.update_xaxes(title_text="share of the way to the other prompt's metric", **ZERO)
    fig.update_yaxes(autorange="reversed", automargin=True)
    return canvas.finish(fig, 60 + 26 * len(names))


@definition.register
def _(result: PatchedNodes) -> str:
    return result.definition
