"""Steer a language: search for the latent that does it, choose on validation prompts, and see on test prompts what it
and every alternative do. ?run=<id of a language-steering run>"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import streamlit as st

from app import widgets
from saes.steering.language_steering import LanguageSteering
from saes.steering.languages import LANGUAGES
from workbench import plots, pretrained, registry, runs, standalone
from workbench.errors import UserError
from workbench.runs import Run

ANALYSIS = "language-steering"
LETTERS = "ABCDEFGH"


def search() -> None:
    """Start one: minutes of hours, so that the terms and the cost are said before."""
    st.subheader("Search for one", anchor=False)
    analysis = registry.get_analysis(ANALYSIS)
    model, sae, target = st.columns(3)
    on: dict[str, Any] = {"model": analysis.model}
    with model:
        on["model"] = widgets.models("steering model", analysis.model, bind="query-params")
    on["sae"] = sae.text_input(
        "SAEs", str(analysis.parameters["sae"].default), key="steering sae", bind="query-params",
        help=widgets.plain(analysis.parameters["sae"].help),
    )  # fmt: skip
    languages: list[str] = [name for name in LANGUAGES if name != analysis.parameters["source"].default]
    on["target"] = target.selectbox(
        "language", languages, format_func=lambda x: LANGUAGES[x], key="steering target", bind="query-params"
    )
    widgets.no_paths(on)
    packaged = pretrained.EMBEDDED.get(on["model"])
    terms = packaged.licence if packaged is not None and packaged.terms is not None else ""
    accepted = not terms or st.checkbox(f"I accept the {terms} of {on['model']}.", key="steering terms")
    found = runs.find(ANALYSIS, **on)
    if found is not None:
        st.page_link("views/steering.py", label="It was searched for before", query_params={"run": found.id})
    elif accepted:
        words = ["run", ANALYSIS, *(f"--{name}={value}" for name, value in on.items())]
        widgets.start([*words, "--accept-terms"] if terms else words, "Search")
        st.caption("About half an hour for each language on two cores; it can be cancelled, and goes on where it was.")


def finished() -> list[dict[str, Any]]:
    return [row for row in widgets.listing()[0] if row["analysis"] == ANALYSIS]


def language(run: Run) -> str:
    with widgets.whole(run):
        target = str(run.record["key"]["parameters"]["target"])
    return LANGUAGES.get(target, target)


def show(run: Run, result: LanguageSteering) -> None:
    recipe = result.recipe
    verdict = result.table["latent"]
    words = [recipe.model, LANGUAGES.get(recipe.target, recipe.target), recipe.hook, f"latent {recipe.latent}"]
    st.subheader(widgets.plain(" · ".join(words)), anchor=False)
    for column, (label, value, bounds) in zip(
        st.columns(4),
        [
            ("plain success", verdict.plain, verdict.plain_interval),
            ("strict success", verdict.strict, verdict.strict_interval),
            ("fidelity", verdict.fidelity, None),
            ("score", verdict.score, None),
        ],
        strict=True,
    ):
        about = f"95 % over prompts: {bounds[0]:.2f} to {bounds[1]:.2f}" if bounds else None
        column.metric(label, "none" if value is None else f"{value:.2f}", help=about)
    left, right = st.columns(2)
    left.page_link("views/run.py", label="Its run", icon=":material/description:", query_params={"run": run.id})
    names = ("sae", "hook", "latent", "kind", "scope", "unit", "decay")
    given = {"strengths": str(recipe.strength), **{name: str(getattr(recipe, name)) for name in names}}
    right.page_link("views/playground.py", label="Play with it", icon=":material/tune:", query_params=given)
    left.download_button(
        "Download it as a program", partial(standalone.program, result, run), f"{run.id}.py", "text/x-python",
        key="program", icon=":material/code:", on_click="ignore",
        help="One file that steers the model, and needs torch alone.",
    )  # fmt: skip
    widgets.chart(plots.figure(result), key="steering figure")
    st.caption(widgets.plain(plots.definition(result)))
    front(result)
    blind(run, result)


def front(result: LanguageSteering) -> None:
    st.subheader("Not beaten in both success and repetition", anchor=False)
    rows = [
        {
            "method": cell.method, "hook point": cell.hook, "latent": cell.latent, "strength": cell.strength,
            "decay": cell.decay, "plain": cell.verdict.plain, "strict": cell.verdict.strict,
            "score": cell.verdict.score, "repeated": cell.verdict.repetition,
        }
        for cell in sorted(result.front, key=lambda cell: -(cell.verdict.plain if cell.verdict else 0.0))
        if cell.verdict
    ]  # fmt: skip
    number = st.column_config.NumberColumn(format="%.2f")
    config = {name: number for name in ("strength", "plain", "strict", "score", "repeated")}
    st.dataframe(rows, key="front", hide_index=True, row_height=36, column_config=config)
    st.caption("Validation prompts, on which the recipe was chosen.")


def blind(run: Run, result: LanguageSteering) -> None:
    """Texts of several methods without their names, in an order that the run decides; named when asked for."""
    st.subheader("Judge them yourself", anchor=False)
    methods = [name for name in ("none", "latent", "DiffMean", "PCA", "prompting") if result.examples.get(name)]
    if not methods:
        st.caption("This run kept no texts.")
        return
    number = st.number_input("prompt", 1, len(result.examples[methods[0]]), 1, key="blind prompt", width=160)
    i = int(number) - 1
    order = random.Random(f"{run.id} {i}").sample(methods, len(methods))
    named = st.toggle("Say which is which", key="blind named")
    st.caption("prompt")
    widgets.verbatim(result.examples[methods[0]][i][0])
    for letter, name in zip(LETTERS, order, strict=False):
        st.caption(f"{letter} · {widgets.plain('unsteered' if name == 'none' else name)}" if named else letter)
        widgets.verbatim(result.examples[name][i][1])


st.title("Steer a language", anchor=False)
st.caption("The one latent that makes a model go on in another language, against every alternative.")
chosen = st.query_params.get("run", "")
if chosen:
    run = runs.get_run(chosen)
    with widgets.whole(run):
        result = run.result
        if not isinstance(result, LanguageSteering):
            raise UserError(f"{run.id} is of {run.record['key']['analysis']}; choose one of {ANALYSIS}.")
        show(run, result)
for row in finished():
    label = f"{row['model']} · {language(runs.get_run(row['run']))} · {row['created']:%-d %b, %H:%M}"
    st.page_link(
        "views/steering.py", label=widgets.plain(label), icon=":material/translate:", query_params={"run": row["run"]}
    )
search()
