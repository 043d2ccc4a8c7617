"""Figures of weight-sparse models: how training went, and what a bridge carries over."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits.sparse.bridge_edits import DoseResponse
from circuits.sparse.bridge_run import BridgeResult
from circuits.sparse.training_run import SOLVED, SparseTraining
from workbench import canvas
from workbench.plots import definition, figure

GREY = "rgba(128,128,128,{})"


@figure.register
def training_figure(result: SparseTraining) -> go.Figure:
    """Loss and density over tokens; beside them the accuracy on each task."""
    names = sorted(result.accuracy, key=lambda name: result.accuracy[name])
    fig = make_subplots(
        rows=2, cols=2, column_widths=[0.55, 0.45], horizontal_spacing=0.22, vertical_spacing=0.12,
        row_heights=[0.7, 0.3], specs=[[{}, {"rowspan": 2}], [{}, None]], shared_xaxes=True,
    )  # fmt: skip
    million = result.curve["tokens"] / 1e6
    for name, row, colour in (
        ("loss", 1, GREY), ("held_out_loss", 1, canvas.POSITIVE), ("density", 2, canvas.POSITIVE),
        ("dead_neurons", 2, canvas.NEGATIVE),
    ):  # fmt: skip
        title = name.replace("_", " ").replace("held out", "held-out")
        fig.add_trace(
            go.Scatter(
                x=canvas.cells(million), y=canvas.cells(result.curve[name]), name=title,
                mode="lines" if name == "loss" else "lines+markers", marker={"size": 4},  # of one batch: noise
                line={"color": colour.format(0.35 if name == "loss" else 0.9), "width": 1 if name == "loss" else 2},
                hovertemplate="%{x:.2f} M tokens: %{y:.3g}<extra>" + title + "</extra>",
            ), row=row, col=1,
        )  # fmt: skip
    fig.add_trace(
        go.Bar(
            x=[result.accuracy[name] for name in names], y=[escape(name) for name in names], orientation="h",
            marker_color=[canvas.POSITIVE.format(0.85 if result.accuracy[name] >= SOLVED else 0.35) for name in names],
            marker_line_width=0, showlegend=False, hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        ), row=1, col=2,
    )  # fmt: skip
    fig.add_vline(x=SOLVED, line={"color": canvas.FAINT, "dash": "dot"}, row=1, col=2)
    fig.update_xaxes(title_text="million tokens", row=2, col=1)
    fig.update_yaxes(title_text="nats per token", row=1, col=1)
    fig.update_yaxes(title_text="share", range=[0, 1.03], row=2, col=1)
    fig.update_xaxes(title_text="accuracy", range=[0, 1.03], row=1, col=2)
    fig.update_yaxes(tickfont={"size": 10}, automargin=True, row=1, col=2)
    fig.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return canvas.finish(fig, 380, top=30)


@definition.register
def _(result: SparseTraining) -> str:
    return result.definition


@figure.register
def bridge_figure(result: BridgeResult) -> go.Figure:
    """Agreement through the bridges over tokens, and in the end at every boundary."""
    fig = make_subplots(
        rows=2, cols=2, horizontal_spacing=0.12, vertical_spacing=0.12, shared_xaxes="columns", shared_yaxes="rows"
    )
    last = len(next(iter(result.agreement.values()))) - 1
    places = [f"{i // 2}.{'mlp' if i % 2 else 'attn'}" if i < last else "end" for i in range(last + 1)]
    million = canvas.cells(result.curve["tokens"] / 1e6)
    for direction, colour in (("to_sparse", canvas.POSITIVE), ("to_dense", canvas.NEGATIVE)):
        for row, kind in ((1, "kl"), (2, "nmse")):
            for col, x, y in (
                (1, million, result.curve[f"{kind}_{direction}"]),
                (2, places, result.agreement[f"{kind}_{direction}"]),
            ):
                fig.add_trace(
                    go.Scatter(
                        x=x, y=canvas.cells(y), name=direction.replace("_", " "), mode="lines+markers",
                        line={"color": colour.format(0.9), "width": 2}, marker={"size": 4},
                        showlegend=row == col == 1, legendgroup=direction,
                        hovertemplate="%{x}: %{y:.3g}<extra>" + f"{kind}, {direction.replace('_', ' ')}</extra>",
                    ), row=row, col=col,
                )  # fmt: skip
    fig.update_yaxes(title_text="kl, nats per token", row=1, col=1)
    fig.update_yaxes(title_text="nmse", row=2, col=1)
    fig.update_yaxes(rangemode="tozero")
    fig.update_xaxes(title_text="million tokens", row=2, col=1)
    fig.update_xaxes(title_text="before", row=2, col=2)
    fig.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return canvas.finish(fig, 380, top=30)


@definition.register
def _(result: BridgeResult) -> str:
    return result.definition


@figure.register
def dose_figure(result: DoseResponse) -> go.Figure:
    """Probability of the counterfactual answer over strength. Bands: 5 to 95 % of other channels, as they are and at
    the node's size; dotted: on the counterfactual prompt itself."""
    strengths = list(result.strengths)
    fig = go.Figure()
    for matched, name in ((True, "other channels, same size"), (False, "other channels")):
        low, high = result.band(matched=matched)
        edge = {"x": strengths, "mode": "lines", "line_width": 0, "hoverinfo": "skip"}
        fig.add_trace(go.Scatter(y=canvas.cells(low), showlegend=False, **edge))
        colour = GREY.format(0.15 if matched else 0.3)
        fig.add_trace(go.Scatter(y=canvas.cells(high), fill="tonexty", fillcolor=colour, name=name, **edge))
    fig.add_trace(
        go.Scatter(
            x=strengths, y=canvas.cells(result.mean), mode="lines+markers", name=escape(result.node),
            line={"color": canvas.POSITIVE.format(1), "width": 2},
            hovertemplate="strength %{x}: %{y:.3f}<extra></extra>",
        )
    )  # fmt: skip
    fig.add_hline(y=float(result.goal.mean()), line={"color": canvas.FAINT, "dash": "dot"})
    fig.update_xaxes(title_text="strength")
    fig.update_yaxes(title_text="P(counterfactual answer)", range=[-0.02, 1.02])
    fig.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return canvas.finish(fig, 300, top=30)


@definition.register
def _(result: DoseResponse) -> str:
    return (
        f"{result.summary()['definition']}; node {result.node} on {result.task}; bands: 5 to 95 % of the "
        f"{len(result.controls)} other channels' means"
    )
