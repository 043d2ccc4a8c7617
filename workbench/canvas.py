"""What all figures share: one theme, two colour scales, and how numbers and tokens are written.

Figures are transparent and take their text colour from where they are shown, so they work on light and dark pages.
Blue is positive and orange negative, which every common form of colour blindness tells apart, and the sign is always
written too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

POSITIVE, NEGATIVE = "rgba(26,115,200,{})", "rgba(226,98,16,{})"
# Zero is nearly transparent rather than white: a white cell glares on a dark page. The ends keep some transparency
# too, so that text in the page's own colour stays readable on them.
ZERO = "rgba(128,128,128,0.09)"
DIVERGING = [
    [0.0, NEGATIVE.format(0.85)],
    [0.25, NEGATIVE.format(0.45)],
    [0.5, ZERO],
    [0.75, POSITIVE.format(0.45)],
    [1.0, POSITIVE.format(0.85)],
]
SEQUENTIAL = [[0.0, ZERO], [0.5, POSITIVE.format(0.45)], [1.0, POSITIVE.format(0.85)]]
FAINT = "rgba(128,128,128,0.35)"
# What is written into cells of any shade: dark with a light halo, until `written_in` is told the page's colour.
WRITTEN = {"size": 10, "color": "#20262d", "shadow": "0 0 2px #fff, 0 0 3px #fff"}
THEME = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12, "color": "#7d858f"},  # readable on white and on black; the app puts its own in its place
        "xaxis": {"showgrid": False, "zeroline": False},
        "yaxis": {"showgrid": False, "zeroline": False},
    }
)


def written_in(fig: go.Figure, color: str) -> go.Figure:
    """The figure with all that is written into its cells, and above them, in the page's own text colour."""
    fig.update_annotations(font={"color": color, "shadow": "none"})
    return fig.update_traces(textfont={"color": color, "shadow": "none"}, selector={"type": "heatmap"})


def finish(fig: go.Figure, inside: float, *, top: int = 12, bottom: int = 54, left: int = 56) -> go.Figure:
    """Theme, margins, and a height that leaves `inside` pixels for the panels."""
    fig.update_xaxes(ticks="").update_yaxes(ticks="")
    return fig.update_layout(
        template=THEME,
        height=inside + top + bottom,
        margin={"t": top, "b": bottom, "l": left, "r": 12},
        dragmode=False,
        bargap=0.25,
    )


def heatmap(values: Tensor, hover: list[list[str]], **more: Any) -> go.Heatmap:
    """A map [down, across]; cells that are not numbers stay empty."""
    return go.Heatmap(
        z=cells(values), hovertext=hover, hovertemplate="%{hovertext}<extra></extra>", xgap=1, ygap=1, **more
    )


def share(title: str) -> dict[str, Any]:
    """The colours of a map of values between 0 and 1."""
    return {"colorscale": SEQUENTIAL, "zmin": 0, "zmax": 1, "colorbar": colorbar(title)}


def colorbar(title: str, height: float = 1.0) -> dict[str, Any]:
    """Beside the top of the figure, as high as the map it explains: a share of all panels."""
    return {
        "title": {"text": escape(title), "side": "right"},
        "thickness": 10,
        "outlinewidth": 0,
        "nticks": 5,
        "xpad": 8,
        "ypad": 0,
        "lenmode": "fraction",
        "len": height,
        "y": 1,
        "yanchor": "top",
    }


def token(text: str, width: int = 40) -> str:
    """A token as Plotly reads text: no markup, and white space made visible where there is nothing else."""
    shown = text.replace("\n", "↵").replace("\t", "⇥")
    shown = shown.strip() or shown.replace(" ", "␣")
    return escape(shown if len(shown) <= width else shown[: width - 1] + "…")


def token_ticks(tokens: Sequence[str]) -> dict[str, Any]:
    """An axis of tokens; by position, as tokens repeat."""
    return {
        "tickvals": list(range(len(tokens))),
        "ticktext": [token(text, 12) for text in tokens],
        "tickfont": {"size": 10},
    }


def cells(values: Tensor) -> list[Any]:
    """Plain numbers, and None for what is not one: JSON has no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value if math.isfinite(value) else None

    return [plain(value) for value in values.tolist()]


def number(value: float, decimals: int, *, signed: bool = True) -> str:
    """A number with a true minus."""
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−") if math.isfinite(value) else "–"


def numbers(values: Sequence[float], *, signed: bool = True) -> list[str]:
    """A column of numbers, with as many decimals as give the largest three significant digits."""
    shown = decimals(max((abs(value) for value in values if math.isfinite(value)), default=0.0), 3)
    return [number(value, shown, signed=signed) for value in values]


def decimals(size: float, significant: int) -> int:
    """Decimals that give a number of this size so many significant digits."""
    return min(8, max(0, significant - 1 - math.floor(math.log10(size)))) if size else 0


def step(n: int, most: int) -> int:
    """Distance of ticks such that no more than about `most` are drawn."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if n / step <= most or step == 1000)
