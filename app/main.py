"""The app in the browser: `wb app`. Pages pick and draw; everything they show comes from the packages below them."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app import widgets
from workbench.errors import UserError

st.set_page_config(page_title="Workbench", page_icon=str(Path(__file__).with_name("icon.svg")), layout="wide")
# Not in a folder called pages: Streamlit would serve those files itself to whoever comes first after a start.
page = st.navigation(
    {
        "": [st.Page("views/home.py", title="Home", default=True)],
        "Circuits": [
            st.Page("views/discovery.py", title="Find a circuit", url_path="discovery"),
            st.Page("views/lab.py", title="Patch a pair of prompts", url_path="lab"),
            st.Page("views/sparse.py", title="Sparse models", url_path="sparse"),
        ],
        "Steering": [
            st.Page("views/steering.py", title="Steer a language", url_path="steering"),
            st.Page("views/playground.py", title="Playground", url_path="playground"),
            st.Page("views/latent.py", title="Latents", url_path="latent"),
        ],
        "Results": [
            st.Page("views/runs.py", title="Runs", url_path="runs"),
            st.Page("views/compare.py", title="Compare", url_path="compare"),
            st.Page("views/export.py", title="Export and import", url_path="export"),
        ],
        "Workbench": [
            st.Page("views/start.py", title="Start", url_path="start"),
            st.Page("views/jobs.py", title="Jobs", url_path="jobs"),
            st.Page("views/tasks.py", title="Tasks", url_path="tasks"),
            st.Page("views/models.py", title="Models and SAEs", url_path="models"),
            st.Page("views/store.py", title="Store", url_path="store"),
            st.Page("views/glossary.py", title="Glossary", url_path="glossary"),
        ],
        "Details": [
            st.Page("views/run.py", title="Run", url_path="run", visibility="hidden"),
            st.Page("views/circuit.py", title="Circuit", url_path="circuit", visibility="hidden"),
            st.Page("views/job.py", title="Job", url_path="job", visibility="hidden"),
        ],
    },
    position="top",
)
try:
    page.run()
except UserError as error:  # whatever the packages refuse is a sentence here, as on the command line
    widgets.refusal(str(error))
except OSError as error:
    widgets.refusal(f"{error.strerror or error}: {error.filename or 'input/output'}; check space and permissions.")
