"""A form for any analysis, made of its signature: what it takes, and what each parameter does. Starts it as a job.
Addressed by ?form=<analysis> and what in it differs from the defaults."""

from __future__ import annotations

import shlex
from typing import Any

import streamlit as st

from app import widgets
from workbench import jobs, registry, runs
from workbench.errors import UserError
from workbench.registry import Analysis, Parameter

ACROSS = 3
LONG = 500  # characters of a value that the address holds


def fill(analysis: Analysis) -> None:
    """What the address says goes into the fields, if it is another than this page wrote there."""
    arrived = address()
    form, known = st.session_state.get("start address", ("", {}))
    if (form, known) == (analysis.name, arrived):
        return
    if form and arrived == known:  # another form was chosen, and these are of the last
        arrived = {}
    for name in ("model", "task", "n", "seed", *analysis.parameters):
        value = read(analysis, name, arrived[name]) if name in arrived else None
        if value is None:
            st.session_state.pop(f"{analysis.name} {name}", None)
        else:
            st.session_state[f"{analysis.name} {name}"] = value


def address() -> dict[str, str]:
    """Without the form, which is a field's own."""
    return {name: value for name, value in st.query_params.to_dict().items() if name != "form"}


def read(analysis: Analysis, name: str, text: str) -> Any:
    """The value of a field from a text; None for what it does not take."""
    if name in ("n", "seed"):
        return int(text) if text.isdecimal() and (name == "n") <= int(text) < 2**53 else None
    if name == "task":
        return text if text in registry.tasks() else None
    if name == "model":
        return text
    kind = analysis.parameters[name].kind
    if choices := registry.choices(kind):
        return next((one for one in choices if str(one) == text), None)
    if kind is bool:
        return {"true": True, "false": False}.get(text)
    return text


def keep(analysis: Analysis, on: dict[str, Any], given: dict[str, str]) -> None:
    """Write the address."""
    usual = {"model": analysis.model, "task": analysis.task, "n": analysis.n, "seed": 0}
    changed = {name: str(value) for name, value in on.items() if value != usual[name]}
    short = {name: value for name, value in (changed | given).items() if value and len(value) <= LONG}
    for name in address():
        if name not in short:
            del st.query_params[name]
    for name, value in short.items():
        st.query_params[name] = value
    st.session_state["start address"] = (analysis.name, address())


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
fill(chosen)
on, given = form(chosen)
keep(chosen, on, given)
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
