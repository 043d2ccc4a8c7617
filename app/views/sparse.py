"""Read a sparse model: how it was trained, the circuits of its tasks, and one of them channel by channel, at any size.
?model=&task=&size=&node="""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import widgets
from circuits.sparse import training_run
from circuits.sparse.circuit_figures import sizes_figure
from circuits.sparse.pruning_run import TaskCircuits
from circuits.sparse.reading import Node
from circuits.sparse.sizes import SizedCircuit
from workbench import canvas, plots, runs
from workbench.errors import UserError
from workbench.runs import Run

PAIRS = 32


def strip(figures: list[tuple[str, str, str | None]]) -> None:
    for column, (label, value, help) in zip(st.columns(len(figures)), figures, strict=True):
        column.metric(label, value, help=help)


def training(run: Run) -> None:
    found = run.summary
    figures: list[tuple[str, str, str | None]] = [
        ("held-out loss", f"{found['held_out_loss']:.2f}", "Next-token cross-entropy, nats per token."),
        ("weights", f"{found['nonzero']:,}", f"That are not zero, of {found['of_weights']:,}."),
        ("tokens", f"{found['tokens']:,}", "It was trained on."),
    ]
    if "tasks_solved" in found:
        solved = f"{found['tasks_solved']} of {found['of_tasks']}"
        figures.append(("tasks solved", solved, "At least 95 % of held-out prompts."))
    strip(figures)
    st.page_link("views/run.py", label="How it was trained", icon=":material/show_chart:", query_params={"run": run.id})


def circuits_of(model: str, id: str) -> Run | None:
    """The newest run that found the circuits of a model's tasks, if there is one."""
    rows = [r for r in widgets.listing()[0] if r["analysis"] == "sparse-tasks" and r["model"] in (model, id)]
    return runs.get_run(rows[0]["run"]) if rows else None


def all_tasks(model: str, id: str) -> Run | None:
    st.subheader("Circuits of its tasks", anchor=False)
    found = circuits_of(model, id)
    if found is None:
        st.markdown("Which tasks does it solve, and how few channels does each take? Minutes for each task.")
        widgets.start(["run", "sparse-tasks", f"--model={model}"], "Find them")
        return None
    widgets.chart(plots.figure(found.result), key="tasks figure")
    st.caption(widgets.plain(plots.definition(found.result)))
    st.page_link("views/run.py", label="Its run", icon=":material/description:", query_params={"run": found.id})
    return found


def one_task(model: str, tasks: Run) -> None:
    st.subheader("One of them", anchor=False)
    result: TaskCircuits = tasks.result
    names = sorted(name for name, edges in result.reached.items() if edges)
    if not names:
        st.caption("None of its circuits has an edge.")
        return
    task = str(st.selectbox("task", names, key="sparse task", bind="query-params", width=260))
    on = {"model": model, "task": task, "n": PAIRS, "seed": tasks.record["key"]["seed"], "found": tasks.id}
    why = f"Its {result.rows[task].nodes} channels are ablated one by one, and counted down from those it can spare."
    found = widgets.computed("sparse-circuit", on, why, "Read it")
    if isinstance(found, SizedCircuit):
        sized(found, tasks.record["key"]["parameters"].get("target"))
    st.markdown("Would labels that mean nothing, or the same weights in other places, give a circuit too?")
    again: dict[str, Any] = {
        "model": model, "task": task, "n": tasks.record["key"]["parameters"]["pairs"], "sure": 0.0,  # as in the table
    }  # fmt: skip
    checked = runs.find("sparse-prune", **again)
    if checked is None:
        widgets.start(["run", "sparse-prune", *(f"--{k}={v}" for k, v in again.items())], "Prune it with all controls")
    else:
        st.page_link(
            "views/run.py", label="Pruned with all controls", icon=":material/rule:", query_params={"run": checked.id}
        )


def sized(found: SizedCircuit, target: float | None) -> None:
    """Graph and metric of as many channels as the slider says."""
    steps = found.sizes.tolist()
    given = st.query_params.get("size", "")
    at = int(given) if given.isdecimal() and int(given) in steps else steps[-1]
    size = int(st.select_slider("channels", steps, at, key="sparse size", format_func="{:,}".format))
    st.query_params["size"] = str(size)
    i = steps.index(size)
    shown = found.at(size)
    strip(
        [
            ("held-out loss", f"{float(found.loss[i]):.3f}", "Nats per prompt, of the two answers alone."),
            ("of the whole model", f"{found.whole:.3f}", "On the same prompts."),
            ("edges", f"{int(found.edges[i]):,}", "Weights that are not zero, between these channels."),
        ]
    )
    picked = widgets.chart(plots.figure(shown), key="sparse graph", select=True)
    st.caption(widgets.plain(plots.definition(shown)))
    left, right = st.columns(2, gap="large")
    with left:
        drawn = sizes_figure(found, target)
        drawn.add_vline(x=size, line={"color": canvas.FAINT, "dash": "dot"})
        widgets.chart(drawn, key="sparse sizes")
    names = [node.name for node in shown.reading.strongest(size)]
    wanted = picked if picked in names else st.query_params.get("node", "")
    with right:
        label = "channel, those it can spare least first"
        name = st.selectbox(label, names, names.index(wanted) if wanted in names else 0, help="Or click it.")
        st.query_params["node"] = name
        channel(shown.reading[name], shown.reading.answers)


def channel(node: Node, answers: list[str]) -> None:
    one, two = (widgets.literal(answer) for answer in answers)
    rows = [
        ("the circuit's loss without it", f"{canvas.number(node.loss_without, 3)} nats"),
        (f"where {one} is right it is", canvas.number(node.one, 3)),
        (f"where {two} is right it is", canvas.number(node.two, 3)),
    ]
    if node.towards_one is not None:
        rows.append((f"writes towards {one}", canvas.number(node.towards_one, 3)))
    if node.tokens:
        rows.append(("tokens that have most of it", " ".join(map(widgets.literal, node.tokens))))
    st.table(
        {"what": [what for what, _ in rows], "value": [value for _, value in rows]},
        border="horizontal", hide_index=True, hide_header=True,
    )  # fmt: skip


st.title("Sparse models", anchor=False)
st.caption("Most weights of these models are zero, so that what does a task is a few channels that can be read.")
known: dict[str, Any] = training_run.trained()
try:
    model = str(st.selectbox("model", list(known), key="sparse model", bind="query-params", width=360))
    run = runs.get_run(known[model])
    with widgets.whole(run):
        training(run)
    tasks = all_tasks(model, known[model])
    if tasks is not None:
        with widgets.whole(tasks):
            one_task(model, tasks)
except UserError as error:
    widgets.refusal(str(error))
st.subheader("Train one", anchor=False)
st.markdown("From the smallest preset, four minutes on two cores, to those that want a GPU.")
if st.button("Open the form", icon=":material/play_arrow:"):
    st.switch_page("views/start.py", query_params={"form": "sparse-train"})
