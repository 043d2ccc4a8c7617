"""The activation store: what it holds, how full it is; check it, keep parts of it, and make room."""

from __future__ import annotations

import streamlit as st

from app import widgets
from workbench import activations, jobs
from workbench.activations import ActivationStore

ALL = "all hook points"


def figures(store: ActivationStore) -> None:
    stats = store.stats()
    tiers = [("disk", stats.disk_entries, stats.disk_bytes, stats.disk_budget)]
    tiers += [("memory of this app", stats.memory_entries, stats.memory_bytes, stats.memory_budget)]
    if stats.device_budget:
        tiers += [("GPU", stats.device_entries, stats.device_bytes, stats.device_budget)]
    for column, (name, entries, size, budget) in zip(st.columns(3), tiers, strict=False):
        column.metric(name, f"{size / 1e9:,.2f} GB", help=f"{entries:,} activations; room for {budget / 1e9:,.1f} GB.")
        column.progress(min(1.0, size / budget) if budget else 0.0)


def table(store: ActivationStore) -> None:
    rows = [
        {
            "model": one.model_name,
            "hook point": one.hook,
            "activations": one.entries,
            "MB": one.bytes / 1e6,
            "last used": one.used,
            "pinned": one.pinned,
        }
        for one in store.series()
    ]
    st.dataframe(
        rows,
        key="series",
        hide_index=True,
        height=min(36 * (len(rows) + 1) + 2, 480),
        row_height=36,
        column_config={"MB": st.column_config.NumberColumn(format="%.1f")},
    )


def upkeep(store: ActivationStore) -> None:
    check, room = st.columns(2, gap="large")
    with check:
        st.subheader("Check", anchor=False)
        st.caption("Reads everything and compares it with its checksums, as a job.")
        if st.button("Verify", icon=":material/fact_check:"):
            st.switch_page("views/job.py", query_params={"job": jobs.start(["store", "verify"]).id})
    with room:
        st.subheader("Make room", anchor=False)
        st.caption("Dropped activations are computed again when they are asked for. What is pinned stays.")
        series = store.series()
        names = {one.model: one.model_name for one in series}
        model = st.selectbox("model", list(names), format_func=lambda id: names[id], key="evict model")
        hooks = [one.hook for one in series if one.model == model]
        hook = st.selectbox("hook point", [ALL, *hooks], key="evict hook")
        some = [one for one in series if one.model == model and hook in (ALL, one.hook)]
        size = sum(one.bytes for one in some if not one.pinned)
        sure = st.checkbox(f"Drop {size / 1e6:,.1f} MB", key="evict sure", disabled=not size)
        if st.button("Drop", icon=":material/delete:", disabled=not (sure and size)):
            freed = store.evict(model=model, hook=None if hook == ALL else hook)
            st.session_state["freed"] = f"Freed {freed / 1e6:,.1f} MB."
            st.rerun()


st.title("Activation store", anchor=False)
store = activations.shared()
if said := st.session_state.pop("freed", ""):
    st.success(said)
figures(store)
if store.series():
    table(store)
    upkeep(store)
    for pin in store.pins():
        st.caption("pinned: " + widgets.plain(", ".join(f"{key} {value}" for key, value in pin.items() if value)))
else:
    with st.container(border=True):
        st.markdown("**Nothing is stored yet.** Every analysis keeps what it computes here:")
        st.code("wb run patching --task ioi", language="bash")
st.caption("Kept in")
st.code(str(store.disk.root), language=None, wrap_lines=True)
