"""Steer with a latent and see what is written, at several strengths, beside what the model writes by itself. Addressed
by ?run=<id> of such a run, or by what is chosen (sae, hook, latent, unit, kind...) where that differs from the
defaults."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, get_args

import streamlit as st

from app import widgets
from saes import try_figures, try_on, whereabouts
from saes.latents import Example
from saes.steering import play
from saes.steering.languages import LANGUAGES
from saes.steering.play import Played, Row
from saes.steering.steer import Kind, Scope
from saes.whereabouts import Place, called
from workbench import canvas, plots, registry, runs
from workbench.errors import UserError
from workbench.runs import Run

NAME = "steer"
LONG = 500  # characters of a prompt that the address holds; a longer one is found again by its run alone
SAFE = 2**53 - 1  # what a browser counts to
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, SAFE), "latent": (0, SAFE), "other": (0, SAFE), "steps": (1, 100_000), "samples": (1, play.MOST),
    "temperature": (0.0, 1000.0), "decay": (0.001, 1.0), "unit": (-1e9, 1e9),
}  # fmt: skip
HELPS = {name: one.help for name, one in registry.get_analysis(NAME).parameters.items()}


# ---- fields and address ----


def key(name: str) -> str:
    return f"playground {name}"


def defaults() -> dict[str, Any]:
    return {"seed": 0, **{name: one.default for name, one in registry.get_analysis(NAME).parameters.items()}}


def accepted(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of what an address or a record says, what the fields take."""
    found: dict[str, Any] = {}
    with suppress(ValueError, TypeError):
        found["seed"] = int(given.get("seed", 0))
    for name in given.keys() & HELPS.keys():
        with suppress(UserError):
            found[name] = registry.bind(registry.get_analysis(NAME), {name: given[name]})[name]
    return {name: value for name, value in found.items() if fits(name, value)}


def fits(name: str, value: Any) -> bool:
    if name not in RANGES or value is None:
        return True
    low, high = RANGES[name]
    return bool(low <= value <= high)  # which no NaN is


def fill(names: Mapping[str, Mapping[str, Place]], run: Run | None) -> None:
    """What the address says goes into the fields, if it is another than this page wrote there."""
    arrived = st.query_params.to_dict()
    if arrived == st.session_state.get("playground address") and key("prompt") in st.session_state:
        return
    given: dict[str, Any] = arrived
    if run is not None:
        given = {"seed": run.record["key"]["seed"], **run.record["key"]["parameters"]}
    values = defaults() | accepted(given)
    sae, hook = called(names, str(values["sae"]), str(values["hook"]))
    if run is not None and not sae:
        raise UserError(f"the SAE of {run.id} has no name here; open the run itself.")
    values |= {"sae": sae, "hook": hook}
    for name, value in values.items():
        st.session_state[key(name)] = value


def keep(on: Mapping[str, Any], run: Run | None) -> None:
    """Write the address: the run and what of it is shown, or else what differs from the defaults."""
    usual = defaults() | {"model": on["model"]}
    address = {name: str(value) for name, value in on.items() if value != usual[name]}
    if len(address.get("prompt", "")) > LONG:
        del address["prompt"]
    if run is not None:
        address = {"run": run.id, "at": st.query_params.get("at", "")}
    st.query_params.from_dict({name: value for name, value in address.items() if value})
    st.session_state["playground address"] = st.query_params.to_dict()


# ---- what to write ----


def choose(names: Mapping[str, Mapping[str, Place]]) -> tuple[str, Place, int]:
    """Which SAE, at which hook point, which latent. Those that write elsewhere than they read are not among them."""
    first, second, third = st.columns([4, 4, 2])
    if st.session_state[key("sae")] not in names:
        usual = defaults()["sae"]
        st.session_state[key("sae")] = usual if usual in names else next(iter(names))
    sae = first.selectbox("SAE", list(names), key=key("sae"))
    hooks = list(names[sae])
    if st.session_state[key("hook")] not in hooks:
        st.session_state[key("hook")] = hooks[0]
    place = names[sae][second.selectbox("hook point", hooks, key=key("hook"), disabled=len(hooks) == 1)]
    most = place.n_latents - 1
    if st.session_state[key("latent")] > most:
        st.session_state[key("latent")] = 0
    latent = third.number_input("latent", 0, most, key=key("latent"), help=f"0 to {most:,}")
    return sae, place, int(latent)


def number(name: str, label: str = "", **more: Any) -> Any:
    low, high = RANGES[name]
    return st.number_input(label or name, low, high, key=key(name), help=HELPS.get(name), **more)


def ways(place: Place) -> dict[str, Any]:
    """How to steer, and by which chance."""
    found: dict[str, Any] = {}
    kind, scope, strengths, unit = st.columns([3, 3, 4, 3])
    found["kind"] = kind.selectbox("kind", get_args(Kind), key=key("kind"), help=MEANINGS)
    found["scope"] = scope.selectbox("positions", get_args(Scope), key=key("scope"), help=HELPS["scope"])
    with strengths:
        asked = st.text_input("strengths", key=key("strengths"), help=HELPS["strengths"])
    with unit:
        found["unit"] = number("unit", value=None, format="%.4g", step=1.0, placeholder="its mean")
    found["strengths"] = "1" if found["kind"] == "ablate" else asked  # which has none
    if found["kind"] == "swap":
        st.session_state[key("other")] = min(st.session_state[key("other")] or 0, place.n_latents - 1)
        found["other"] = number("other", "other latent", width=200)
    with st.expander("Chance and length", icon=":material/casino:"):
        fields = ("decay", "temperature", "steps", "samples", "seed")
        for column, name in zip(st.columns(len(fields)), fields, strict=True):
            with column:
                found[name] = number(name, step=0.05 if name in ("decay", "temperature") else 1)
    return {name: value for name, value in found.items() if value is not None}


MEANINGS = widgets.plain("; ".join(f"{kind}: {what}" for kind, what in play.MEANING.items()))


# ---- what was written ----


def shown(result: Played) -> float:
    """The strength that is looked at."""
    strengths = sorted(result.strengths)
    if len(strengths) == 1:
        return strengths[0]
    with suppress(ValueError):
        at = float(st.query_params.get("at", ""))
        if at in strengths:
            st.session_state.setdefault(key("at"), at)
    if st.session_state.get(key("at")) not in strengths:
        st.session_state[key("at")] = strengths[-1]
    at = st.select_slider("strength", strengths, key=key("at"), format_func="{:g}".format, width=400)
    st.query_params["at"] = f"{at:g}"
    st.session_state["playground address"] = st.query_params.to_dict()
    return float(at)


def text(result: Played, row: Row, largest: float) -> None:
    facts = [f"applied at {row.applied}/{row.due} positions"] if row.strength is not None else []
    facts += [f"{canvas.number(row.bits, 2, signed=False)} bits per token"] if row.tokens else []
    facts += [LANGUAGES.get(row.language, row.language)] if row.language else []
    with st.container(border=True):
        if row.tokens:
            at = max(range(len(row.values)), key=row.values.__getitem__)
            st.html(try_figures.heat(Example(row.tokens, row.values, at), largest))
        else:
            st.caption("It ended the text at once.")
        st.caption(widgets.plain(" · ".join(facts)))


def show(run: Run) -> None:
    result: Played = run.result
    at = shown(result)
    largest = max((value for row in result.rows for value in row.values), default=0.0)
    columns = st.columns(2, gap="large")
    for column, title, strength in ((columns[0], "Unsteered", None), (columns[1], f"Strength {at:g}", at)):
        with column:
            st.subheader(title, anchor=False)
            for row in result.at(strength):
                text(result, row, largest)
    st.caption("Behind each token, how active the latent is when the model reads the text unsteered.")
    for table in plots.tables(result):
        st.subheader("Every strength", anchor=False)
        cells = {name: list(map(widgets.plain, column)) for name, column in table.columns.items()}
        st.table(cells, border="horizontal", hide_index=True)
    widgets.chart(plots.figure(result), key="playground figure")
    st.caption(widgets.plain(plots.definition(result)))
    st.page_link("views/run.py", label="The run", icon=":material/open_in_new:", query_params={"run": run.id})


def of_steer(id: str) -> Run:
    """Raises UserError for a run of anything else."""
    found = runs.get_run(id)
    name = found.record["key"]["analysis"]
    if name != NAME:
        raise UserError(f"{found.id} is a run of {name}, which writes no texts to play with; open one of {NAME}.")
    return found


def page(names: Mapping[str, Mapping[str, Place]], given: Run | None) -> None:
    fill(names, given)
    sae, place, latent = choose(names)
    prompt = st.text_area("prompt", key=key("prompt"), height=80)
    on = {"model": place.model, "sae": sae, "hook": place.hook, "latent": latent, "prompt": prompt, **ways(place)}
    query = {"sae": sae, "hook": place.hook, "latent": str(latent)}
    st.page_link("views/latent.py", label="What this latent responds to", icon=":material/search:", query_params=query)
    found = None
    try:
        try_on.check_text(prompt, "prompt")
        play.strengths_of(on["strengths"])
        found = runs.find(NAME, **on)
    except UserError as error:
        keep(on, None)
        widgets.refusal(str(error))
        return
    keep(on, found)
    if found is not None:
        show(found)
    else:
        widgets.computed(NAME, on, "The model writes every strength, and once by itself, by the same chance.", "Write")


st.title("Playground", anchor=False)
known = whereabouts.known()
names = {
    name: some
    for name, places in known.items()
    if (some := {hook: one for hook, one in places.items() if not one.transcoder})
}
given = st.query_params.get("run", "")
if not names:
    raise UserError("no SAE has a name here; train one: wb run train-sae --model smollm2-135m --hooks 20.")
run = of_steer(given) if given else None
with widgets.whole(run):
    page(names, run)
