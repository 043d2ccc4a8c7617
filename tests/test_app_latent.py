"""The page of a latent, on an SAE of a model that comes with the package."""

from __future__ import annotations

import json
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from saes.latents import Latents
from tests.test_app import HOSTILE, MAIN, edit, folder, save, text
from tests.test_plots import node_scores
from tests.test_try_on import HOOK, SMALL, read
from workbench import canvas, jobs, runs
from workbench.runs import Run

MODEL = "pycode-small-dense"
TEXT: dict[str, Any] = {"text": "parallel", "tokens": 8000, "length": 16}  # what the page asks of the sentences


def page(**query: str) -> AppTest:
    app = AppTest.from_file(str(MAIN), default_timeout=60).run()
    app.switch_page("views/latent.py")
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception, app.exception[0].message
    return app


def html(app: AppTest) -> str:
    return "\n".join(element.proto.body for element in app.get("html"))


def labels(app: AppTest) -> list[str]:
    return [button.label for button in app.button]


@pytest.fixture
def sae() -> str:
    return runs.run("train-sae", model=MODEL, **SMALL).id


def look(sae: str, which: str) -> Run:
    return runs.run("latents", model=MODEL, sae=sae, hook=HOOK, which=which, **TEXT)


def test_without_an_sae_the_page_says_how_to_have_one() -> None:
    assert "wb run train-sae" in text(page())


def test_a_latent_that_nobody_looked_at_and_then_what_was_seen(sae: str) -> None:
    app = page(sae=sae, hook=HOOK, latent="9")
    assert labels(app) == ["Look at it"] and not app.metric
    found = look(sae, "9,3")
    result: Latents = found.result
    app = page(sae=sae, hook=HOOK, latent="9")
    one = result.latents[0]
    assert not app.button
    assert {metric.label: metric.value for metric in app.metric} == {
        "density": f"{one.density:.3%}", "mean": canvas.number(one.mean, 2, signed=False),
        "largest": canvas.number(one.largest, 2, signed=False),
    }  # fmt: skip
    shown = read(html(app))
    paragraphs = [tag for tag, _ in shown.tags if tag == "p"]
    assert len(paragraphs) == len(one.top) + sum(map(len, one.buckets))
    # Of a sign of several tokens the last has it, and the others are dots.
    first = "".join(token or "·" for token in one.top[0].tokens).replace("\n", "↵")
    assert first in "".join(shown.texts)
    assert [len(table.value) for table in app.table] == [10, 10]
    links = {link.label: link for link in app.page_link}
    assert f"unit={one.mean:.4g}" in links["Steer with this"].proto.query_string
    other, _ = one.neighbours[0]
    assert any(label.startswith(f"{other} · ") for label in links)
    assert page(run=found.id).metric[0].value == app.metric[0].value
    assert found.id not in links  # what is shown is no further use


def test_what_is_asked_is_what_would_be_found(sae: str) -> None:
    """The button of the page, and the run that it makes."""
    app = page(sae=sae, hook=HOOK, latent="9")
    app.selectbox("latent corpus").set_value("parallel").run()
    try:
        app.button[0].click().run()
        (job,) = jobs.jobs()[0]
        words = dict(word[2:].split("=", 1) for word in job.words[2:])
    finally:
        for job in jobs.jobs()[0]:
            if job.state not in jobs.ENDED:
                jobs.cancel(job.id)
    assert job.words[:2] == ("run", "latents")
    assert runs.run("latents", **words).id == look(sae, "9").id
    assert page(sae=sae, hook=HOOK, latent="9").metric


def test_the_latents_of_a_run_one_by_one(sae: str) -> None:
    found = look(sae, "9,3")
    app = page(run=found.id)
    assert app.number_input[0].value == 9 and app.query_params["sae"] == sae
    (picker,) = [one for one in app.selectbox if one.label == "of this run"]
    picker.set_value("3").run()
    assert app.number_input[0].value == 3 and app.query_params["latent"] == "3" and app.query_params["run"] == found.id
    assert app.metric[0].value == f"{found.result.latents[1].density:.3%}"
    app.number_input[0].set_value(5).run()
    assert "run" not in app.query_params and labels(app) == ["Look at it"]
    again = page(run=found.id, latent="3")
    assert again.number_input[0].value == 3


def test_ones_own_text_is_read_and_shown(sae: str) -> None:
    look(sae, "9")
    app = page(sae=sae, hook=HOOK, latent="9")
    app.text_area[0].set_value("def f(x):\n    return x").run()
    assert labels(app) == ["Read it"]
    given = {"sae": sae, "hook": HOOK, "which": "9", "text": "def f(x):\n    return x"}
    found = runs.run("try-on", model=MODEL, **given).result
    app.run()
    assert not app.exception and not app.button
    assert "".join(found.tokens).replace("\n", "↵") in "".join(read(html(app)).texts)
    assert {str(latent) for latent in found.top} <= {link.label for link in app.page_link}


def test_a_text_that_no_model_reads_is_a_sentence(sae: str) -> None:
    app = page(sae=sae, hook=HOOK, latent="9")
    app.text_area[0].set_value("x" * 200_000).run()
    assert not app.exception and labels(app) == ["Look at it"] and "characters" in text(app)


@pytest.mark.parametrize("given", ["/etc/passwd", "a, ~", "." + "x" * 300, HOSTILE])
def test_a_text_is_never_looked_up_as_a_file(given: str, sae: str) -> None:
    app = page(sae=sae, hook=HOOK, latent="9")
    app.text_area[0].set_value(given).run()
    assert not app.exception and labels(app) == ["Look at it", "Read it"]


def test_runs_that_speak_of_it_are_linked(sae: str) -> None:
    on: dict[str, Any] = {"model": MODEL, "sae": sae, "hook": HOOK, "unit": 1.0, "steps": 1, "strengths": "1"}
    steered, other = runs.run("steer", latent=9, **on), runs.run("steer", latent=8, **on)
    app = page(sae=sae, latent="9")
    names = [link.label for link in app.page_link]
    assert steered.id in names and other.id not in names and "steer: steered, add" in text(app).replace("\\", "")


@pytest.mark.parametrize(
    "query",
    [
        {"sae": HOSTILE, "hook": HOSTILE, "latent": HOSTILE},
        {"latent": "-1"},
        {"latent": "9" * 400},
        {"latent": "64"},
        {"latent": "1e3"},
        {"latent": "³"},
        {"sae": "/etc", "latent": "3"},
        {"hook": "blocks.9.hook_resid_post"},
    ],
)
def test_an_address_changed_by_hand_is_taken_as_none(query: dict[str, str], sae: str) -> None:
    app = page(**({"sae": sae} | query))
    assert 0 <= app.number_input[0].value < 64 and HOSTILE not in text(app)
    assert app.query_params["sae"] == sae and app.query_params["hook"] == HOOK


@pytest.mark.parametrize("id", ["../../x", "<script>", "nothing", HOSTILE])
def test_no_such_run_is_a_sentence(id: str, sae: str) -> None:
    assert "No run is called" in text(page(run=id))


def test_a_run_of_something_else_and_a_damaged_one_are_sentences(sae: str) -> None:
    assert "looks at no latents" in text(page(run=save(node_scores())))
    found = look(sae, "9")
    edit(found.id, summary={"latents": 3})
    assert "damaged" in text(page(run=found.id))
    key = json.loads((folder(found.id) / "record.json").read_text())["key"]
    edit(found.id, summary=found.summary, key=key | {"parameters": {}})
    assert "damaged" in text(page(run=found.id))


def test_tokens_of_a_run_are_never_markup(sae: str) -> None:
    found = look(sae, "9")
    record = json.loads((folder(found.id) / "record.json").read_text())
    one = record["result"]["latents"][0]
    one["top"][0]["tokens"][0] = one["promoted"][0][0] = one["suppressed"][0][0] = HOSTILE
    edit(found.id, result=record["result"] | {"definition": HOSTILE})
    app = page(run=found.id)
    assert {tag for tag, _ in read(html(app)).tags} == {"p", "span"} and HOSTILE.replace("\n", "↵") in "".join(
        read(html(app)).texts
    )
    for element in (*app.markdown, *app.caption, *app.title, *app.subheader):
        assert not getattr(element.proto, "allow_html", False) and "<script>" not in element.value


@pytest.mark.parametrize(
    "page_of_it", ["https://www.neuronpedia.org/gpt2/5-res/9", "javascript:alert(1)", "https://evil.example"]
)
def test_a_link_leads_to_neuronpedia_and_nowhere_else(sae: str, page_of_it: str) -> None:
    found = look(sae, "3,9")
    assert not page(run=found.id, sae=sae, hook=HOOK, latent="9").get("link_button")
    record = json.loads((folder(found.id) / "record.json").read_text())
    record["result"]["pages"] = ["https://www.neuronpedia.org/gpt2/5-res/3", page_of_it]
    (folder(found.id) / "record.json").write_text(json.dumps(record))
    links = page(run=found.id, sae=sae, hook=HOOK, latent="9").get("link_button")
    assert [link.proto.url for link in links] == [page_of_it] * page_of_it.startswith("https://www.neuronpedia.org/")
