"""One job: how far it is, its curves while they grow, the end of its log; cancel, and go on. Addressed by ?job=<id>."""

from __future__ import annotations

import streamlit as st

from app import widgets
from workbench import jobs, plots
from workbench.errors import UserError
from workbench.jobs import Job
from workbench.progress import duration

ABOUT = {
    "waiting": "Waiting for another job to end.",
    "running": "Computing. It goes on when this page is closed.",
    "done": "Done.",
    "failed": "It failed. What it had stored is kept.",
    "cancelled": "Cancelled. What it had stored is kept, and it goes on from there.",
    "killed": "Its process is gone, and said nothing. What it had stored is kept, and it goes on from there.",
}


def show(id: str) -> None:
    job = jobs.get(id)
    st.caption(ABOUT[job.state])
    buttons(job)
    if job.why:
        widgets.refusal(job.why)
    for stage in job.stages:
        st.progress(stage.share or 0.0, widgets.plain(str(stage)))
    for column, (label, value) in zip(
        st.columns(4),
        [
            ("state", job.state),
            ("time", duration(job.seconds)),
            ("memory", f"{job.peak / 1e6:,.0f} MB"),
            ("attempts", f"{job.attempts}"),
        ],
        strict=True,
    ):
        column.metric(label, value)
    for name, points in job.notes().items():
        st.subheader(widgets.plain(name), anchor=False)
        widgets.chart(plots.notes_figure(points), key=f"notes {name}")
    st.subheader("Command", anchor=False)
    st.code(job.command, language="bash", wrap_lines=True)
    if log := job.log():
        st.subheader("Log", anchor=False)
        st.code("\n".join(log.splitlines()[-30:]), language=None, wrap_lines=True)


def buttons(job: Job) -> None:
    if job.run is not None:
        if st.button("Open the run", type="primary", icon=":material/open_in_new:"):
            st.switch_page("views/run.py", query_params={"run": job.run})
    elif job.state in jobs.ENDED:
        if st.button("Go on", type="primary", icon=":material/play_arrow:"):
            jobs.resume(job.id)
            st.rerun()
    elif st.button("Cancel", icon=":material/stop:"):
        jobs.cancel(job.id)
        st.rerun()


top = st.container(gap=None)
top.page_link("views/jobs.py", label="All jobs", icon=":material/arrow_back:")
chosen = st.query_params.get("job", "")
if not chosen:
    raise UserError("no job is chosen; pick one from the list of all jobs.")
job = jobs.get(chosen)
st.set_page_config(page_title=f"{job.id} · Workbench")
with top:
    st.title(widgets.plain(" ".join(job.words[:2])), anchor=False)
# Polled while there is something to see; when it ends the whole page is drawn once more, and no longer polled.
active = job.state not in jobs.ENDED


@st.fragment(run_every=1.0 if active else None)
def live() -> None:
    show(chosen)
    if active and jobs.get(chosen).state in jobs.ENDED:
        st.rerun()


live()
