"""Figures of SAEs: how training went, and how good they came out."""

from __future__ import annotations

import math
from html import escape

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from saes.latents import Latents
from saes.sae import SAE
from saes.training_run import SaeTraining
from workbench import canvas
from workbench.plots import Table, definition, figure, tables

SHADES = (canvas.POSITIVE, canvas.NEGATIVE, "rgba(128,128,128,{})")
SAMPLED = 2048  # latents compared with all others
LINES = ("solid", "dash", "dot", "dashdot")


@figure.register
def training_figure(result: SaeTraining) -> go.Figure:
    """Error over rows, active and dead latents; beside them what is recovered and what is unexplained."""
    fig = make_subplots(
        rows=2, cols=2, column_widths=[0.6, 0.4], horizontal_spacing=0.26, vertical_spacing=0.14,
        specs=[[{}, {"rowspan": 2}], [{}, None]], row_heights=[0.62, 0.38],
    )  # fmt: skip
    batch = result.about["batch"]
    for i, (name, curve) in enumerate(result.curves.items()):
        million = canvas.cells(curve["step"] * batch / 1e6)
        line = {"color": SHADES[i % len(SHADES)].format(0.9), "dash": LINES[i // len(SHADES) % len(LINES)], "width": 2}
        for row, key in ((1, "error"), (2, "dead")):
            fig.add_trace(
                go.Scatter(
                    x=million, y=canvas.cells(curve[key]), name=escape(name), line=line, mode="lines",
                    legendgroup=name, showlegend=row == 1,
                    hovertemplate="%{x:.2f} M rows: %{y:.3g}<extra>" + f"{key}, {escape(name)}</extra>",
                ), row=row, col=1,
            )  # fmt: skip
    names = [escape(name) for name in result.quality]
    for key, colour in (("recovered", canvas.POSITIVE), ("fvu", canvas.NEGATIVE)):
        fig.add_trace(
            go.Bar(
                x=[getattr(one, key) for one in result.quality.values()], y=names, orientation="h", legend="legend2",
                name={"recovered": "loss recovered", "fvu": "variance unexplained"}[key],
                marker={"color": colour.format(0.85), "line_width": 0}, hovertemplate="%{y}: %{x:.3f}<extra></extra>",
            ), row=1, col=2,
        )  # fmt: skip
    fig.update_yaxes(title_text="squared error", type="log", row=1, col=1)
    fig.update_yaxes(title_text="dead", range=[-0.03, 1.03], row=2, col=1)
    fig.update_xaxes(title_text="million rows", row=2, col=1)
    fig.update_xaxes(range=[min(0.0, *(one.recovered for one in result.quality.values())), 1.03], row=1, col=2)
    fig.update_yaxes(automargin=True, row=1, col=2)
    fig.update_layout(
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        legend2={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )
    return canvas.finish(fig, 360, top=40)


@tables.register
def training_tables(result: SaeTraining) -> list[Table]:
    """How good each SAE came out."""
    some = list(result.quality.values())
    columns = {"hook point": list(result.quality), "rows": [f"{one.rows:,}" for one in some]}
    for key, title in (
        ("l0", "active latents"), ("fvu", "variance unexplained"), ("dead", "dead"), ("loss", "loss of the model"),
        ("spliced", "with the SAE"), ("without", "with zeros"), ("recovered", "loss recovered"),
    ):  # fmt: skip
        columns[title] = [f"{getattr(one, key):.3f}" for one in some]
    return [Table("On held-out text", columns)]


@definition.register
def _(result: SaeTraining) -> str:
    return result.definition


@figure.register
def density_figure(result: Latents) -> go.Figure:
    """How many latents are active how often; lines: those that were looked at."""
    share = result.density[result.density > 0].log10()
    counts, edges = torch.histogram(share, 40)
    middle = (edges[1:] + edges[:-1]) / 2
    fig = go.Figure(
        go.Bar(
            x=canvas.cells(middle), y=canvas.cells(counts), width=float(edges[1] - edges[0]), marker_line_width=0,
            marker_color=canvas.POSITIVE.format(0.6), showlegend=False, customdata=canvas.cells(10**middle),
            hovertemplate="%{customdata:.2g} of positions: %{y} latents<extra></extra>",
        )
    )  # fmt: skip
    for one in result.latents:
        if one.density > 0:
            fig.add_vline(
                x=math.log10(one.density), line={"color": canvas.NEGATIVE.format(0.9), "width": 1},
                annotation={"text": str(one.latent), "font_size": 10, "textangle": -90, "yanchor": "top"},
            )  # fmt: skip
    ticks = range(math.floor(float(edges[0])), math.ceil(float(edges[-1])) + 1)
    fig.update_xaxes(
        title_text="share of positions at which a latent is active",
        tickvals=list(ticks), ticktext=[f"{10.0**tick:g}" for tick in ticks],
    )  # fmt: skip
    fig.update_yaxes(title_text="latents")
    return canvas.finish(fig, 300, top=20)


@definition.register
def _(result: Latents) -> str:
    return result.definition


@figure.register
def sae_figure(sae: SAE) -> go.Figure:
    """How alike decoder rows are: each latent's nearest other one, beside that of random rows of as many dimensions."""
    own = _nearest(sae.W_dec)
    drawn = torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(0))
    fig = go.Figure()
    for values, name, colour in ((own, "its latents", canvas.POSITIVE), (_nearest(drawn), "random", canvas.NEGATIVE)):
        fig.add_histogram(
            x=canvas.cells(values), name=name, marker={"color": colour.format(0.6), "line_width": 0},
            xbins={"start": 0.0, "end": 1.0001, "size": 0.02}, hovertemplate="cosine %{x}: %{y} latents<extra></extra>",
        )  # fmt: skip
    fig.update_xaxes(title_text="cosine of a latent's decoder row to the nearest other one", range=[0, 1])
    fig.update_yaxes(title_text="latents")
    fig.update_layout(barmode="overlay", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return canvas.finish(fig, 240, top=32)


@definition.register
def _(sae: SAE) -> str:
    of = f"all {sae.n_latents:,}" if sae.n_latents <= SAMPLED else f"{SAMPLED:,} of {sae.n_latents:,}"
    return f"{of} latents by the cosine of their decoder row to the nearest other one"


def _nearest(rows: Float[Tensor, "latent d_out"]) -> Float[Tensor, " some"]:
    """Of evenly spaced latents, as many as can be compared with all others while somebody waits."""
    unit = rows.float() / rows.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    some = torch.arange(len(unit)) if len(unit) <= SAMPLED else torch.linspace(0, len(unit) - 1, SAMPLED).long()
    cosine: Tensor = unit[some] @ unit.T
    cosine[torch.arange(len(some)), some] = -1.0
    return cosine.amax(-1)
