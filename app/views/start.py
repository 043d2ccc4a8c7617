"""A form for any analysis, made of its signature: what it takes, and what each parameter does. Starts it as a job."""

from __future__ import annotations

import shlex
from typing import Any

import streamlit as st

from app import widgets
from workbench import jobs, registry, runs
from workbench.errors import UserError
from workbench.registry import Analysis, Parameter

ACROSS = 3


def value_of(analysis: Analysis, parameter: Parameter) -> str:
    """What is chosen for a parameter, as text: `registry.bind` reads it as it reads the command line."""
    key, choices = f"{analysis.name} {parameter.name}", registry.choices(parameter.kind)
    help = widgets.plain(parameter.help) or None
    if choices:
        at = choices.index(parameter.default) if parameter.default in choices else None
        return str(st.selectbox(parameter.name, choices, index=at, key=key, help=help))
    if parameter.kind is bool:
        return str(st.toggle(parameter.name, parameter.default, key=key, help=help)).lower()
    if parameter.kind == registry.Prose:
        return str(st.text_area(parameter.name, parameter.default, key=key, help=help))
    shown = "" if parameter.default is None else str(parameter.default)
    hint = "the analysis' own" if parameter.default is None else registry.kind_name(parameter.kind)
    return st.text_input(parameter.name, shown, key=key, help=help, placeholder=hint)


def parameters(analysis: Analysis) -> dict[str, str]:
    """What differs from the defaults."""
    given: dict[str, str] = {}
    for start in range(0, len(analysis.parameters), ACROSS):
        some = [*analysis.parameters.values()][start : start + ACROSS]
        for column, parameter in zip(st.columns(ACROSS), some, strict=False):
            with column:
                value = value_of(analysis, parameter)
            default = "" if parameter.default is None else str(parameter.default)
            value = value if parameter.kind == registry.Prose else value.strip()
            if value != (default.lower() if parameter.kind is bool else default):
                given[parameter.name] = value
    return given


def form(analysis: Analysis) -> tuple[dict[str, Any], dict[str, str]]:
    """What it runs on, and its parameters."""
    on: dict[str, Any] = {}
    model, task, n, seed = st.columns([4, 3, 2, 2])
    if analysis.model is not None:
        with model:
            on["model"] = widgets.models(f"{analysis.name} model", analysis.model)
    if analysis.task is not None:
        names = list(registry.tasks())
        on["task"] = task.selectbox("task", names, index=names.index(analysis.task), key=f"{analysis.name} task")
        on["n"] = n.number_input("prompts", 1, None, analysis.n, key=f"{analysis.name} n")
    on["seed"] = seed.number_input("seed", 0, None, 0, key=f"{analysis.name} seed")
    return on, parameters(analysis)


def check(analysis: Analysis, given: dict[str, Any]) -> runs.Run | None:
    """The run, if it is there. Raises UserError for what would be refused."""
    prose = {name for name, one in analysis.parameters.items() if one.kind == registry.Prose}
    widgets.no_paths({name: value for name, value in given.items() if name not in prose})
    return runs.find(analysis.name, **given)


st.title("Start an analysis", anchor=False)
names = list(registry.analyses())
name = st.selectbox("analysis", names, index=names.index("patching"), key="form", bind="query-params")
chosen = registry.get_analysis(name)
st.caption(widgets.plain(chosen.about))
on, given = form(chosen)
words = ["run", chosen.name, *(f"--{key}={value}" for key, value in on.items())]
words += [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
st.code(shlex.join(["wb", *words]), language="bash", wrap_lines=True)
try:
    found = check(chosen, on | given)
except UserError as error:
    widgets.refusal(str(error))
else:
    if found is not None:
        st.markdown("This was computed before; opening it costs nothing.")
        if st.button("Open the run", type="primary", icon=":material/open_in_new:"):
            st.switch_page("views/run.py", query_params={"run": found.id})
    elif st.button("Start", type="primary", icon=":material/play_arrow:"):
        st.switch_page("views/job.py", query_params={"job": jobs.start(words).id})
