"""A run as one file, out of this machine and into it. Addressed by ?run=<id>&size=, the size of a circuit that is
drawn in place of the scores it is made of."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import streamlit as st

from app import widgets
from circuits import judging
from circuits.graph import EdgeScores
from workbench import bundle, runs, standalone
from workbench.errors import UserError
from workbench.runs import Run

MEGABYTES = 200  # of a file that the browser may send
SAID = {
    bundle.PAGE: "Figure, tables and provenance; opens without server or network",
    bundle.SVG: "The figure alone; only if a Chromium or Chrome is found to draw it",
    "notebook.ipynb": "Opens the bundle, draws it, asks for the run again",
    "command.txt": "What the run was made with",
    "environment.json": "Versions and machine",
    bundle.MANIFEST: "Digest and size of every other file",
}


def sentence(text: str) -> None:
    """Several of them may be on the page, of a run and of what was sent."""
    with st.container(border=True):
        st.text(text[:1].upper() + text[1:600])


def choose() -> str:
    rows, _ = widgets.listing()
    if not rows:
        return ""
    said = {row["run"]: f"{row['run']} · {row['model'] or 'no model'} · {row['created']:%-d %b %Y}" for row in rows}
    ids = list(said)
    given = st.query_params.get("run", "")
    at = ids.index(given) if given in ids else 0
    id: str = st.selectbox("run", ids, at, key="export run", format_func=lambda id: said[id])
    st.query_params["run"] = id
    return id


def drawn(run: Run) -> Any:
    """What the page is to show: the result as it is, or a circuit of one of its sizes."""
    result = run.result
    if not isinstance(result, EdgeScores):
        st.query_params.pop("size", None)
        return None
    sizes = [0, *judging.ladder(len(result.scores))]
    given = st.query_params.get("size", "")
    at = sizes.index(int(given)) if given.isdecimal() and int(given) in sizes else 0
    chosen = st.selectbox(
        "the page shows", sizes, at, key="export size",
        format_func=lambda n: f"the circuit of the {n:,} edges of largest score" if n else "the scores",
    )  # fmt: skip
    st.query_params["size"] = str(chosen)
    return judging.circuit_of(run, chosen) if chosen else None


def contents(planned: bundle.Plan, makes_page: bool) -> None:
    sizes: dict[str, list[int]] = {}
    for name, path in planned.files.items():
        sizes.setdefault("/".join(name.split("/")[:2]), []).append(path.stat().st_size)
    rows = [(name, f"The run's folder: {len(some)} files, {size(sum(some))}") for name, some in sizes.items()]
    unreadable = () if makes_page else (bundle.PAGE, bundle.SVG, "notebook.ipynb")
    rows += [(name, about) for name, about in SAID.items() if name not in unreadable]
    rows += [(name, f"Left out: {why}") for name, why in planned.left_out.items()]
    page = ", and a page of 5 MB with its plotting library" if makes_page else ""
    with st.expander(f"What the bundle holds: {size(sum(map(sum, sizes.values())))} of runs{page}"):
        cells = {"in it": [widgets.plain(name) for name, _ in rows], "what": [widgets.plain(what) for _, what in rows]}
        st.table(cells, border="horizontal", hide_index=True)


def size(n: int) -> str:
    return f"{n / 1e6:,.1f} MB" if n >= 10**6 else f"{n / 1e3:,.0f} kB"


def packed(run: Run) -> bytes:
    file = io.BytesIO()
    bundle.write(run, file)
    return file.getvalue()


def take_away(run: Run) -> None:
    planned, notes, origin = bundle.plan(run), bundle.notes(run), bundle.origin(run)
    for note in notes:
        sentence(note)
    if origin is not None:
        st.caption(widgets.plain(f"Imported {origin['imported']}; sha256 of its bundle {origin['sha256']}."))
    readable = True
    try:
        shown = drawn(run)
    except UserError:  # which is among the notes
        shown, readable = None, False
    left, right = st.columns(2)
    # Both are made when they are asked for.
    left.download_button(
        "Download the bundle", partial(packed, run), f"{run.id}.zip", "application/zip", key="export bundle",
        type="primary", icon=":material/archive:", on_click="ignore", width="stretch",
    )  # fmt: skip
    if readable:
        right.download_button(
            "Download the page alone", partial(standalone.page, run, shown), f"{run.id}.html", "text/html",
            key="export page", icon=":material/html:", on_click="ignore", width="stretch",
        )  # fmt: skip
    contents(planned, readable)
    st.caption("The bundle, in a terminal")
    st.code(f"wb export {run.id}", language="bash", wrap_lines=True)
    st.caption("The run's own command")
    st.code(run.record["command"], language="bash", wrap_lines=True)


def bring_in() -> None:
    st.caption(
        "What is sent is checked and put among the runs of this machine. A run that is here already stays as it is. "
        "Digests find damage; they do not tell who made a bundle."
    )
    sent = st.file_uploader(
        f"a bundle of up to {MEGABYTES} MB", "zip", key="import bundle", max_upload_size=MEGABYTES,
        help="Larger ones in a terminal: `wb import FILE`.",
    )  # fmt: skip
    if sent is None:
        return
    done = st.session_state.get("imported bundle")
    if done is None or done[0] != sent.file_id:  # the file stays while the page is drawn again
        with st.spinner("Checking every file…"):
            try:
                done = sent.file_id, bundle.read(sent).id, ""
            except UserError as error:
                done = sent.file_id, "", str(error)
        st.session_state["imported bundle"] = done
        if done[1]:
            st.rerun()  # it is among the runs to choose from now
    _, id, why = done
    if why:
        sentence(why)
        return
    run = runs.get_run(id)
    with st.container(border=True):
        st.markdown(f"**It is here:** {widgets.plain(id)}")
        for note in bundle.notes(run):
            st.text(note)
        st.page_link("views/run.py", label="Open the run", icon=":material/open_in_new:", query_params={"run": id})


st.title("Export and import", anchor=False)
out, into = st.columns([3, 2], gap="large")
with into:
    st.subheader("Bring one in", anchor=False)
    bring_in()
with out:
    st.subheader("Take a run away", anchor=False)
    chosen = choose()
    if chosen:
        run = runs.get_run(chosen)
        with widgets.whole(run):
            take_away(run)
    else:
        st.markdown("**No runs yet.** Start one under *Start*, or bring one in.")
