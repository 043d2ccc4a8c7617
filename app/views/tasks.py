"""Tasks: what each asks, and prompts as they are drawn. ?task=<name>&seed=<n>"""

from __future__ import annotations

from random import Random

import streamlit as st

from app import widgets
from workbench import registry

SHOWN = 5

st.title("Tasks", anchor=False)
tasks = registry.tasks()
left, right = st.columns([4, 1])
name = left.selectbox("task", list(tasks), key="task", bind="query-params")
seed = right.number_input("seed", 0, None, 0, key="seed", bind="query-params")
task = tasks[name]
st.caption(widgets.plain(task.about))
st.markdown(
    f"Measured by {widgets.literal(task.metric)}. The right answer continues the clean prompt; the corrupted one is a "
    "minimal change after which the task's rule no longer gives it."
)
if st.button("Find its circuit", type="primary", icon=":material/play_arrow:"):
    st.session_state["extract task"] = name
    st.switch_page("views/start.py", query_params={"form": "extract"})
rng = Random(seed)
for _ in range(SHOWN):
    prompt = task.draw(rng)
    with st.container(border=True):
        for column, (side, text, answers) in zip(
            st.columns(2, gap="large"),
            [("clean", prompt.clean, prompt.answers), ("corrupted", prompt.corrupted, prompt.wrong)],
            strict=True,
        ):
            with column:
                st.caption(side)
                widgets.verbatim(text)
                st.markdown(widgets.several(answers))
