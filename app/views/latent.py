"""A latent of an SAE: what it responds to, what it writes, what it makes of one's own text, and which runs speak of it.
Addressed by ?sae=&hook=&latent=, or by ?run=<id> for the latents of a run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import streamlit as st

from app import widgets
from saes import try_figures, try_on, whereabouts
from saes.latents import Latent, Latents
from saes.sae import NEURONPEDIA
from saes.try_on import TryOn
from saes.whereabouts import Place, Use, called
from workbench import canvas, places, plots, registry, runs, texts
from workbench.errors import UserError
from workbench.runs import Run

NONE = "no SAE has a name here, and none was trained here; train one: wb run train-sae --model smollm2-135m --hooks 20."


@st.cache_data(max_entries=2, show_spinner=False)
def _uses(changed: tuple[tuple[str, int], ...]) -> list[Use]:
    return whereabouts.uses(runs.all_runs()[0])


def uses() -> list[Use]:
    """Which runs speak of which latents, the newest first."""
    # As in widgets.listing: a folder's own time tells whether there are other runs.
    return _uses(tuple((str(root), root.stat().st_mtime_ns) for root in places.roots()))


def fill(names: Mapping[str, Mapping[str, Place]], run: Run | None) -> None:
    """What the address says goes into the fields, if it is another than this page wrote there."""
    arrived = st.query_params.to_dict()
    if arrived == st.session_state.get("latent address") and "latent sae" in st.session_state:
        return
    defaults = registry.get_analysis("steer").parameters
    given = {name: arrived.get(name, "") for name in ("sae", "hook", "latent")}
    if run is not None:
        given |= {"sae": run.record["key"]["parameters"]["sae"], "hook": run.summary["hook"]}
        given["latent"] = given["latent"] if given["latent"] in some_of(run) else next(iter(some_of(run)), "")
    sae, hook = called(names, given["sae"], given["hook"])
    if run is not None and not sae:
        raise UserError(f"the SAE of {run.id} has no name here; open the run itself.")
    if not sae:
        given["latent"] = str(defaults["latent"].default)
        sae, hook = called(names, defaults["sae"].default, "")
    st.session_state["latent sae"], st.session_state["latent hook"] = sae, hook
    st.session_state["latent number"] = given["latent"]


def of_latents(id: str) -> Run:
    """Raises UserError for a run of anything else."""
    found = runs.get_run(id)
    name = found.record["key"]["analysis"]
    if name != "latents":
        raise UserError(f"{found.id} is a run of {name}, which looks at no latents; open one of latents.")
    return found


def some_of(run: Run) -> list[str]:
    return [str(one["latent"]) for one in run.summary["latents"]]


def choose(names: Mapping[str, Mapping[str, Place]]) -> tuple[str, Place, int]:
    """The fields: which SAE, at which hook point, which latent."""
    first, second, third = st.columns([4, 4, 2])
    if st.session_state["latent sae"] not in names:  # it was deleted, or there is none of the default's name
        st.session_state["latent sae"] = next(iter(names))
    sae = first.selectbox("SAE", list(names), key="latent sae")
    hooks = list(names[sae])
    if st.session_state["latent hook"] not in hooks:
        st.session_state["latent hook"] = hooks[0]
    place = names[sae][second.selectbox("hook point", hooks, key="latent hook", disabled=len(hooks) == 1)]
    given = st.session_state["latent number"]
    most = place.n_latents - 1
    number = int(given) if re.fullmatch(r"[0-9]{1,9}", str(given)) else 0
    st.session_state["latent number"] = number if number <= most else 0
    number = third.number_input("latent", 0, most, key="latent number", help=f"0 to {most:,}")
    return sae, place, int(number)


def of_the_run(run: Run, latent: int) -> None:
    """Which of the run's latents."""
    some = some_of(run)
    picked = st.selectbox("of this run", some, some.index(str(latent)), key=f"latent of {run.id} {latent}", width=200)
    if picked != str(latent):
        st.query_params["latent"] = picked
        st.rerun()


def strip(one: Latent, sae: str, place: Place) -> None:
    figures = [
        ("density", f"{one.density:.3%}", "Share of positions at which it is active."),
        ("mean", canvas.number(one.mean, 2, signed=False), "Of its values where it is active."),
        ("largest", canvas.number(one.largest, 2, signed=False), "Of all its values."),
    ]
    *columns, last = st.columns([2, 2, 2, 3], vertical_alignment="center")
    for column, (label, value, help) in zip(columns, figures, strict=True):
        column.metric(label, value, help=help)
    with last:
        to_playground(sae, place, one.latent, one.mean)


def to_playground(sae: str, place: Place, latent: int, unit: float | None) -> None:
    if place.transcoder:
        return
    query = {"sae": sae, "hook": place.hook, "latent": str(latent)} | ({"unit": f"{unit:.4g}"} if unit else {})
    st.page_link("views/playground.py", label="Steer with this", icon=":material/tune:", query_params=query)


def examples(one: Latent) -> None:
    """Where it is largest, and examples of every strength."""
    st.subheader("Where it is largest", anchor=False)
    if not one.top:
        st.caption("It is active nowhere in this text.")
        return
    st.html(try_figures.heats(one.top, one.largest))
    if any(one.buckets):
        st.subheader("At every strength", anchor=False)
        st.caption("Drawn at random from each fifth of its values. The largest alone look more of a piece than it is.")
        names = ["weakest fifth", "second", "middle", "fourth", "strongest fifth"]
        for tab, some in zip(st.tabs(names, default=names[-1]), one.buckets, strict=True):
            with tab:
                if some:
                    st.html(try_figures.heats(some, one.largest, try_figures.AROUND))


def words(title: str, some: tuple[tuple[str, float], ...]) -> None:
    st.caption(title)
    tokens = [widgets.literal(token) for token, _ in some]
    cells = {"token": tokens, "logit": canvas.numbers([x for _, x in some])}
    st.table(cells, border="horizontal", hide_index=True, hide_header=True)


def writes(one: Latent, sae: str, place: Place) -> None:
    st.subheader("Its values", anchor=False)
    if sum(one.histogram):
        widgets.chart(try_figures.values_figure(one), key="latent values")
    if one.promoted:
        st.subheader("What it writes", anchor=False)
        for column, (title, some) in zip(
            st.columns(2), [("raises", one.promoted), ("lowers", one.suppressed)], strict=True
        ):
            with column:
                words(title, some)
        st.caption("Logits by a unit of it, by the final norm's weight and the unembedding alone, mean taken off.")
    st.subheader("Neighbours", anchor=False)
    links(sae, place, {other: f"{other} · {canvas.number(cosine, 2)}" for other, cosine in one.neighbours})
    st.caption("By cosine of the decoder rows.")


def own_text(sae: str, place: Place, latent: int, largest: float) -> None:
    """What it makes of one's own text."""
    st.subheader("Your own text", anchor=False)
    text = st.text_area("text", key="latent text", placeholder="write or paste a text", height=80)
    if not text.strip():
        return
    try:
        try_on.check_text(text)
    except UserError as error:
        widgets.refusal(str(error))
        return
    on = {"model": place.model, "sae": sae, "hook": place.hook, "which": str(latent), "text": text}
    found = widgets.computed("try-on", on, "The model reads it once.", "Read it")
    if not isinstance(found, TryOn):
        return
    seen = found.example(latent)
    st.html(try_figures.heat(seen, max(seen.value, largest)))
    widgets.chart(plots.figure(found), key="latent try-on")
    st.caption(widgets.plain(plots.definition(found)))
    st.caption("Latents that are largest in it:")
    links(sae, place, {latent: str(latent) for latent in found.top})


def links(sae: str, place: Place, labels: Mapping[int, str]) -> None:
    """To the pages of other latents."""
    with st.container(horizontal=True, gap="small"):
        for other, label in labels.items():
            query = {"sae": sae, "hook": place.hook, "latent": str(other)}
            st.page_link("views/latent.py", label=label, query_params=query)


def used(some: list[Use]) -> None:
    st.subheader("Used in", anchor=False)
    if not some:
        st.caption("No other run speaks of it.")
    for one in some[:20]:
        left, right = st.columns([2, 3], vertical_alignment="center")
        left.page_link("views/run.py", label=one.run, icon=":material/open_in_new:", query_params={"run": one.run})
        right.caption(widgets.plain(f"{one.analysis}: {one.how}"))


def looked_at(sae: str, place: Place, latent: int, ids: list[str]) -> Latent | None:
    """What a run says of it, or what has to be pressed to have one."""
    if ids:
        result: Any = runs.get_run(ids[0]).result
    else:
        text = st.selectbox(
            "text", [texts.HELP, "parallel"], key="latent corpus", width=300,
            help="Help pages in nine languages, fetched once (28 MB); or the everyday sentences that come along.",
        )  # fmt: skip
        on = {"model": place.model, "sae": sae, "hook": place.hook, "which": str(latent), "text": text}
        on |= {"tokens": "8000", "length": "16"} if text == "parallel" else {}
        why = "Nobody has looked at this latent yet. A text is read, and where it is active is kept."
        result = widgets.computed("latents", on, why, "Look at it")
    if not isinstance(result, Latents):
        return None
    st.caption(widgets.plain(plots.definition(result)))
    one, page = next(
        (one, page)
        for one, page in itertools.zip_longest(result.latents, result.pages, fillvalue="")
        if isinstance(one, Latent) and one.latent == latent
    )
    if str(page).startswith(NEURONPEDIA):  # a run that was imported may hold any address
        st.link_button("On Neuronpedia", str(page), icon=":material/open_in_new:")
    return one


def show(names: Mapping[str, Mapping[str, Place]], run: Run | None) -> None:
    fill(names, run)
    sae, place, latent = choose(names)
    address = {"sae": sae, "hook": place.hook, "latent": str(latent)}
    mine = [one for one in uses() if (one.folder, one.latent) == (place.folder, latent)]
    ids = [one.run for one in mine if one.analysis == "latents"]
    if run is not None and run.id in ids:
        address["run"], ids = run.id, [run.id]
        of_the_run(run, latent)
    st.query_params.from_dict(address)
    st.session_state["latent address"] = address
    st.set_page_config(page_title=f"Latent {latent} · Workbench")
    one = looked_at(sae, place, latent, ids)
    if one is None:
        to_playground(sae, place, latent, None)
    else:
        strip(one, sae, place)
        left, right = st.columns([3, 2], gap="large")
        with left:
            examples(one)
        with right:
            writes(one, sae, place)
    left, right = st.columns([3, 2], gap="large")
    with left:
        own_text(sae, place, latent, one.largest if one is not None else 0.0)
    with right:
        used([one for one in mine if one.analysis != "latents"])


st.title("Latents", anchor=False)
names, given = whereabouts.known(), st.query_params.get("run", "")
if not names:
    raise UserError(NONE)
run = of_latents(given) if given else None
with widgets.whole(run):
    show(names, run)
