"""The circuit of a run: its graph at each size with how faithful it is, the evidence of a node, and what becomes of it
when some are ablated or patched. Addressed by ?run=<id>&size=&node=&change=&how=, and by hide=, only= and groups= for
how the graph is drawn."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import widgets
from circuits import arranging, judging
from circuits.arranging import Arranged
from circuits.evaluate import Curve, Report
from circuits.graph import Circuit, EdgeScores
from circuits.node_patching import PatchedNodes
from saes import whereabouts
from workbench import canvas, plots, runs
from workbench.errors import UserError
from workbench.runs import Run
from workbench.scores import NodeScores

PROMPTS = 16  # at least, to judge on
SHOWN = 8  # edges of a node
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
            ("heads and MLPs" if judging.of_heads(circuit) else "latents and errors", f"{len(circuit.nodes)}", None),
        ]
    for column, (label, value, help) in zip(st.columns(5), figures, strict=False):
        column.metric(label, value, help=help)


def listed(name: str, circuit: Circuit) -> list[str]:
    """The nodes of the circuit that the address gives under a name."""
    return [node for node in st.query_params.get(name, "").split(",") if node in circuit.nodes]


def arrange(circuit: Circuit) -> Arranged:
    """How the graph is drawn; says nothing about the circuit."""
    found: dict[str, list[str]] = {}
    given = {name: listed(name, circuit) for name in ("hide", "only")}
    text = st.query_params.get("groups", "")
    with st.expander("Arrange the graph", expanded=bool(text or any(given.values())), icon=":material/hub:"):
        for column, (name, help) in zip(
            st.columns(2),
            [("hide", "Not drawn, nor their edges."), ("only", "Edges between these alone, if there are any.")],
            strict=True,
        ):
            some = column.multiselect(
                name, circuit.nodes, given[name], key=f"circuit {name}", help=help, placeholder="choose nodes"
            )
            found[name] = some
            st.query_params[name] = ",".join(some)
        text = st.text_input(
            "groups drawn as one node", text, key="circuit groups", placeholder="movers: a9.h6 a9.h9; copies: a5.h5",
            help="A name, a colon, its nodes; groups apart by semicolons. An edge of a group is the sum of theirs.",
        )  # fmt: skip
        try:
            groups = arranging.read_groups(text, circuit.graph.nodes)
        except UserError as error:
            widgets.refusal(str(error))
            groups = {}
        st.query_params["groups"] = arranging.group_text(groups)
    for name in ("hide", "only", "groups"):
        if not st.query_params[name]:
            del st.query_params[name]
    return Arranged(circuit, groups, found["hide"], found["only"])


def evidence(circuit: Circuit, node: str, scores: EdgeScores | NodeScores | None) -> None:
    """What a node reads and what reads it."""
    if isinstance(scores, NodeScores) and node in scores.nodes:
        value = canvas.number(float(scores.scores[scores.nodes.index(node)]), 3)
        st.caption(f"its score: {value} {widgets.plain(scores.unit)}")
    for title, edges in judging.neighbours(circuit, node).items():
        st.caption(f"{title} · {len(edges)}" + (f", the first {SHOWN}" if len(edges) > SHOWN else ""))
        if edges:
            shown = edges[:SHOWN]
            cells = {"edge": [widgets.plain(name) for name, _ in shown]}
            if circuit.weights is not None:
                cells["score"] = canvas.numbers([score for _, score in shown])
            st.table(cells, border="horizontal", hide_index=True, hide_header=True)


def choose(circuit: Circuit, scores: EdgeScores | NodeScores | None, picked: str | None) -> str:
    """A node, with its evidence: what was clicked, or else what the address says, or the strongest."""
    given = picked if picked in circuit.nodes else st.query_params.get("node", "")
    at = circuit.nodes.index(given if given in circuit.nodes else judging.strongest(circuit, scores))
    st.subheader("One node", anchor=False)
    node = str(st.selectbox("node", circuit.nodes, at, help="Or click it in the graph."))
    st.query_params["node"] = node
    evidence(circuit, node, scores)
    return node


def latent_page(run: Run, node: str) -> None:
    """A link to what a latent of an SAE responds to, if that is known here."""
    hook, _, latent = node.rpartition("/")
    basis = str(run.record["key"]["parameters"].get("basis", ""))
    if not latent.isdecimal() or not basis.startswith(whereabouts.BASIS):
        return
    sae, hook = whereabouts.called(whereabouts.known(), basis.removeprefix(whereabouts.BASIS), hook)
    if sae:
        query = {"sae": sae, "hook": hook, "latent": latent}
        label = "What this latent responds to"
        st.page_link("views/latent.py", label=label, icon=":material/search:", query_params=query)


def does(run: Run, node: str) -> None:
    """What a node writes to the answer directly, and where a head looks."""
    on = {name: value for name, value in conditions(run).items() if name != "found"}
    direct, looks = runs.find("direct-logit-attribution", **on), runs.find("attention-patterns", **on)
    st.subheader(widgets.plain(f"What {node} does here"), anchor=False)
    if direct is None:
        widgets.computed("direct-logit-attribution", on, "What does each node write to the answer?", "Measure it")
    else:
        result: NodeScores = direct.result
        value = float(result.scores[result.nodes.index(node)])
        rank = 1 + int((result.scores.abs() > abs(value)).sum())
        st.markdown(
            f"It writes **{canvas.number(value, 3)}** {widgets.plain(result.unit)} to the answer directly, "
            f"number {rank} of {len(result.nodes)} by size."
        )
        st.caption(widgets.plain(result.definition))
    if ".h" not in node:
        return
    if looks is None:
        widgets.computed("attention-patterns", on, "Where does each head look?", "Look")
    else:
        widgets.chart(plots.pattern_figure(looks.result, node), key="pattern")
        st.caption("Where it looks in the first prompt. That does not show that it matters.")


WAYS = {
    "ablate": "ablate in the circuit",
    "noise": "patch: clean run, these from the corrupted prompt",
    "denoise": "patch: corrupted run, these from the clean prompt",
}


def change(run: Run, circuit: Circuit, size: int | None, curve: Curve | None, node: str) -> None:
    """Ablate or patch nodes and see the metric change."""
    st.subheader("Change it", anchor=False)
    ways = [way for way in WAYS if way != "ablate" or judging.of_heads(circuit)]
    left, right = st.columns([2, 3])
    given = st.query_params.get("how", "")
    how = str(
        left.selectbox(
            "how", ways, ways.index(given) if given in ways else 0, format_func=WAYS.__getitem__, key="circuit how"
        )
    )
    first = listed("change", circuit) if "change" in st.query_params else [node]
    names = right.multiselect("nodes", circuit.nodes, first, key="circuit change", placeholder="choose nodes")
    st.query_params["how"], st.query_params["change"] = how, ",".join(names)
    if names and how == "ablate":
        without(conditions(run), size, curve, names)
    elif names:
        patched(run, how, names)


def without(on: dict[str, Any], size: int | None, curve: Curve | None, names: list[str]) -> None:
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


def patched(run: Run, how: str, names: list[str]) -> None:
    """In the whole model, not in the circuit."""
    asked = {name: value for name, value in conditions(run).items() if name != "found"}
    asked |= {"nodes": ",".join(names), "direction": how}
    basis = run.record["key"]["parameters"].get("basis")
    asked |= {} if basis is None else {"basis": basis}
    why = "The whole model runs on each prompt, these nodes with their values from the other prompt of the pair."
    found = widgets.computed("patch-nodes", asked, why, "Patch")
    if not isinstance(found, PatchedNodes):
        return
    before, after = float(found.unpatched.mean()), float(found.together.mean())
    share, low, high = (canvas.number(float(x[-1]), 2, signed=False) for x in found.share())
    figures = [
        ("metric unpatched", canvas.number(before, 2, signed=False), None, None),
        ("metric patched", canvas.number(after, 2, signed=False), canvas.number(after - before, 2), None),
        (
            "share of the difference",
            share,
            None,
            f"95 % over prompts: {low} to {high}. 1 is the other prompt's metric.",
        ),
    ]
    for column, (label, value, delta, help) in zip(st.columns(3), figures, strict=True):
        column.metric(label, value, delta, delta_color="off", delta_arrow="off", help=help)
    if len(names) > 1:
        widgets.chart(plots.figure(found), key="patched")
    st.caption(widgets.plain(plots.definition(found)))


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
    left, right = st.columns([3, 2], gap="large") if circuit is not None or curve else (st.container(), st.container())
    with left:
        shown = scores if circuit is None else arrange(circuit)
        picked = widgets.chart(plots.figure(shown), key="graph", select=circuit is not None)
        st.caption(widgets.plain(plots.definition(shown)))
    with right:
        if curve is not None:
            drawn = plots.figure(curve)
            drawn.add_vline(x=size, line={"color": canvas.FAINT, "dash": "dot"})
            widgets.chart(drawn, key="curve")
            st.caption(widgets.plain(plots.definition(curve)))
        node = choose(circuit, scores, picked) if circuit is not None and circuit.nodes else ""
        latent_page(run, node)
    if circuit is not None and node:
        if judging.of_heads(circuit):
            does(run, node)
        change(run, circuit, size, curve, node)
    if circuit is None or judging.of_heads(circuit):
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
