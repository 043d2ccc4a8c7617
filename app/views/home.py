"""Home: three ways in, what was computed last, and how this machine is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import streamlit as st

from app import widgets
from circuits import judging
from workbench import health, registry, runs
from workbench.errors import UserError

SHOWN = 6
WAYS = (
    ("Find a circuit", "Which heads and MLPs make the model do a task, through which edges, and is that true?",
     "views/discovery.py", ":material/hub:"),
    ("Read a sparse model", "A model most of whose weights are zero, and the few channels that do a task in it.",
     "views/sparse.py", ":material/grain:"),
    ("Steer a language", "The one latent that makes a model go on in another language, against every alternative.",
     "views/steering.py", ":material/translate:"),
)  # fmt: skip


def ways() -> None:
    for column, (title, about, page, icon) in zip(st.columns(3), WAYS, strict=True):
        with column, st.container(border=True, height="stretch"):
            st.page_link(page, label=f"**{title}**", icon=icon)
            st.caption(about)


def recent(rows: list[dict[str, Any]]) -> None:
    st.subheader("Computed last", anchor=False)
    for row in rows[:SHOWN]:
        words = [row["analysis"], row["model"], row["task"], f"{row['created']:%-d %b, %H:%M}"]
        left, right = st.columns([5, 1], vertical_alignment="center")
        label = widgets.plain(" · ".join(word for word in words if word))
        left.page_link("views/run.py", label=label, icon=":material/description:", query_params={"run": row["run"]})
        if drawn(row["run"], row["analysis"]):
            right.page_link(
                "views/circuit.py", label="circuit", icon=":material/hub:", query_params={"run": row["run"]}
            )
    st.page_link("views/runs.py", label=f"All {len(rows)} runs", icon=":material/list:")


@st.cache_data(max_entries=200, show_spinner=False)
def drawn(id: str, analysis: str) -> bool:
    """Whether a run has a circuit page."""
    try:
        return bool(registry.get_analysis(analysis).task) and judging.has_circuit(runs.get_run(id).result)
    except (UserError, *widgets.BROKEN):
        return False


def machine() -> None:
    st.subheader("This machine", anchor=False)
    cells = health.facts()
    st.table(
        {"what": list(cells), "how": list(map(widgets.plain, cells.values()))},
        border="horizontal", hide_index=True, hide_header=True,
    )  # fmt: skip


def checked() -> None:
    st.subheader("Self-checks", anchor=False)
    found = [asdict(check) for check in health.checks()]
    if not found:
        st.caption("Every model is held to plain Hugging Face when it is first loaded; none was yet.")
        return
    st.dataframe(
        found,
        key="checks",
        hide_index=True,
        row_height=36,
        column_config={
            "logits": st.column_config.NumberColumn("largest difference of logits", format="%.1e"),
            "residual": st.column_config.NumberColumn("error of the residual sum", format="%.1e"),
            "current": st.column_config.CheckboxColumn("with what is installed"),
        },
    )
    st.caption("Held to plain Hugging Face when a model is first loaded, and again when a library changes.")


st.title("Workbench", anchor=False)
st.caption("How does a language model do something, and is the answer true?")
ways()
rows, unreadable = widgets.listing()
left, right = st.columns([3, 2], gap="large")
with left:
    if rows:
        recent(rows)
    checked()
with right:
    machine()
if unreadable:
    st.page_link("views/runs.py", label=f"{len(unreadable)} runs cannot be read", icon=":material/warning:")
