"""The map of position patching: layers up, tokens or heads across; and its strongest cells as a table."""

from __future__ import annotations

import plotly.graph_objects as go

from circuits.position_patching import Cell, PositionEffects
from workbench import canvas, scores
from workbench.plots import NAMED, Table, definition, figure, tables

SIDE_BY_SIDE, LABELLED = 24, 90  # positions whose labels fit unturned, and at all


@figure.register
def position_figure(result: PositionEffects) -> go.Figure:
    """Blue moves towards the other prompt's answer, orange away from it; the largest are written into their cells."""
    n_layers, n_cells = result.effect.shape
    finite = result.effect[result.effect.isfinite()].abs()
    limit = float(finite.max()) or 1.0
    hover = [
        [f"{_name(result, layer, i)} {canvas.number(value, 3)}" for i, value in enumerate(row)]
        for layer, row in enumerate(result.effect.tolist())
    ]
    colours = {"colorscale": canvas.DIVERGING, "zmin": -limit, "zmax": limit}
    bar = canvas.colorbar("share")
    fig = go.Figure(canvas.heatmap(result.effect, hover, hoverongaps=False, colorbar=bar, **colours))
    digits = canvas.decimals(limit, 2)
    if n_cells <= 36:  # otherwise a cell has no room for its number
        for cell in _written(result, limit / 20):
            text = canvas.number(cell.effect, digits)
            fig.add_annotation(x=cell.at, y=cell.layer, text=text, showarrow=False, font=canvas.WRITTEN)
    fig.update_yaxes(title_text="layer", dtick=canvas.step(n_layers, 16), tick0=0)
    inside = n_layers * min(30, max(13, 420 // n_layers))
    if result.heads:
        fig.update_xaxes(title_text="head", dtick=canvas.step(n_cells, 40), tick0=0)
        return canvas.finish(fig, inside)
    fig.update_xaxes(**_ticks(result), range=[-0.5, n_cells - 0.5])
    return canvas.finish(fig, inside, bottom=50 if n_cells <= SIDE_BY_SIDE else 130)


def _written(result: PositionEffects, least: float) -> list[Cell]:
    """The largest heads; of positions the largest layer of each, as a residual stream stays alike over many."""
    found: dict[object, Cell] = {}
    for cell in result.strongest(result.effect.numel()):
        if abs(cell.effect) >= least:
            found.setdefault((cell.layer, cell.at) if result.heads else cell.at, cell)
    return list(found.values())[:NAMED]


def _ticks(result: PositionEffects) -> dict[str, object]:
    """Tokens by position; where the prompts differ the clean one over the corrupted one, bold and coloured."""
    n, differing = len(result.clean_tokens), set(result.differing)
    turned = n > SIDE_BY_SIDE
    width = 12 if turned or n <= 14 else 8
    shown = range(n) if n <= LABELLED else sorted({*differing, *range(0, n, canvas.step(n, LABELLED // 2)), n - 1})

    def label(i: int) -> str:
        clean, corrupted = (canvas.token(side[i], width) for side in (result.clean_tokens, result.corrupted_tokens))
        if i not in differing:
            return clean
        first, second = (
            f'<b><span style="color:{colour.format(1)}">{text}</span></b>'
            for colour, text in ((canvas.POSITIVE, clean), (canvas.NEGATIVE, corrupted))
        )
        return f"{first} / {second}" if turned else f"{first}<br>{second}"

    ticks = {"tickvals": list(shown), "ticktext": [label(i) for i in shown], "tickfont": {"size": 11}}
    return ticks | {"tickangle": -90 if turned else 0}


def _name(result: PositionEffects, layer: int, i: int) -> str:
    if result.heads:
        return scores.head(layer, i)
    return f"layer {layer}, position {i} {canvas.token(_tokens(result, i))}"


def _tokens(result: PositionEffects, i: int) -> str:
    clean, corrupted = result.clean_tokens[i], result.corrupted_tokens[i]
    return f"{clean} / {corrupted}" if i in result.differing else clean


@definition.register
def _(result: PositionEffects) -> str:
    return result.definition


@tables.register
def _(result: PositionEffects) -> list[Table]:
    """The cells of largest effect."""
    best = result.strongest(NAMED)
    where = _heads(best) if result.heads else _positions(result, best)
    moved = canvas.numbers([cell.effect for cell in best])
    metric = canvas.numbers([cell.metric for cell in best])
    columns = where | {"share of the difference": moved, f"{result.unit} of the patched run": metric}
    return [Table("Strongest cells", columns)] if best else []


def _heads(cells: list[Cell]) -> dict[str, list[str]]:
    return {"head": [scores.head(cell.layer, cell.at) for cell in cells]}


def _positions(result: PositionEffects, cells: list[Cell]) -> dict[str, list[str]]:
    return {
        "layer": [str(cell.layer) for cell in cells],
        "position": [str(cell.at) for cell in cells],
        "token": [_tokens(result, cell.at).replace("\n", "↵") for cell in cells],
    }
