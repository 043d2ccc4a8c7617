"""Models, and SAEs of them: what is here, what can be fetched, and under which terms."""

from __future__ import annotations

from typing import Any

import streamlit as st

from workbench import places, pretrained

st.title("Models and SAEs", anchor=False)
wide = st.column_config.TextColumn(width="large")
columns: dict[str, Any] = {"download_mb": "download, MB", "about": wide}
st.dataframe(pretrained.listing(), key="models", hide_index=True, row_height=36, column_config=columns)
st.caption(
    "An embedded model is fetched when it is first used. Also any id of the model hub while that can be reached, and "
    "the id of a run that trained a model."
)
st.subheader("SAEs", anchor=False)
saes = [{"name": name, "what": what} for name, what in places.aliases().items()]
saes += [{"name": name, "what": "a run"} for name in places.names() if name.startswith("train-sae")]
if saes:
    st.dataframe(saes, key="saes", hide_index=True, row_height=36, column_config={"what": wide})
else:
    with st.container(border=True):
        st.markdown("**No SAEs yet.** Train some on the residual stream of a layer:")
        st.code("wb run train-sae --model smollm2-135m --hooks 20", language="bash")
