"""The circuit of a run: its graph at each size with how faithful it is, the evidence of a node, and what is left
without some. Addressed by ?run=<id>&size=&node=&without=."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import widgets
from circuits import judging
from circuits.evaluate import Curve, Report
from circuits.graph import Circuit, EdgeScores
from workbench import canvas, plots, runs
from workbench.errors import UserError
from workbench.runs import Run
from workbench.scores import NodeScores

PROMPTS = 16  # at least, to judge on
AIM = 0.9  # faithfulness of the circuit that is shown first


def conditions(run: Run) -> dict[str, Any]:
    """What to judge on: the same task, prompts of another seed."""
    key = run.record["key"]
    return {
        "model": run.record["model_name"], "task": key["task"], "n": max(int(key["n"]), PROMPTS),
        "seed": int(key["seed"]) + 1, "found": run.id,
    }  # fmt: skip


def sizes(scores: EdgeScores | NodeScores, curve: Curve | None) -> int:
    """The slider; first at the smallest circuit that is faithful, if that is known."""
    steps = judging.ladder(len(scores.scores))
    first = min(steps, key=lambda n: abs(n - (50 if isinstance(scores, EdgeScores) else 10)))
    if curve is not None:
        faithful = [n for n, f in zip(steps, curve.faithfulness.value.tolist(), strict=True) if f >= AIM]
        first = next(iter(faithful), steps[-1])
    level = "edges" if isinstance(scores, EdgeScores) else "nodes"
    given = st.query_params.get("size", "")
    at = int(given) if given.isdecimal() and int(given) in steps else first
    size = st.select_slider(f"{level} of largest score", steps, at, key="circuit size", format_func="{:,}".format)
    st.query_params["size"] = str(size)
    return int(size)


def strip(circuit: Circuit | None, curve: Curve | None, size: int | None) -> None:
    figures: list[tuple[str, str, str | None]] = []
    if curve is not None and size is not None:
        f, i = curve.faithfulness, curve.items.tolist().index(size)
        value, low, high = (canvas.number(float(x[i]), 2, signed=False) for x in (f.value, f.low, f.high))
        about = f"95 % over prompts: {low} to {high}. 1 is the whole model, 0 the empty circuit."
        figures = [
            ("faithfulness", value, about),
            ("metric of the circuit", canvas.number(float(f.metric[i]), 2, signed=False), "Mean over prompts."),
            ("metric of the model", canvas.number(f.whole, 2, signed=False), "Mean over the same prompts."),
        ]
    if circuit is not None:
        figures += [
            ("edges", f"{len(circuit):,}", "Those on a path from input to logits." if size else None),
            ("heads and MLPs", f"{len(circuit.nodes)}", None),
        ]
    for column, (label, value, help) in zip(st.columns(5), figures, strict=False):
        column.metric(label, value, help=help)


def evidence(circuit: Circuit, node: str, scores: EdgeScores | NodeScores | None) -> None:
    """What a node reads and what reads it."""
    if isinstance(scores, NodeScores) and node in scores.nodes:
        value = canvas.number(float(scores.scores[scores.nodes.index(node)]), 3)
        st.caption(f"its score: {value} {widgets.plain(scores.unit)}")
    for column, (title, edges) in zip(st.columns(2), judging.neighbours(circuit, node).items(), strict=True):
        with column:
            st.caption(f"{title} · {len(edges)}")
            if edges:
                shown = edges[:12]
                cells = {"edge": [widgets.plain(name) for name, _ in shown]}
                if circuit.weights is not None:
                    cells["score"] = canvas.numbers([score for _, score in shown])
                st.table(cells, border="horizontal", hide_index=True)


def without(on: dict[str, Any], circuit: Circuit, size: int | None, curve: Curve | None, node: str) -> None:
    """Take nodes away and see what is left."""
    st.subheader("Without some of it", anchor=False)
    given = [name for name in st.query_params.get("without", node).split(",") if name in circuit.nodes]
    names = st.multiselect("ablate", circuit.nodes, given, key="circuit without", placeholder="choose nodes")
    st.query_params["without"] = ",".join(names)
    if not names:
        return
    asked = on | ({} if size is None else {"size": size})
    asked |= {"without": ",".join(names), "each": False, "subsets": 0, "random": 0}
    found = widgets.computed("judge", asked, "The circuit runs without them, on the same prompts.", "Ablate")
    if not isinstance(found, Report):
        return
    left, right = st.columns(2)
    value, delta = canvas.number(found.faithfulness, 2, signed=False), None
    if curve is not None and size is not None:
        whole = float(curve.faithfulness.value[curve.items.tolist().index(size)])
        delta = canvas.number(found.faithfulness - whole, 2)
    left.metric("faithfulness without", value, delta, delta_color="off", delta_arrow="off")
    right.metric("edges left", f"{found.n_edges:,}")


def judged(on: dict[str, Any], size: int | None) -> None:
    st.subheader("Is each part needed?", anchor=False)
    asked = on | ({} if size is None else {"size": size}) | {"subsets": 5, "random": 10}
    why = "Each node is ablated in turn, and random circuits of the same make-up run beside."
    found = widgets.computed("judge", asked, why, "Judge it")
    if isinstance(found, Report):
        widgets.chart(plots.figure(found), key="report")
        st.caption(widgets.plain(plots.definition(found)))


def show(run: Run) -> None:
    on, result = conditions(run), run.result
    scores = judging.scores_of(run)
    curve, size = None, None
    if scores is not None:
        found = runs.find("judge-sizes", **on)
        curve = found.result if found is not None else None
        size = sizes(scores, curve)
    circuit = result if isinstance(result, Circuit) else None
    graph = judging.graph_of(run)
    if scores is not None and graph is not None:
        circuit = judging.circuit_of(run, size, graph)
    strip(circuit, curve, size)
    if scores is not None and curve is None:
        why = f"How faithful are these circuits? Each size runs on {on['n']} prompts it was not found on."
        widgets.computed("judge-sizes", on, why, "Measure faithfulness")
    left, right = st.columns([3, 2]) if curve is not None else (st.container(), st.container())
    with left:
        picked = widgets.chart(plots.figure(circuit or scores), key="graph", select=circuit is not None)
        st.caption(widgets.plain(plots.definition(circuit or scores)))
    if curve is not None:
        with right:
            drawn = plots.figure(curve)
            drawn.add_vline(x=size, line={"color": canvas.FAINT, "dash": "dot"})
            widgets.chart(drawn, key="curve")
            st.caption(widgets.plain(plots.definition(curve)))
    if circuit is not None and circuit.nodes:
        given = picked if picked in circuit.nodes else st.query_params.get("node", "")
        at = circuit.nodes.index(given if given in circuit.nodes else judging.strongest(circuit, scores))
        st.subheader("One node", anchor=False)
        node = st.selectbox("node", circuit.nodes, at, help="Or click it in the graph.", width=200)
        st.query_params["node"] = node
        evidence(circuit, node, scores)
        without(on, circuit, size, curve, node)
    judged(on, size)


chosen = st.query_params.get("run", "")
top = st.container(gap=None)
if not chosen:
    raise UserError("no run is chosen; open one that found a circuit or scores, and follow its link.")
top.page_link("views/run.py", label="The run", icon=":material/arrow_back:", query_params={"run": chosen})
run = runs.get_run(chosen)
st.set_page_config(page_title=f"Circuit of {run.id} · Workbench")
with top:
    st.title("Circuit", anchor=False)
    key = run.record["key"]
    words = [key["analysis"], run.record["model_name"], key.get("task", "")]
    st.caption(" · ".join(widgets.plain(str(word)) for word in words if word))
with widgets.whole(run):
    if not judging.has_circuit(run.result):
        raise UserError(f"{run.id} scores no heads, MLPs or edges, and found no circuit of them; take eap-ig, say.")
    show(run)
