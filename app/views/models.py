"""Models, and SAEs of them: what is here, what can be fetched, and under which terms."""

from __future__ import annotations

import streamlit as st

from workbench import places, pretrained, settings

st.title("Models and SAEs", anchor=False)
rows = [
    {
        "name": name,
        "here": (settings.home() / "models" / name / "manifest.json").is_file(),
        "licence": one.licence,
        "download, MB": one.megabytes,
        "about": one.about,
    }
    for name, one in pretrained.EMBEDDED.items()
]
for name, local in pretrained.local().items():
    here = pretrained.fingerprint(name) is not None
    rows.append({"name": name, "here": here, "licence": local.licence, "download, MB": 0, "about": local.about})
wide = {"about": st.column_config.TextColumn(width="large")}
st.dataframe(rows, key="models", hide_index=True, row_height=36, column_config=wide)
st.caption(
    "An embedded model is fetched when it is first used. Also any id of the model hub while that can be reached, and "
    "the id of a run that trained a model."
)
st.subheader("SAEs", anchor=False)
saes = [{"name": name, "what": what} for name, what in places.aliases().items()]
saes += [{"name": name, "what": "a run"} for name in places.names() if name.startswith("train-sae")]
if saes:
    st.dataframe(saes, key="saes", hide_index=True, row_height=36, column_config={"what": wide["about"]})
else:
    with st.container(border=True):
        st.markdown("**No SAEs yet.** Train some on the residual stream of a layer:")
        st.code("wb run train-sae --model smollm2-135m --hooks 20", language="bash")
