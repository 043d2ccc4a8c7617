"""Models, and SAEs of them: what is here, what can be fetched, and under which terms."""

from __future__ import annotations

from typing import Any

import streamlit as st

from saes import whereabouts
from workbench import pretrained, runs

st.title("Models and SAEs", anchor=False)
wide = st.column_config.TextColumn(width="large")
columns: dict[str, Any] = {"download_mb": "download, MB", "about": wide}
st.dataframe(pretrained.listing(), key="models", hide_index=True, row_height=36, column_config=columns)
st.caption(
    "An embedded model is fetched when it is first used. Also any id of the model hub while that can be reached, and "
    "the id of a run that trained a model."
)

st.subheader("SAEs", anchor=False)
rows = whereabouts.listing(runs.all_runs()[0])
if rows:
    columns = {label: st.column_config.NumberColumn(format="%.3f") for label in whereabouts.MEASURED.values()}
    columns["L0"] = st.column_config.NumberColumn(format="%.0f")
    st.dataframe(rows, key="saes", hide_index=True, row_height=36, column_config=columns)
    st.caption("Measured on held-out text when it was trained; each is checked against its model when it is used.")
    st.page_link("views/latent.py", label="Look at their latents", icon=":material/search:")
else:
    with st.container(border=True):
        st.markdown("**No SAEs yet.** Train some on the residual stream of a layer:")
        st.code("wb run train-sae --model smollm2-135m --hooks 20", language="bash")
