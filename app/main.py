"""The app in the browser: `wb app`. Pages pick and draw; everything they show comes from the packages below them."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app import widgets
from workbench.errors import UserError

st.set_page_config(page_title="Workbench", page_icon=str(Path(__file__).with_name("icon.svg")), layout="wide")
# Not in a folder called pages: Streamlit would serve those files itself to whoever comes first after a start.
page = st.navigation(
    [
        st.Page("views/runs.py", title="Runs", default=True),
        st.Page("views/start.py", title="Start", url_path="start"),
        st.Page("views/jobs.py", title="Jobs", url_path="jobs"),
        st.Page("views/tasks.py", title="Tasks", url_path="tasks"),
        st.Page("views/models.py", title="Models and SAEs", url_path="models"),
        st.Page("views/store.py", title="Store", url_path="store"),
        st.Page("views/run.py", title="Run", url_path="run", visibility="hidden"),
        st.Page("views/circuit.py", title="Circuit", url_path="circuit", visibility="hidden"),
        st.Page("views/job.py", title="Job", url_path="job", visibility="hidden"),
    ],
    position="top",
)
try:
    page.run()
except UserError as error:  # whatever the packages refuse is a sentence here, as on the command line
    widgets.refusal(str(error))
except OSError as error:
    widgets.refusal(f"{error.strerror or error}: {error.filename or 'input/output'}; check space and permissions.")
