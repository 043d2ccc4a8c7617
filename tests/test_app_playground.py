"""The playground, on an SAE of a model that comes with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from tests.test_app import HOSTILE, MAIN, edit, folder, save, text
from tests.test_app_latent import MODEL, html, labels
from tests.test_plots import node_scores
from tests.test_try_on import HOOK, SMALL, read
from workbench import jobs, runs
from workbench.runs import Run

ON: dict[str, Any] = {
    "model": MODEL, "hook": HOOK, "latent": 9, "prompt": "def f(x):\n    ", "unit": 2.0, "strengths": "0,1,-3",
    "steps": 6, "samples": 2, "kind": "clamp", "scope": "generated", "decay": 0.9, "temperature": 0.7, "seed": 4,
}  # fmt: skip


def page(**query: str) -> AppTest:
    app = AppTest.from_file(str(MAIN), default_timeout=60).run()
    app.switch_page("views/playground.py")
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception, app.exception[0].message
    return app


def field(app: AppTest, name: str) -> Any:
    every = [*app.selectbox, *app.number_input, *app.text_input, *app.text_area]
    (found,) = [one for one in every if one.key == f"playground {name}"]
    return found


@pytest.fixture
def sae() -> str:
    return runs.run("train-sae", model=MODEL, **SMALL).id


@pytest.fixture
def written(sae: str) -> Run:
    return runs.run("steer", sae=sae, **ON)


def test_without_an_sae_the_page_says_how_to_have_one() -> None:
    assert "wb run train-sae" in text(page())


def test_a_run_is_restored_from_its_address(written: Run, sae: str) -> None:
    app = page(run=written.id)
    assert not app.button
    for name, value in (ON | {"sae": sae}).items():
        if name != "model":
            assert field(app, name).value == value, name
    assert app.query_params["run"] == written.id
    rows = {row.strength: row for row in written.result.rows if row.sample == 0}
    shown = "".join(read(html(app)).texts)
    for strength in (None, 1.0):  # the largest is shown first
        for row in written.result.at(strength):
            assert "".join(row.tokens).replace("\n", "↵") in shown
    said = text(app).replace("\\", "")
    assert f"applied at {rows[1.0].applied}/{rows[1.0].due} positions" in said and "Strength 1" in said
    app.select_slider[0].set_value(-3.0).run()
    assert app.query_params["at"] == "-3" and "Strength −3" in text(app).replace("-", "−")
    assert "".join(rows[-3.0].tokens).replace("\n", "↵") in "".join(read(html(app)).texts)
    again = page(run=written.id, at="-3")
    assert again.select_slider[0].value == -3.0


def test_what_is_changed_is_asked_for_and_the_button_starts_it(written: Run, sae: str) -> None:
    app = page(run=written.id)
    field(app, "seed").set_value(5).run()
    assert not app.exception and labels(app) == ["Write"] and "run" not in app.query_params
    assert app.query_params["seed"] == "5" and app.query_params["kind"] == "clamp"
    try:
        app.button[0].click().run()
        (job,) = jobs.jobs()[0]
    finally:
        for job in jobs.jobs()[0]:
            if job.state not in jobs.ENDED:
                jobs.cancel(job.id)
    words = dict(word[2:].split("=", 1) for word in job.words[2:])
    asked = runs.run("steer", **words | {"seed": int(words["seed"])})
    assert asked.id == runs.run("steer", sae=sae, **ON | {"seed": 5}).id
    app = page(**dict(app.query_params))  # by its settings alone
    assert app.query_params["run"] == asked.id and not app.button
    field(app, "seed").set_value(4).run()
    assert app.query_params["run"] == written.id


def test_a_long_prompt_is_found_again_by_its_run(sae: str) -> None:
    app = page(sae=sae, latent="9")
    field(app, "prompt").set_value("x = 1\n" * 100).run()
    assert labels(app) == ["Write"] and "prompt" not in app.query_params
    app.run()
    assert field(app, "prompt").value == "x = 1\n" * 100


def test_a_latent_comes_with_the_address_and_leads_back(sae: str) -> None:
    app = page(sae=sae, hook=HOOK, latent="9", unit="2.5")
    assert field(app, "latent").value == 9 and field(app, "unit").value == 2.5
    (link,) = [link for link in app.page_link if link.label == "What this latent responds to"]
    assert "latent=9" in link.proto.query_string and f"sae={sae}" in link.proto.query_string


def test_ablating_has_no_strength_and_swapping_another_latent(sae: str) -> None:
    found = runs.run("steer", sae=sae, **ON | {"kind": "ablate", "strengths": "1"})
    app = page(run=found.id)
    assert not app.select_slider and not app.button
    field(app, "kind").set_value("swap").run()
    assert field(app, "other").value == 0 and labels(app) == ["Write"] and app.query_params["other"] == "0"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt", "", "There is no prompt"),
        ("prompt", "x" * 200_000, "200,000 characters"),
        ("strengths", HOSTILE, "are no strengths"),
        ("strengths", ",".join(map(str, range(40))), "at most 16"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_starts(name: str, value: str, message: str, sae: str) -> None:
    app = page(sae=sae, latent="9")
    field(app, name).set_value(value).run()
    assert not app.exception and not app.button and message in text(app)


@pytest.mark.parametrize(
    "query",
    [
        {name: HOSTILE for name in ("sae", "hook", "latent", "unit", "kind", "scope", "decay", "steps", "seed", "at")},
        {"latent": "9" * 400, "seed": "9" * 400, "steps": "9" * 30, "unit": "nan", "temperature": "inf", "decay": "2"},
        {"latent": "64", "other": "64", "kind": "swap"},
        {"latent": "-1", "seed": "-1", "samples": "-1", "steps": "0", "decay": "-1", "temperature": "-1"},
        {"sae": "/etc", "hook": "blocks.9.hook_resid_post", "strengths": "0"},
    ],
)
def test_an_address_changed_by_hand_is_taken_as_none(query: dict[str, str], sae: str) -> None:
    app = page(**({"sae": sae} | query))
    assert 0 <= field(app, "latent").value < 64 and field(app, "steps").value == 40 and HOSTILE not in text(app)
    assert labels(app) == ["Write"]


@pytest.mark.parametrize("id", ["../../x", "<script>", HOSTILE])
def test_no_such_run_is_a_sentence(id: str, sae: str) -> None:
    assert "No run is called" in text(page(run=id))


def test_a_run_of_something_else_and_a_damaged_one_are_sentences(written: Run) -> None:
    assert "writes no texts to play with" in text(page(run=save(node_scores())))
    record = json.loads((folder(written.id) / "record.json").read_text())
    edit(written.id, key=record["key"] | {"parameters": 3})
    assert "damaged" in text(page(run=written.id))
    edit(written.id, key=record["key"], result=record["result"] | {"rows": 3})
    assert "damaged" in text(page(run=written.id))


def test_what_a_model_wrote_is_never_markup(written: Run) -> None:
    record = json.loads((folder(written.id) / "record.json").read_text())
    for row in record["result"]["rows"]:
        row["tokens"][0], row["text"], row["language"] = HOSTILE, HOSTILE, HOSTILE
    edit(written.id, result=record["result"] | {"definition": HOSTILE, "prompt": HOSTILE})
    app = page(run=written.id)
    assert {tag for tag, _ in read(html(app)).tags} == {"p", "span"}
    for element in (*app.markdown, *app.caption, *app.title, *app.subheader):
        assert not getattr(element.proto, "allow_html", False) and "<script>" not in element.value
    for table in app.table:
        assert not table.value.astype(str).map(lambda cell: "<script>" in cell).to_numpy().any()


def test_an_sae_that_was_deleted_is_a_sentence(written: Run, sae: str) -> None:
    Path(folder(sae)).rename(folder(sae).with_name("gone"))
    runs.run("train-sae", model=MODEL, **SMALL | {"latents": 32})
    assert "has no name here" in text(page(run=written.id))
