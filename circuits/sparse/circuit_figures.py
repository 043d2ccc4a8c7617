"""Figures of circuits of channels: one circuit in order of computation, and the sizes of many."""

from __future__ import annotations

from functools import partial
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits.graph import Circuit
from circuits.sparse.pruning_run import Row, SparseCircuit, TaskCircuits
from circuits.sparse.reading import Node, Reading
from circuits.sparse.sizes import SizedCircuit
from workbench import canvas
from workbench.plots import Table, definition, figure, tables

EDGES = 300  # drawn of a circuit: more are a carpet
GREY = "rgba(128,128,128,{})"
WORDS = {
    "attn.act_in": "attention<br>reads", "attn.q": "q", "attn.k": "k", "attn.v": "v",
    "attn.resid_delta": "attention<br>writes", "mlp.act_in": "MLP<br>reads", "mlp.post_act": "neurons",
    "mlp.resid_delta": "MLP<br>writes",
}  # fmt: skip


def _column(name: str) -> tuple[int, str]:
    layer, rest = name.split(".", 1)
    return int(layer), rest.rsplit(":", 1)[0]


def _number(name: str) -> int:
    return int(name.rsplit(":", 1)[1])


@figure.register
def circuit_figure(result: SparseCircuit) -> go.Figure:
    """Channels from left to right in order of computation; lines are weights, dots the residual stream between."""
    return _drawn(result.circuit, result.reading)


@figure.register
def sized_figure(result: SizedCircuit) -> go.Figure:
    """The same of a circuit that was read, all of it or some of its channels."""
    return _drawn(result.circuit, result.reading)


def _drawn(circuit: Circuit, reading: Reading) -> go.Figure:
    places = places_of(reading, circuit)
    fig = go.Figure()
    for source, destination in through_the_stream([node.name for node in reading.nodes]):
        (x0, y0), (x1, y1) = places[source], places[destination]
        fig.add_trace(
            go.Scatter(
                x=[x0, x1], y=[y0, y1], mode="lines", line={"color": GREY.format(0.35), "width": 1, "dash": "dot"},
                hoverinfo="skip", showlegend=False,
            )
        )  # fmt: skip
    assert circuit.weights is not None
    kept = circuit.kept.nonzero()[:, 0]
    order = kept[circuit.weights[kept].abs().argsort()][-EDGES:].tolist()  # large ones on top
    largest = float(circuit.weights[order].abs().max()) if order else 1.0
    for i in order:
        names = circuit.graph.sources[circuit.graph.edges[i, 0]], circuit.graph.destinations[circuit.graph.edges[i, 1]]
        (x0, y0), (x1, y1) = (places[name] for name in names)
        weight = float(circuit.weights[i])
        colour = canvas.POSITIVE if weight >= 0 else canvas.NEGATIVE
        strength = abs(weight) / largest
        fig.add_trace(
            go.Scatter(
                x=[x0, (x0 + x1) / 2, x1], y=[y0, (y0 + y1) / 2, y1], mode="lines",
                line={"color": colour.format(round(0.35 + 0.6 * strength, 3)), "width": 0.8 + 3 * strength},
                hovertext=f"{names[0]} to {names[1]}: weight {canvas.number(weight, 3)}",
                hovertemplate="%{hovertext}<extra></extra>", showlegend=False,
            )
        )  # fmt: skip
    fig.add_trace(_nodes(reading, places))
    return _finished(fig, reading, places)


def _nodes(reading: Reading, places: dict[str, tuple[float, float]]) -> go.Scatter:
    names = [node.name for node in reading.nodes]
    most = max((node.loss_without for node in reading.nodes), default=0.0) or 1.0
    depth = [round(0.15 + 0.85 * max(0.0, node.loss_without / most), 3) for node in reading.nodes]
    return go.Scatter(
        x=[places[name][0] for name in names],
        y=[places[name][1] for name in names],
        mode="markers+text",
        marker={
            "size": 11,
            "color": [canvas.POSITIVE.format(one) for one in depth],
            "line": {"color": GREY.format(0.9), "width": 1},
        },
        text=[str(_number(name)) for name in names],
        customdata=names,
        textposition="top center",
        textfont={"size": 9},
        hovertext=[_words(node, reading.answers) for node in reading.nodes],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )  # fmt: skip


def _words(node: Node, answers: list[str]) -> str:
    one, two = (escape(repr(answer)) for answer in answers)
    lines = [
        f"<b>{node.name}</b>",
        f"loss without it: {canvas.number(node.loss_without, 3)} nats more",
        f"active at {canvas.number(node.one, 3)} where {one} is right, {canvas.number(node.two, 3)} where {two} is",
    ]
    if node.tokens:
        lines.append("tokens: " + "  ".join(escape(repr(token)) for token in node.tokens))
    if node.towards_one is not None:
        lines.append(f"writes {canvas.number(node.towards_one, 3)} towards {one}")
    return "<br>".join(lines)


def places_of(reading: Reading, circuit: Circuit) -> dict[str, tuple[float, float]]:
    """x: the column of a channel's site; y: near the channels it is linked with (by barycentres, swept both ways)."""
    columns: dict[tuple[int, str], list[str]] = {}
    for node in reading.nodes:
        columns.setdefault(_column(node.name), []).append(node.name)
    ordered = list(columns.values())  # nodes come in order of computation
    linked: dict[str, list[str]] = {node.name: [] for node in reading.nodes}
    graph = circuit.graph
    links = [(graph.sources[s], graph.destinations[d]) for s, d in graph.edges[circuit.kept].tolist()]
    for source, destination in [*links, *through_the_stream(list(linked))]:
        linked[source].append(destination)
        linked[destination].append(source)
    y = {name: i - (len(column) - 1) / 2 for column in ordered for i, name in enumerate(column)}
    x = {name: float(i) for i, column in enumerate(ordered) for name in column}

    def centre(name: str, side: int) -> float:
        """Mean place of the channels that it is linked with to the left (-1) or to the right (1)."""
        near = [y[other] for other in linked[name] if (x[other] - x[name]) * side > 0]
        return sum(near) / len(near) if near else y[name]

    for sweep in range(8):
        side = -1 if sweep % 2 == 0 else 1
        for column in ordered[::-side]:
            column.sort(key=partial(centre, side=side))
            y.update({name: i - (len(column) - 1) / 2 for i, name in enumerate(column)})
    return {name: (x[name], y[name]) for name in x}


def through_the_stream(names: list[str]) -> list[tuple[str, str]]:
    """Channels of the residual stream that are written and read again: every write with the next reads of each later
    sublayer. Not edges: nothing is learned between them."""
    writers = [name for name in names if name.split(":")[0].endswith("resid_delta")]
    readers = [name for name in names if name.split(":")[0].endswith("act_in")]
    found = []
    for source in writers:
        for destination in readers:
            after = names.index(destination) > names.index(source)
            if after and _number(source) == _number(destination):
                found.append((source, destination))
    return found


def _finished(fig: go.Figure, reading: Reading, places: dict[str, tuple[float, float]]) -> go.Figure:
    columns = {places[node.name][0]: _column(node.name) for node in reading.nodes}
    top = max((y for _, y in places.values()), default=0.0) + 1.2
    layers: dict[int, list[float]] = {}
    for x, (layer, site) in columns.items():
        layers.setdefault(layer, []).append(x)
        fig.add_annotation(x=x, y=top, text=WORDS[site], showarrow=False, yanchor="bottom", font_size=10)
    for layer, xs in layers.items():
        fig.add_annotation(
            x=(min(xs) + max(xs)) / 2, y=top + 2.4, text=f"<b>layer {layer}</b>", showarrow=False, yanchor="bottom",
            font_size=11,
        )  # fmt: skip
    rows = max((abs(y) for _, y in places.values()), default=1.0)
    fig.update_xaxes(visible=False, range=[-0.6, len(columns) - 0.4])
    fig.update_yaxes(visible=False, range=[-rows - 1, top + 4.2])
    return canvas.finish(fig, int(max(260, min(900, 60 + 26 * (2 * rows + 6)))), left=12)


@definition.register
def _(result: SparseCircuit) -> str:
    return _said(result.circuit) + result.circuit.definition


@definition.register
def _(result: SizedCircuit) -> str:
    return _said(result.circuit) + result.definition


def _said(circuit: Circuit) -> str:
    n = len(circuit)
    more = f"the {EDGES} largest of {n} weights are drawn; " if n > EDGES else ""
    return (
        f"{more}darker channels are those whose ablation costs the circuit more; dotted: a channel of the residual "
        "stream that is written and read again; "
    )


def sizes_figure(result: SizedCircuit, target: float | None = None) -> go.Figure:
    """Loss over the number of channels that are kept; lines at the whole model's, and at the target."""
    x = result.sizes.tolist()
    fig = go.Figure(
        go.Scatter(
            x=x, y=canvas.cells(result.loss), mode="lines+markers", showlegend=False,
            line={"color": canvas.POSITIVE.format(1), "width": 2}, customdata=result.edges.tolist(),
            hovertemplate="%{x} channels, %{customdata} edges: %{y:.3f} nats<extra></extra>",
        )
    )  # fmt: skip
    lines = {"the whole model": result.whole, "no channel": result.none} | ({"target": target} if target else {})
    for name, value in lines.items():
        fig.add_hline(
            y=value, line={"color": canvas.FAINT, "dash": "dot"}, annotation_text=name, annotation_font_size=10
        )
    fig.update_xaxes(type="log", dtick=1, title_text="channels in the circuit")
    fig.update_yaxes(title_text="held-out loss, nats", rangemode="tozero")
    return canvas.finish(fig, 280)


@figure.register
def tasks_figure(result: TaskCircuits) -> go.Figure:
    """Edges of each task's circuit; beside it what the whole model loses without it, and without as many others."""
    names = sorted(result.rows, key=lambda name: (result.rows[name].edges is None, -(result.rows[name].edges or 0)))
    labels = [escape(f"{name} (no circuit)" if result.rows[name].edges is None else name) for name in names]
    rows = [result.rows[name] for name in names]
    fig = make_subplots(rows=1, cols=2, column_widths=[0.55, 0.45], horizontal_spacing=0.06, shared_yaxes=True)
    fig.add_trace(
        go.Bar(
            x=[row.edges for row in rows], y=labels, orientation="h", marker_color=canvas.POSITIVE.format(0.85),
            marker_line_width=0, showlegend=False, text=[row.edges for row in rows], textposition="outside",
            textangle=0, textfont_size=10, cliponaxis=False,
            hovertext=[_row_words(row) for row in rows], hovertemplate="%{hovertext}<extra></extra>",
        ), row=1, col=1,
    )  # fmt: skip
    for field, colour, name in (
        ("without", canvas.POSITIVE.format(0.85), "without the circuit"),
        ("random", GREY.format(0.9), "without as many others, at most"),
    ):
        fig.add_trace(
            go.Scatter(
                x=[getattr(row, field) for row in rows], y=labels, mode="markers", name=name,
                marker={"color": colour, "size": 8}, hovertemplate="%{x:.3f} nats<extra>" + name + "</extra>",
            ), row=1, col=2,
        )  # fmt: skip
    fig.update_xaxes(type="log", title_text="edges", dtick=1, row=1, col=1)
    fig.update_xaxes(title_text="nats more", zeroline=True, zerolinecolor=canvas.FAINT, row=1, col=2)
    fig.update_yaxes(automargin=True, tickfont={"size": 10})
    fig.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0.5})
    return canvas.finish(fig, max(200, 24 * len(names) + 60), top=30)


def _row_words(row: Row) -> str:
    whole = f"accuracy of the model {row.accuracy:.3f}, loss {row.whole:.3f}"
    if row.edges is None:
        return f"no circuit, at best {row.loss:.3f} nats; {whole}"
    return f"{row.edges} edges, {row.nodes} nodes, held-out loss {row.held_out:.3f}; {whole}"


@definition.register
def _(result: TaskCircuits) -> str:
    return result.definition


@tables.register
def tasks_tables(result: TaskCircuits) -> list[Table]:
    """Every task: how well the model does it, its circuit, and what the circuit's loss costs."""
    ranked = sorted(
        result.rows.items(), key=lambda item: (item[1].edges is None, item[1].edges or 0, -item[1].accuracy)
    )
    rows = [row for _, row in ranked]
    columns = {"task": [name for name, _ in ranked], "accuracy": [f"{row.accuracy:.3f}" for row in rows]}
    for key, title in (("nodes", "nodes"), ("edges", "edges")):
        columns[title] = [f"{getattr(row, key):,}" if getattr(row, key) is not None else "none" for row in rows]
    for key, title in (
        ("whole", "loss of the model"), ("held_out", "of the circuit"), ("without", "rise without it"),
        ("random", "without as many others"),
    ):  # fmt: skip
        columns[title] = [f"{getattr(row, key):.3f}" if getattr(row, key) is not None else "" for row in rows]
    return [Table("Tasks", columns)]
