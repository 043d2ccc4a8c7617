"""Each page of the app, on real run folders: what it shows, and that nothing on disk or in the address breaks it."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest

from circuits.sparse.shipped import DATA
from saes.pretrained import DATA as SAES
from tests.test_plots import attention_result, lens_result, node_scores
from workbench import activations, jobs, places, pretrained, registry, results, runs, settings
from workbench.models import LanguageModel

MAIN = Path(__file__).parents[1] / "app" / "main.py"
HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> $x$ `code` [a](http://evil.example) :red[b] **c**"
    "\n  www.evil.example me@evil.example :smile: :material/delete:"
)


@pytest.fixture(autouse=True)
def no_cache_between_tests() -> Iterator[None]:
    st.cache_data.clear()
    yield
    st.cache_data.clear()


def save(result: Any, analysis: str = "patching", task_name: str = "ioi", seed: int = 0, **changes: Any) -> str:
    """A run folder written by the code that writes every run, for a result that cost no model."""
    key = {
        "analysis": analysis,
        "analysis_version": 1,
        "parameters": {"direction": "noise"},
        "model": "f00d",
        "numerics": "float32-sdpa-cpu",
        "task": task_name,
        "task_version": 1,
        "n": 5,
        "seed": seed,
        "record_version": runs.RECORD_VERSION,
    }
    id = runs._id(key)
    encoded, arrays = results.encode(result)
    record = {
        "id": id,
        "key": key,
        "model_name": "tiny",
        "command": f"wb run {analysis} --model tiny --task {task_name} --n 5 --seed {seed}",
        "created": f"2026-09-27T12:{seed:02}:00+00:00",
        "task": {
            "n": 5,
            "drawn": 6,
            "metric": "logit_diff",
            "clean_mean": 3.25,
            "clean_std": 0.5,
            "corrupted_mean": -1.0,
            "corrupted_std": 0.25,
            "accuracy": 0.8,
            "top1": 0.6,
            "example": {
                "clean": "When Mary and John went",
                "corrupted": "When Mary and Ann went",
                "answers": [" John"],
                "wrong": [" Mary"],
            },
        },
        "summary": result.summary(),
        "cost": {"seconds": 1.25, "forward_passes": 7, "store": {"disk_bytes": 2_500_000}},
        "environment": {"versions": {"torch": "2.13.0"}, "threads": 1},
        "result": encoded,
    }
    root = settings.home() / "runs"
    root.mkdir(exist_ok=True)
    runs._save(root / id, record | changes, {"arrays": arrays})
    return id


def folder(id: str) -> Path:
    return settings.home() / "runs" / id


def edit(id: str, **changes: Any) -> None:
    path = folder(id) / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def runs_page(**query: str) -> AppTest:
    app = AppTest.from_file(str(MAIN), default_timeout=60).run()
    app.switch_page("views/runs.py")
    for name, value in query.items():
        app.query_params[name] = value
    return app.run()


def run_page(id: str | None) -> AppTest:
    app = AppTest.from_file(str(MAIN), default_timeout=60).run()
    app.switch_page("views/run.py")
    if id is not None:
        app.query_params["run"] = id
    app.run()
    assert not app.exception, app.exception[0].message
    return app


def text(app: AppTest) -> str:
    """Everything a page says."""
    kinds = (app.title, app.subheader, app.caption, app.markdown, app.text, app.code, app.info)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


def refusal(app: AppTest) -> str:
    """The one sentence of a page that has nothing else to show, and its way back."""
    assert not app.exception
    assert not app.metric
    (sentence,) = app.text
    assert [link.label for link in app.page_link] == ["All runs"]
    return str(sentence.value)


def test_streamlit_serves_no_page_of_its_own() -> None:
    """With a folder called pages, the first page after a start would be shown without main.py around it."""
    assert not (MAIN.parent / "pages").exists()


# ---- all runs ----


def test_without_runs_the_page_says_what_to_do() -> None:
    app = runs_page()
    assert not app.exception
    assert not app.dataframe
    assert [code.value for code in app.code] == ["make demo", "wb run patching --task ioi"]


def test_runs_are_listed_newest_first_with_their_figures() -> None:
    save(node_scores(), seed=1)
    save(lens_result(), "logit-lens", seed=3)
    save(attention_result(), "attention-patterns", task_name="induction", seed=2)
    app = runs_page()
    assert not app.exception
    table = app.dataframe[0].value
    assert list(table["analysis"]) == ["logit-lens", "attention-patterns", "patching"]
    newest = table.iloc[2]
    assert (newest["model"], newest["task"], newest["n"], newest["accuracy"]) == ("tiny", "ioi", 5, 80)
    best, score = node_scores().top(1)[0]
    assert newest["top heads"].startswith(f"{best} {'−' if score < 0 else '+'}{abs(score):.2f}"[:8])


def test_filters_narrow_the_list_and_can_be_addressed() -> None:
    for seed in range(3):
        save(node_scores(), seed=seed)
    save(lens_result(), "logit-lens", task_name="induction")
    app = runs_page(task="induction")
    assert list(app.dataframe[0].value["analysis"]) == ["logit-lens"]
    app.multiselect("task").set_value([]).run()
    app.multiselect("analysis").set_value(["patching"]).run()
    assert len(app.dataframe[0].value) == 3
    app.multiselect("task").set_value(["induction"]).run()
    assert not app.dataframe
    assert "No run matches" in text(app)


def test_many_runs_are_read_once() -> None:
    for seed in range(60):
        save(node_scores(), seed=seed, created=f"2026-09-27T12:{seed:02}:00+00:00")
    app = runs_page()
    shutil.rmtree(folder(runs.all_runs()[0][0].id))  # a change is seen
    app.run()
    assert len(app.dataframe[0].value) == 59


DAMAGE = {
    "truncated": lambda path: path.write_text(path.read_text()[:50]),
    "not a record": lambda path: path.write_text("[]"),
    "of the future": lambda path: path.write_text('{"key": {"record_version": 99}}'),
    "without figures": lambda path: path.write_text(json.dumps({"key": {"record_version": runs.RECORD_VERSION}})),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_a_sentence_on_both_pages(damage: str) -> None:
    good, bad = save(node_scores(), seed=1), save(node_scores(), seed=2)
    DAMAGE[damage](folder(bad) / "record.json")
    app = runs_page()
    assert not app.exception
    assert len(app.dataframe[0].value) == 1
    (sentence,) = app.text
    assert bad in sentence.value and good not in sentence.value
    assert "99" in sentence.value if damage == "of the future" else "damaged" in sentence.value
    assert bad in refusal(run_page(bad))


def test_only_damaged_runs_are_not_an_empty_page() -> None:
    id = save(node_scores())
    (folder(id) / "record.json").write_text("")
    app = runs_page()
    assert "damaged" in app.text[0].value
    assert not app.exception


def test_an_interrupted_write_is_not_a_run() -> None:
    save(node_scores())
    shutil.copytree(next((settings.home() / "runs").iterdir()), settings.home() / "runs" / ".writing-abc")
    app = runs_page()
    assert len(app.dataframe[0].value) == 1
    assert not app.text


# ---- one run ----


def test_a_run_shows_its_figures_its_definition_and_its_command() -> None:
    scores = node_scores()
    app = run_page(save(scores))
    assert app.title[0].value == "patching"
    figures = {metric.label.replace("\\", ""): metric.value for metric in app.metric}
    assert figures == {
        "accuracy": "80%",
        "top-1": "60%",
        "logit_diff, clean": "3.25 ± 0.50",
        "logit_diff, corrupted": "−1.00 ± 0.25",
        "seconds": "1.2",
        "forward passes": "7",
    }
    assert "loss of the metric" in text(app)
    shown = [code.value for code in app.code]
    assert shown[:2] == ["When Mary and John went", "When Mary and Ann went"]
    assert "wb run patching --model tiny --task ioi --n 5 --seed 0" in shown
    assert len(app.get("plotly_chart")) == 1
    heads, mlps = app.table[0].value, app.table[1].value
    assert list(heads["node"]) == [name for name, _ in scores.top(10)]
    assert list(heads.columns) == ["node", "score", "s.e."]
    assert set(mlps["node"]) == set(scores.mlps())


def test_scores_without_prompts_have_no_error_column() -> None:
    app = run_page(save(node_scores(prompts=None, mlps=False)))
    assert list(app.table[0].value.columns) == ["node", "score"]
    assert [header.value for header in app.subheader if header.value == "MLPs"] == []


def test_the_lens_and_attention_have_their_own_figures() -> None:
    lens = run_page(save(lens_result(), "logit-lens"))
    assert len(lens.get("plotly_chart")) == 2
    assert "unembedding" in text(lens)
    attention = run_page(save(attention_result(), "attention-patterns"))
    assert len(attention.get("plotly_chart")) == 2
    attention.selectbox("head").set_value("a2.h3").run()
    assert not attention.exception


@pytest.mark.parametrize("analysis", registry.analyses())
def test_every_analysis_can_be_shown(analysis: str) -> None:
    """Whatever the result's class, the page never breaks: it draws it or says why not."""
    run_page(save(node_scores(), analysis))


def test_provenance_names_what_decides_the_number() -> None:
    app = run_page(save(node_scores()))
    cells = {value.replace("\\", "") for table in app.table for value in table.value.astype(str).to_numpy().ravel()}
    assert {"numerics", "float32-sdpa-cpu", "versions torch", "2.13.0", "store disk_bytes", "2.5 MB"} <= cells


@pytest.mark.parametrize("id", ["../../x", "<script>alert(1)</script>", "no-such-run", "\x00", "runs/..", "%2e%2e"])
def test_an_unknown_run_is_one_sentence_and_a_way_back(id: str) -> None:
    save(node_scores())
    sentence = refusal(run_page(id))
    assert sentence.startswith("No run is called")
    assert len(sentence) < 1000


def test_a_name_longer_than_names_can_be_is_a_sentence() -> None:
    assert len(refusal(run_page("x" * 10_000))) < 1000


def test_no_run_chosen_is_a_sentence() -> None:
    assert refusal(run_page(None)) == "No run is chosen; pick one from the list of all runs."


def test_damaged_arrays_are_a_sentence() -> None:
    id = save(node_scores())
    (folder(id) / "arrays.safetensors").write_bytes(b"not tensors")
    assert "damaged" in refusal(run_page(id))


@pytest.mark.parametrize(
    "changes",
    [
        {"task": None},
        {"cost": {}},
        {"result": 3},
        {"result": {"nodes": ["a0.h0"]}},
        {"created": "yesterday"},
        {"summary": []},
    ],
)
def test_a_record_changed_by_hand_never_breaks_a_page(changes: dict[str, Any]) -> None:
    id = save(node_scores())
    edit(id, **changes)
    app = run_page(id)
    assert "damaged" in text(app)
    assert not runs_page().exception


def test_an_analysis_that_is_no_longer_installed_is_a_sentence() -> None:
    id = save(node_scores())
    edit(id, key=json.loads((folder(id) / "record.json").read_text())["key"] | {"analysis": "gone"})
    sentence = refusal(run_page(id))
    assert "'gone'" in sentence and "damaged" not in sentence


def test_text_from_a_run_is_never_markup() -> None:
    example = {"clean": HOSTILE, "corrupted": HOSTILE, "answers": [HOSTILE, "```"], "wrong": ["`"]}
    task = {"n": 1, "metric": HOSTILE, "accuracy": 1.0, "top1": 1.0, "example": example}
    task |= {f"{side}_{part}": 0.0 for side in ("clean", "corrupted") for part in ("mean", "std")}
    scores = node_scores()
    spoilt = type(scores)(scores.nodes, scores.scores, HOSTILE, HOSTILE, headline={HOSTILE: HOSTILE})
    id = save(spoilt, model_name=HOSTILE, task=task, environment={HOSTILE: HOSTILE}, command=HOSTILE)
    app = run_page(id)
    assert app.code[0].value == HOSTILE and app.code[0].language in ("", None, "plaintext")
    for element in (*app.markdown, *app.caption, *app.title):
        assert not getattr(element.proto, "allow_html", False)
        outside_code = element.value.split("right: ")[0]
        assert "<script>" not in outside_code  # every sign of markup is escaped: \<script\>
    assert not runs_page().exception


def test_an_unwritable_home_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "file" / "home"))
    app = runs_page()
    assert not app.exception
    assert "WORKBENCH_HOME" in app.text[0].value


def test_opening_a_run_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.models.LanguageModel.load", lambda *_, **__: pytest.fail("a model was loaded"))
    before = torch.is_grad_enabled()
    run_page(save(node_scores()))
    assert torch.is_grad_enabled() == before


# ---- starting, and jobs ----


def page(view: str, **query: str) -> AppTest:
    app = AppTest.from_file(str(MAIN), default_timeout=60).run()
    app.switch_page(f"views/{view}.py")
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception, app.exception[0].message
    return app


@pytest.mark.parametrize("analysis", registry.analyses())
def test_every_analysis_has_a_form_that_asks_for_its_own_defaults(analysis: str) -> None:
    """What the form would run, untouched, is what the command line runs with nothing given."""
    app, entry = page("start", form=analysis), registry.get_analysis(analysis)
    (command,) = [code.value for code in app.code]
    words = dict(word[2:].split("=", 1) for word in command.split()[3:])
    on = {"model": entry.model, "task": entry.task, "n": entry.task and str(entry.n), "seed": "0"}
    assert words == {name: value for name, value in on.items() if value is not None}
    fields = {one.label: one for kind in (app.text_input, app.text_area, app.selectbox, app.toggle) for one in kind}
    for name, parameter in entry.parameters.items():
        assert bool(fields[name].help) == bool(parameter.help)


def test_a_form_says_what_is_wrong_before_anything_starts() -> None:
    app = page("start", form="sae-codes")
    app.text_input("sae-codes steps").set_value("many").run()
    assert "Steps='many' is not int" in app.text[0].value and not app.button
    app.text_input("sae-codes steps").set_value("7").run()
    assert not app.text and app.code[0].value.endswith("--steps=7") and [one.label for one in app.button] == ["Start"]
    app = page("start", form="feature-attribution")
    for path in ("/etc", "./models", "~/x", "../../x", "sae:./x", "neurons,sae:/x", "neurons, /x"):
        app.text_input("feature-attribution basis").set_value(path).run()
        assert "is a path" in app.text[0].value and not app.button
    assert jobs.jobs() == ([], [])


def test_a_form_is_its_address() -> None:
    app = page("start", form="patching")
    assert set(app.query_params) <= {"form"}
    app.selectbox("patching direction").set_value("denoise").run()
    app.number_input("patching n").set_value(7).run()
    app.toggle("patching mlps").set_value(False).run()
    address = {name: value for name, value in app.query_params.items()}
    (command,) = [code.value for code in app.code]
    assert "--direction=denoise" in command and "--n=7" in command and "--mlps=false" in command
    again = page("start", **{name: value[0] if isinstance(value, list) else value for name, value in address.items()})
    assert [code.value for code in again.code] == [command]
    again.selectbox("form").set_value("eap").run()  # whose fields are its own
    assert "--n=7" not in again.code[0].value and again.code[0].value.startswith("wb run eap ")
    model = page("start", form="eap", model="sparse-train-0a1b2c3d4e5f")
    assert "--model=sparse-train-0a1b2c3d4e5f" in model.code[0].value
    wrong = page("start", form="patching", n="-3", seed="x", direction=HOSTILE, mlps="7", task=HOSTILE, more="1")
    assert wrong.code[0].value == page("start", form="patching").code[0].value


def test_what_was_computed_is_opened() -> None:
    """Of the runs that come with the package: nothing is computed here."""
    places.ship(DATA / "runs")
    app = page("start", form="bridge-dose")
    assert [one.label for one in app.button] == ["Open the run"]
    app.button[0].click().run()
    id = app.query_params["run"]
    assert runs.get_run(id).record["key"]["analysis"] == "bridge-dose" and app.title[0].value == "bridge\\-dose"


def test_a_job_is_started_watched_cancelled_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    app = page("start", form="sparse-train")
    for name, value in {"width": "32", "layers": "1", "seconds": "600"}.items():
        app.text_input(f"sparse-train {name}").set_value(value)
    app.selectbox("sparse-train preset").set_value("tiny").run()
    app.button[0].click().run()
    id = app.query_params["job"]
    try:
        assert jobs.get(id).words[:2] == ("run", "sparse-train")
        end = time.monotonic() + 90
        while jobs.get(id).left is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        app = page("job", job=id)
        assert {metric.label: metric.value for metric in app.metric}["state"] == "running"
        (bar,) = app.get("progress")
        assert bar.proto.text.startswith("sparse\\-train · ") and bar.proto.text.endswith("left")
        assert list(page("jobs").dataframe[0].value["state"]) == ["running"]
        (button,) = app.button
        assert button.label == "Cancel"
        button.click().run()
        assert jobs.get(id).state == "cancelled" and [one.label for one in app.button] == ["Go on"]
        app.button[0].click().run()
        assert jobs.get(id).state in ("waiting", "running")
    finally:
        jobs.cancel(id)


def test_without_jobs_the_page_says_what_to_do_and_an_unknown_job_is_a_sentence() -> None:
    assert [code.value for code in page("jobs").code] == ["wb job start run patching --task ioi"]
    for id in ("../../x", "<script>", "nothing", "x" * 10_000):
        (sentence,) = page("job", job=id).text
        assert sentence.value.startswith("No job is called") and len(sentence.value) < 1000
    assert page("job").text[0].value.startswith("No job is chosen")


def test_curves_of_a_job_are_drawn_and_its_words_are_never_markup() -> None:
    folder = settings.home() / "jobs" / "20261126-000000-x-0000"
    folder.mkdir(parents=True)
    given = {"words": ["run", HOSTILE], "cwd": "/", "created": "2026-11-26T00:00:00+00:00"}
    (folder / "job.json").write_text(json.dumps(given))
    notes = [{"event": "note", "of": HOSTILE, "numbers": {"step": i, "loss": 1 / i, "bad": math.nan}} for i in (1, 2)]
    lines = [{"event": "spawned", "at": 0.0, "pid": 1}, {"event": "started", "at": 0.0}, *notes]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "log.txt").write_text(f"wb: {HOSTILE}\n")
    app = page("job", job=folder.name)
    assert len(app.get("plotly_chart")) == 1 and {one.label: one.value for one in app.metric}["state"] == "killed"
    for element in (*app.markdown, *app.caption, *app.title, *app.subheader):
        assert not getattr(element.proto, "allow_html", False) and "<script>" not in element.value
    assert list(page("jobs").dataframe[0].value["state"]) == ["killed"]


# ---- tasks, models, store ----


@pytest.mark.parametrize("name", registry.tasks())
def test_a_task_shows_prompts_as_they_are_drawn(name: str) -> None:
    app = page("tasks", task=name, seed="3")
    rng = random.Random(3)
    first = registry.get_task(name).draw(rng)
    ends = str.maketrans({"\n": "↵", " ": "␣"})
    for code, text in zip(app.code, (first.clean, first.corrupted), strict=False):
        inner = text.strip()
        assert code.value == text[: text.index(inner)].translate(ends) + inner + text.rpartition(inner)[2].translate(
            ends
        )
    assert len(app.code) == 10


def test_models_and_saes_are_listed() -> None:
    app = page("models")
    names = list(app.dataframe[0].value["name"])
    assert {"smollm2-135m", "gemma-3-270m", "pycode-small"} <= set(names)
    assert not any(app.dataframe[0].value["here"][: len(pretrained.EMBEDDED)])
    assert "No SAEs yet" in text(app)
    places.ship(SAES / "runs")
    one = next((SAES / "runs").glob("*/files/blocks.20.*")).parent
    shutil.copytree(one, settings.home() / "runs" / "train-sae-f00d" / "files")  # of no run that could be read
    shown = page("models").dataframe[1].value.set_index("name")
    assert list(shown.index) == [
        *(f"gemma-3-270m-{which}" for which in ("narrow-0", "narrow-1", "narrow-2", 9, 11, 13)),
        "smollm2-135m", "train-sae-f00d",
    ]  # fmt: skip
    assert shown.loc["gemma-3-270m-11", "FVU"] == 0.19 and shown.loc["gemma-3-270m-11", "L0"] == 32
    assert shown.loc["train-sae-f00d", ["L0", "FVU"]].isna().all()


def test_the_store_is_shown_checked_and_emptied(tiny: LanguageModel) -> None:
    assert page("store").code[0].value == "wb run patching --task ioi"
    store = activations.shared()
    tokens = [tiny.tokenize(text) for text in ("one two", "three")]
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    store.get(tiny, tokens, hooks)
    app = page("store")
    assert list(app.dataframe[0].value["activations"]) == [2, 2]
    assert app.metric[0].value == "0.00 GB" and app.metric[0].help.startswith("4 activations")
    assert [button.disabled for button in app.button] == [False, True]
    app.selectbox("evict hook").set_value(hooks[0])
    app.checkbox("evict sure").check().run()
    app.button[1].click().run()
    assert not app.exception and "Freed" in app.success[0].value
    assert [one.hook for one in store.series()] == [hooks[1]]
    app.button[0].click().run()
    id = app.query_params["job"]
    end = time.monotonic() + 90
    while jobs.get(id).state not in jobs.ENDED:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert jobs.get(id).state == "done"
    assert json.loads((jobs.get(id).folder / "out.json").read_text())["damaged"] == []
