"""Find a circuit: a model, a task, and the methods that say which of its parts do it; compared on prompts that none of
them saw. ?model=&task=&n=&seed=&methods=..."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import widgets
from circuits import compare
from circuits.compare import Comparison
from workbench import plots, registry, runs

FIRST = "eap-ig"
BOUND: dict[str, Any] = {"bind": "query-params"}


def conditions() -> dict[str, Any]:
    model, task, n, seed = st.columns([4, 3, 2, 2])
    names = list(registry.tasks())
    on: dict[str, Any] = {}
    with model:
        on["model"] = widgets.models("model", registry.get_analysis(FIRST).model, **BOUND)
    on["task"] = task.selectbox("task", names, index=names.index("ioi"), key="task", **BOUND)
    on["n"] = n.number_input("prompts", 2, None, 16, key="n", **BOUND)
    on["seed"] = seed.number_input("seed", 0, None, 0, key="seed", **BOUND)
    widgets.no_paths(on)
    return on


def earlier(on: dict[str, Any]) -> None:
    """Circuits of this task in this model that are there already."""
    known = {*compare.scoring_methods(), "extract"}
    rows = [
        row for row in widgets.listing()[0]
        if (row["model"], row["task"]) == (on["model"], on["task"]) and row["analysis"] in known
    ]  # fmt: skip
    if not rows:
        return
    st.subheader("Found before", anchor=False)
    for row in rows[:8]:
        words = [row["analysis"], f"{row['n']} prompts", f"{row['created']:%-d %b, %H:%M}"]
        st.page_link(
            "views/circuit.py", label=widgets.plain(" · ".join(words)), icon=":material/hub:",
            query_params={"run": row["run"]},
        )  # fmt: skip
    if len(rows) > 8:
        st.caption(f"and {len(rows) - 8} more among all runs")


def one(on: dict[str, Any]) -> None:
    """The circuit by a single method."""
    st.subheader("By one method", anchor=False)
    names = compare.scoring_methods()
    method = str(st.selectbox("method", names, index=names.index(FIRST), key="method", **BOUND))
    st.caption(widgets.plain(registry.get_analysis(method).about))
    found = runs.find(method, **on)
    if found is not None:
        st.page_link(
            "views/circuit.py", label="Its circuit", icon=":material/hub:", query_params={"run": found.id},
        )  # fmt: skip
    else:
        words = ["run", method, *(f"--{name}={value}" for name, value in on.items())]
        widgets.start(words, "Find it")


def several(on: dict[str, Any]) -> None:
    st.subheader("By several, compared", anchor=False)
    first = [name for name in compare.METHODS.split(",") if name != "node-pruning"]
    methods = sorted(st.multiselect("methods", compare.scoring_methods(), first, key="methods", **BOUND))
    if not methods:
        st.caption("Choose at least one.")
        return
    why = "Each finds on half of the prompts and is judged on the other half, held to exact patching."
    found = widgets.computed("compare", on | {"methods": ",".join(methods)}, why, "Compare them")
    if not isinstance(found, Comparison):
        return
    for name, sentence in found.failed.items():
        widgets.refusal(f"{name}: {sentence}")
    widgets.chart(plots.figure(found), key="comparison")
    st.caption(widgets.plain(plots.definition(found)))
    st.dataframe(
        [{"method": name, **row} for name, row in found.table.items()], key="methods table", hide_index=True,
        row_height=36,
    )  # fmt: skip


st.title("Find a circuit", anchor=False)
st.caption("Which heads and MLPs make the model do a task, through which edges, and is that true?")
on = conditions()
task = registry.get_task(on["task"])
st.caption(widgets.plain(task.about))
left, right = st.columns(2, gap="large")
with left:
    one(on)
with right:
    earlier(on)
several(on)
