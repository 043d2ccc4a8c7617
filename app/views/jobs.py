"""All jobs, newest first: what computes, how far it is, and what came of the others. A click on a row opens it."""

from __future__ import annotations

import streamlit as st

from workbench import jobs
from workbench.progress import duration


def rows(found: list[jobs.Job]) -> list[dict[str, object]]:
    return [
        {
            "state": job.state,
            "command": job.command,
            "done": None if job.share is None else round(job.share, 2),
            "left": duration(job.left),
            "took": duration(job.seconds),
            "memory": job.peak / 1e6 or None,
            "job": job.id,
        }
        for job in found
    ]


@st.fragment(run_every=2.0)
def listing() -> None:
    found, sentences = jobs.jobs()
    for sentence in sentences:
        st.text(sentence)
    if not found:
        with st.container(border=True):
            st.markdown("**No jobs yet.** Start an analysis from its form, or in a terminal:")
            st.code("wb job start run patching --task ioi", language="bash")
        return
    event = st.dataframe(
        rows(found),
        key="table",
        hide_index=True,
        placeholder="",
        height=min(36 * (len(found) + 1) + 2, 640),
        row_height=36,
        on_select="rerun",
        selection_mode="single-cell",
        column_config={
            "state": st.column_config.TextColumn(width=90),
            "command": st.column_config.TextColumn(width=470),
            "done": st.column_config.ProgressColumn(width=130, format="percent", min_value=0, max_value=1),
            "left": st.column_config.TextColumn(width=80),
            "took": st.column_config.TextColumn(width=80),
            "memory": st.column_config.NumberColumn("memory, MB", format="%.0f", width=100),
            "job": st.column_config.TextColumn(width=220),
        },
    )
    if event.selection.cells:
        row, _ = event.selection.cells[0]
        st.switch_page("views/job.py", query_params={"job": found[row].id})


st.title("Jobs", anchor=False)
listing()
