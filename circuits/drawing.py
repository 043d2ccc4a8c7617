"""Figures of graphs: scores of edges, circuits, curves over sizes, and comparisons of methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from circuits.arranging import Arranged
from circuits.compare import Comparison
from circuits.evaluate import Curve, Report
from circuits.features import FeatureScores
from circuits.graph import INPUT, LOGITS, Circuit, EdgeScores, Graph, node_of, top_edges
from workbench import canvas, sites
from workbench.plots import definition, figure

MIDDLE = 16  # pixels around the middle of an edge; larger than any node, which Plotly prefers where they overlap
INSIDE = 800  # pixels across, about
EDGES = 150  # drawn of a graph: more are a carpet
PORT_COLOURS = {"q": "rgba(26,115,200,{})", "k": "rgba(64,160,112,{})", "v": "rgba(226,98,16,{})"}
OTHER = "rgba(128,128,128,{})"


# ---- graphs ----


@figure.register
def edge_scores_figure(result: EdgeScores) -> go.Figure:
    """The edges of largest score as a layered graph."""
    return _graph(top_edges(result, EDGES).pruned(), result.unit)


@definition.register
def _(result: EdgeScores) -> str:
    return f"the {EDGES} edges of largest score, without dead ends; {result.definition}"


@figure.register
def circuit_figure(result: Circuit) -> go.Figure:
    """The circuit as a layered graph: input below, logits above."""
    return _graph(_drawn(result), "weight")


@definition.register
def _(result: Circuit) -> str:
    return _how_many(result) + result.definition


@figure.register
def arranged_figure(result: Arranged) -> go.Figure:
    """The same graph with its groups as nodes, each where its first member was."""
    levels = {name: _row_of_heads(min(map(_level, members))) for name, members in result.groups.items()}
    return _graph(_drawn(result.shown), "weight", levels)


@definition.register
def _(result: Arranged) -> str:
    return _how_many(result.shown) + result.definition


def _row_of_heads(level: Level) -> Level:
    return (level[0], HEADS) if level[1] == MLP else level


def _drawn(circuit: Circuit) -> Circuit:
    """The strongest edges, as many as can be seen."""
    if len(circuit) <= EDGES:
        return circuit
    weight = circuit.kept.float() if circuit.weights is None else circuit.weights.abs() * circuit.kept
    kept = torch.zeros_like(circuit.kept)
    kept[weight.topk(EDGES).indices] = True
    return replace(circuit, kept=kept & circuit.kept)


def _how_many(circuit: Circuit) -> str:
    which = "" if circuit.weights is None else "strongest "
    return f"{EDGES} {which}of {len(circuit):,} edges are drawn; " if len(circuit) > EDGES else ""


Level = tuple[int, int]  # layer, and order in it
HEADS, MLP = -2, -1  # beside the places of hook points


def _level(name: str) -> Level:
    """Where a node is drawn: latents at their hook point, heads and MLPs in their layer."""
    hook, slash, _ = name.rpartition("/")
    if slash:
        return (10**9, 0) if hook == LOGITS else sites.depth(hook)
    digits = "".join(c for c in name.split(".")[0] if c.isdigit())
    return (int(digits) if digits else 0, MLP if name.startswith("m") else HEADS)


def _places(
    graph: Graph, nodes: set[str], levels: Mapping[str, Level]
) -> tuple[dict[str, tuple[float, float]], dict[float, str]]:
    """x and y of every node that is drawn, lower levels below, MLPs in a column of their own a little above the heads
    of their layer; and the names of rows by their y."""
    rows: dict[Level, list[str]] = {}
    for name in graph.nodes:
        if name in nodes:
            rows.setdefault(levels.get(name) or _level(name), []).append(name)
    places, titles = {INPUT: (0.0, 0.0)} if INPUT in graph.sources else {}, {}
    at = _columns(list(rows.values()))
    column = -max([len(row) for level, row in rows.items() if level[1] != MLP] or [0]) / 2 - 0.6
    y, layer = 0.0, -1
    for level in sorted(rows):
        row = rows[level]
        beside = level[1] == MLP and level[0] == layer
        y, layer = math.floor(y) + (0.4 if beside else 1.0), level[0]
        x = column if level[1] == MLP else -(len(row) - 1) / 2
        places |= {name: (at.get(name, x + i), y) for i, name in enumerate(row)}
        hook, slash, _ = row[0].rpartition("/")
        if slash:
            titles[y] = hook.replace("blocks.", "").replace("hook_", "")
        elif any(name.startswith("a") for name in row if name not in levels):
            titles[y] = f"layer {level[0]}"
    return places | ({LOGITS: (0.0, math.floor(y) + 1.0)} if LOGITS in graph.destinations else {}), titles


def _columns(rows: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of nodes at positions (`.../77@3`), x: a column for each position, as wide as its longest row."""
    cells: dict[int, list[list[str]]] = {}
    for row in rows:
        some: dict[int, list[str]] = {}
        for name in row:
            _, at, position = name.rpartition("@")
            if at and position.isdecimal():
                some.setdefault(int(position), []).append(name)
        for number, names in some.items():
            cells.setdefault(number, []).append(names)
    found: dict[str, float] = {}
    left = 0.0
    for number in sorted(cells):
        width = max(map(len, cells[number]))
        for names in cells[number]:
            found |= {name: left + (width - len(names)) / 2 + i for i, name in enumerate(names)}
        left += width + 1
    return found


def _readable(places: Mapping[str, tuple[float, float]]) -> list[str]:
    """What is written at each node: its name, where there is room for it beside the last one of its row."""
    xs = [x for x, _ in places.values()]
    per_unit = INSIDE / max(1.0, max(xs) - min(xs))
    ends: dict[float, float] = {}
    said = dict.fromkeys(places, "")
    for name, (x, y) in sorted(places.items(), key=lambda item: item[1]):
        label, at, _ = name.rpartition("/")[2].rpartition("@")
        label = label if at else name.rpartition("/")[2]
        half = 3.2 * len(label) + 2
        if x * per_unit - half >= ends.get(y, -math.inf):
            said[name], ends[y] = escape(label), x * per_unit + half
    return [said[name] for name in places]


def _edges(fig: go.Figure, circuit: Circuit, places: Mapping[str, tuple[float, float]], unit: str) -> None:
    """Lines, the strongest last; what each is called is said in its middle, so that at its ends a node is clicked."""
    graph = circuit.graph
    weights = torch.ones(len(graph)) if circuit.weights is None else circuit.weights
    largest = float(weights[circuit.kept].abs().max()) if len(circuit) else 1.0
    middles: list[tuple[float, float]] = []
    said: list[str] = []
    for i in sorted(circuit.kept.nonzero()[:, 0].tolist(), key=lambda i: abs(float(weights[i]))):
        source, destination = graph.sources[graph.edges[i, 0]], graph.destinations[graph.edges[i, 1]]
        port = destination[-2] if destination.endswith(">") else ""
        strength = math.sqrt(abs(float(weights[i])) / largest) if largest else 1.0
        said.append(f"{escape(graph.names[i])} {canvas.number(float(weights[i]), 4)} {escape(unit)}")
        if circuit.weights is None:  # all alike, and mostly many
            strength, said[-1] = 0.1, escape(graph.names[i])
        (x0, y0), (x1, y1) = places[source], places[node_of(destination)]
        bend = 0.12 * (y1 - y0) if abs(x1 - x0) < 0.2 and y1 - y0 > 1 else 0.0  # not through the nodes between
        middles.append(((x0 + x1) / 2 + bend, (y0 + y1) / 2))
        line = {
            "color": PORT_COLOURS.get(port, OTHER).format(round(0.2 + 0.7 * strength, 3)),
            "width": 0.6 + 3.4 * strength,
            "shape": "spline",
            "dash": "solid" if weights[i] >= 0 else "dot",
        }
        x, y = zip((x0, y0), middles[-1], (x1, y1), strict=True)
        fig.add_trace(go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False))
    unseen = {"marker": {"opacity": 0}}
    fig.add_trace(
        go.Scatter(
            x=[x for x, _ in middles], y=[y for _, y in middles], mode="markers", hovertext=said, showlegend=False,
            marker={"size": MIDDLE, "opacity": 0}, selected=unseen, unselected=unseen,
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )  # fmt: skip


def _graph(circuit: Circuit, unit: str, levels: Mapping[str, Level] | None = None) -> go.Figure:
    """levels: of nodes whose names do not tell where they are drawn, groups."""
    graph, levels = circuit.graph, levels or {}
    places, titles = _places(graph, set(circuit.nodes), levels)
    fig = go.Figure()
    _edges(fig, circuit, places, unit)
    names = list(places)

    def of_mlp(name: str) -> bool:
        return name not in levels and name.startswith("m")

    fig.add_trace(
        go.Scatter(
            x=[places[name][0] for name in names],
            y=[places[name][1] for name in names],
            mode="markers+text",
            marker={
                "size": [14 if name in levels else 9 for name in names],
                "symbol": ["square" if name in levels else "circle" for name in names],
                "color": [canvas.POSITIVE.format(1) if of_mlp(name) else OTHER.format(1) for name in names],
            },
            text=_readable(places),
            textposition="top center",
            textfont={"size": 10},
            customdata=names,
            hovertext=[escape(name) for name in names],
            hovertemplate="%{hovertext}<extra></extra>",
            selected={"marker": {"size": MIDDLE - 1}},
            unselected={"marker": {"opacity": 1}, "textfont": {"color": OTHER.format(1)}},
            showlegend=False,
        )
    )
    for port, words in (("q", "into queries"), ("k", "into keys"), ("v", "into values"), ("", "into MLPs and logits")):
        if not any(name.endswith(">") for name in graph.destinations):
            break  # nothing to tell apart
        line = {"color": PORT_COLOURS.get(port, OTHER).format(1), "width": 2}
        fig.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=words))
    if circuit.weights is not None and bool((circuit.weights[circuit.kept] < 0).any()):
        line = {"color": OTHER.format(1), "width": 2, "dash": "dot"}
        fig.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name="below 0"))
    rows = max(y for _, y in places.values())
    left = min(x for x, _ in places.values()) - 0.7
    for y, words in titles.items():
        fig.add_annotation(x=left, y=y, text=escape(words), showarrow=False, xanchor="right", font_size=10)
    fig.update_xaxes(visible=False).update_yaxes(visible=False)
    fig.update_layout(legend={"orientation": "h", "y": -0.02, "yanchor": "top"})
    return canvas.finish(fig, max(260, min(900, 44 * (rows + 1))), bottom=40, left=12)


# ---- curves ----


@figure.register
def curve_figure(result: Curve) -> go.Figure:
    """Faithfulness over size with 95 % over prompts; the line at 1 is the model."""
    f = result.faithfulness
    x = [max(n, 0.5) for n in result.items.tolist()]
    text = [
        f"{n} {escape(result.level)}: {canvas.number(v, 3)} [{canvas.number(a, 3)}, {canvas.number(b, 3)}]"
        for n, v, a, b in zip(result.items.tolist(), f.value.tolist(), f.low.tolist(), f.high.tolist(), strict=True)
    ]
    fig = go.Figure()
    edge = {"x": x, "mode": "lines", "line_width": 0, "hoverinfo": "skip", "showlegend": False}
    fig.add_trace(go.Scatter(y=canvas.cells(f.low), **edge))
    fig.add_trace(go.Scatter(y=canvas.cells(f.high), fill="tonexty", fillcolor=canvas.POSITIVE.format(0.18), **edge))
    line = {"color": canvas.POSITIVE.format(1), "width": 2}
    fig.add_trace(
        go.Scatter(
            x=x, y=canvas.cells(f.value), mode="lines+markers", line=line, hovertext=text,
            hovertemplate="%{hovertext}<extra></extra>", showlegend=False,
        )
    )  # fmt: skip
    fig.add_hline(y=1, line={"color": canvas.FAINT, "dash": "dot"})
    fig.update_xaxes(type="log", dtick=1, title_text=f"{escape(result.level)} in the circuit")
    fig.update_yaxes(title_text="faithfulness", zeroline=True, zerolinecolor=canvas.FAINT)
    fig.add_annotation(
        text=f"{result.measure.upper()} {canvas.number(result.area, 3, signed=False)}",
        x=1, y=0.02, xref="paper", yref="paper", xanchor="right", yanchor="bottom", showarrow=False,
    )  # fmt: skip
    return canvas.finish(fig, 280)


@definition.register
def _(result: Curve) -> str:
    return result.definition


@figure.register
def report_figure(result: Report) -> go.Figure:
    """How faithful the circuit is without each node; beside it the circuit among random ones."""
    order = result.minimality.argsort(descending=True).tolist()[:40]
    fig = make_subplots(rows=1, cols=2, column_widths=[0.65, 0.35], horizontal_spacing=0.12)
    bar = {"marker_color": canvas.POSITIVE.format(0.85), "marker_line_width": 0, "showlegend": False}
    fig.add_trace(
        go.Bar(x=[result.nodes[i] for i in order], y=canvas.cells(result.without[order]), **bar), row=1, col=1
    )
    line = {"color": canvas.FAINT, "dash": "dot"}
    fig.add_hline(y=result.faithfulness, line=line, row=1, col=1)
    random = {"mode": "markers", "marker": {"color": OTHER.format(0.6), "size": 7}, "showlegend": False}
    fig.add_trace(
        go.Scatter(x=canvas.cells(result.random), y=[0.0] * len(result.random), name="random", **random), row=1, col=2
    )
    error = {"array": [result.high - result.faithfulness], "arrayminus": [result.faithfulness - result.low]}
    mark = {"color": canvas.POSITIVE.format(1), "size": 11}
    fig.add_trace(
        go.Scatter(
            x=[result.faithfulness], y=[1.0], mode="markers", marker=mark, error_x=error, showlegend=False,
            name="the circuit",
        ), row=1, col=2,
    )  # fmt: skip
    fig.update_yaxes(title_text="faithfulness without it", row=1, col=1)
    fig.update_xaxes(title_text="faithfulness", row=1, col=2)
    fig.update_yaxes(tickvals=[0, 1], ticktext=["random", "circuit"], range=[-0.6, 1.6], row=1, col=2)
    return canvas.finish(fig, 260)


@definition.register
def _(result: Report) -> str:
    return result.definition


# ---- comparisons ----


@figure.register
def comparison_figure(result: Comparison) -> go.Figure:
    """Agreement of the methods, and beside it size of the smallest faithful circuit, CMD and cost of each."""
    names = [escape(name) for name in result.methods]
    n = len(names)
    columns = [("heads", "heads needed"), ("heads_cmd", "CMD of heads"), ("edges_cmd", "CMD of edges"),
               ("auc", "AUC"), ("seconds", "seconds")]  # fmt: skip
    columns = [(key, title) for key, title in columns if any(_cell(result, m, key) is not None for m in result.methods)]
    inside = max(150, 34 * n)
    fig = make_subplots(
        rows=1,
        cols=1 + len(columns),
        column_widths=[0.4, *[0.6 / len(columns)] * len(columns)],
        horizontal_spacing=0.025,
        subplot_titles=["agreement", *(title for _, title in columns)],
    )
    hover = [
        [f"{names[i]} and {names[j]}: {canvas.number(v, 3)}" for j, v in enumerate(row)]
        for i, row in enumerate(result.agreement.tolist())
    ]
    text = [[canvas.number(v, 2, signed=False) for v in row] for row in result.agreement.tolist()]
    colours = {"colorscale": canvas.DIVERGING, "zmin": -1, "zmax": 1, "showscale": False}
    written = {"text": text, "texttemplate": "%{text}", "textfont": canvas.WRITTEN}
    fig.add_trace(canvas.heatmap(result.agreement, hover, **colours, **written), row=1, col=1)
    fig.update_xaxes(tickvals=list(range(n)), ticktext=names, tickangle=40, row=1, col=1)
    fig.update_yaxes(tickvals=list(range(n)), ticktext=names, autorange="reversed", automargin=True, row=1, col=1)
    for column, (key, _) in enumerate(columns, 2):
        values = [_cell(result, method, key) for method in result.methods]
        labels = ["–" if v is None else f"{v:.3g}" for v in values]
        fig.add_trace(
            go.Bar(
                x=values, y=list(range(n)), orientation="h", text=labels, textposition="auto", showlegend=False,
                marker_color=canvas.POSITIVE.format(0.6), marker_line_width=0, hoverinfo="skip",
            ), row=1, col=column,
        )  # fmt: skip
        fig.update_yaxes(visible=False, range=[n - 0.5, -0.5], row=1, col=column)
        fig.update_xaxes(showticklabels=False, row=1, col=column)
    fig.update_annotations(font_size=12)
    return canvas.finish(fig, inside, top=34, bottom=110, left=110)


def _cell(result: Comparison, method: str, key: str) -> float | None:
    value = result.table[method].get(key)
    return value if value is not None and math.isfinite(value) else None


@definition.register
def _(result: Comparison) -> str:
    return "; ".join([result.definition, *(f"{name} left out: {why}" for name, why in result.failed.items())])


# ---- latents ----


@figure.register
def feature_scores_figure(result: FeatureScores) -> go.Figure:
    """The latents of largest score; beside them how much of each hook point's attribution no latent explains."""
    best = result.top(25)
    fig = make_subplots(rows=1, cols=2, column_widths=[0.6, 0.4], horizontal_spacing=0.12)
    colour = [(canvas.POSITIVE if value >= 0 else canvas.NEGATIVE).format(0.85) for _, value in best]
    names = [escape(name.replace("blocks.", "").replace("hook_", "")) for name, _ in best]
    bar = {"marker_line_width": 0, "showlegend": False}
    fig.add_trace(
        go.Bar(x=[value for _, value in best], y=names, orientation="h", marker_color=colour, **bar), row=1, col=1
    )
    explained = torch.stack([row.sum() for row in result.latents])
    layers = list(range(len(result.hooks)))
    fig.add_trace(
        go.Bar(x=layers, y=canvas.cells(explained), name="latents", marker_color=canvas.POSITIVE.format(0.6)),
        row=1, col=2,
    )  # fmt: skip
    fig.add_trace(
        go.Bar(x=layers, y=canvas.cells(result.errors), name="error", marker_color=OTHER.format(0.6)), row=1, col=2
    )
    fig.update_xaxes(title_text=escape(result.unit), row=1, col=1)
    fig.update_yaxes(autorange="reversed", automargin=True, tickfont={"size": 10}, row=1, col=1)
    fig.update_xaxes(title_text="hook point, in order of computation", row=1, col=2)
    fig.update_yaxes(title_text="sum of scores", zeroline=True, zerolinecolor=canvas.FAINT, row=1, col=2)
    fig.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0.65})
    return canvas.finish(fig, 20 * len(best), top=30)


@definition.register
def _(result: FeatureScores) -> str:
    return result.definition
