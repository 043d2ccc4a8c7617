"""All runs, newest first. A click on a row opens it."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import widgets

st.title("Runs", anchor=False)
rows, unreadable = widgets.listing()


def empty() -> None:
    with st.container(border=True):
        st.markdown("**No runs yet.** Start one in a terminal, then reload this page. The demo takes a few minutes:")
        st.code("make demo", language="bash")
        st.markdown("Or find the heads behind one task:")
        st.code("wb run patching --task ioi", language="bash")


def filtered() -> list[dict[str, Any]]:
    shown = rows
    columns = st.columns(3)
    for column, name in zip(columns, ("analysis", "model", "task"), strict=True):
        options = sorted({row[name] for row in rows})
        picked = column.multiselect(name, options, key=name, placeholder="all", bind="query-params")
        shown = [row for row in shown if not picked or row[name] in picked]
    return shown


def table(shown: list[dict[str, Any]]) -> None:
    event = st.dataframe(
        [{name: value for name, value in row.items() if name != "run"} for row in shown],
        key="table",
        hide_index=True,
        placeholder="",
        height=min(36 * (len(shown) + 1) + 2, 640),
        row_height=36,
        on_select="rerun",
        selection_mode="single-cell",
        column_config={
            "analysis": st.column_config.TextColumn(width=175),
            "model": st.column_config.TextColumn(width=125),
            "task": st.column_config.TextColumn(width=115),
            "n": st.column_config.NumberColumn("prompts", width=75),
            "accuracy": st.column_config.NumberColumn(format="%.0f%%", width=85),
            "top heads": st.column_config.TextColumn(width=300),
            "seconds": st.column_config.NumberColumn(format="%.1f", width=80),
            "created": st.column_config.DatetimeColumn("created (UTC)", format="D MMM YYYY, HH:mm", width=160),
        },
    )
    if event.selection.cells:
        row, _ = event.selection.cells[0]
        st.switch_page("views/run.py", query_params={"run": shown[row]["run"]})


if rows:
    shown = filtered()
    if shown:
        table(shown)
        st.caption(f"{len(shown)} of {len(rows)} runs. Click one to open it.")
    else:
        st.info("No run matches all three filters.")
else:
    empty()
if unreadable:
    with st.expander(f"{len(unreadable)} that cannot be read", icon=":material/warning:"):
        for sentence in unreadable:
            st.text(sentence)
