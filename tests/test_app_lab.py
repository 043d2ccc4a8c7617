"""The patching lab, on a model that comes with the package: what is typed, what is refused, what is found again."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from circuits.position_patching import draw_pair, tokenizer_of
from tests.test_app import HOSTILE, edit, folder, page, save, text
from tests.test_plots import node_scores
from tests.test_position_patching import CLEAN, FLIPPED, LOOP, SMALL
from workbench import jobs, registry, runs
from workbench.runs import Run

ADDRESS = {"model": SMALL, **LOOP}
AREAS = ("clean", "corrupted", "right", "wrong")


def shown(app: AppTest) -> dict[str, str]:
    return {name: app.text_area(f"lab {name}").value for name in AREAS}


def tokens(app: AppTest, side: int) -> list[str]:
    """A prompt of the preview, as it is marked."""
    rows = [table.value for table in app.table if "position" in table.value.columns and len(table.value) == 2]
    return [str(row.iloc[side][name]) for row in rows for name in row.columns[1:]]


def labels(app: AppTest) -> list[str]:
    return [button.label for button in app.button]


@pytest.fixture
def found() -> Run:
    return runs.run("position-patching", **ADDRESS, what="mlp", direction="noise", positions="11-20")


# ---- what is typed ----


def test_both_prompts_are_shown_token_by_token_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.models.LanguageModel.load", lambda *_, **__: pytest.fail("a model was loaded"))
    app = page("lab", **ADDRESS)
    assert shown(app) == LOOP and "21 tokens; 2 differ" in text(app)
    clean, corrupted = tokens(app, 0), tokens(app, 1)
    assert [i for i, (one, other) in enumerate(zip(clean, corrupted, strict=True)) if one != other] == [11, 19]
    assert clean[11] == ":blue-background[**≠ c**]" and corrupted[11] == ":orange-background[**≠ d**]"
    assert (clean[1], clean[9], clean[10]) == ("with", "↵", "␣␣␣")
    assert labels(app) == ["Take this pair", "Patch"] and not app.metric


def test_a_pair_is_patched_as_a_job_and_its_map_appears() -> None:
    app = page("lab", **ADDRESS)
    app.button[1].click().run()
    (job,) = jobs.jobs()[0]
    try:
        end = time.monotonic() + 90
        while jobs.get(job.id).state not in jobs.ENDED:
            assert time.monotonic() < end
            time.sleep(0.2)
    finally:
        if jobs.get(job.id).state not in jobs.ENDED:
            jobs.cancel(job.id)
    assert jobs.get(job.id).state == "done", jobs.get(job.id).why
    app = page("lab", **ADDRESS)
    (run,) = runs.all_runs()[0]
    assert app.query_params["run"] == run.id and "clean" not in app.query_params
    assert len(tokens(app, 0)) == 21 and len(app.get("plotly_chart")) == 1 and labels(app) == ["Take this pair"]
    values = {metric.label.replace("\\", ""): metric.value for metric in app.metric}
    assert values["logit_diff, clean prompt"] == f"{run.result.clean:.3f}".replace("-", "−")
    best = run.result.strongest(1)[0]
    strongest = app.table[-1].value.iloc[0]
    assert (strongest["layer"], strongest["position"]) == (str(best.layer), str(best.at))
    assert [link.label for link in app.get("page_link")] == ["The run"]


def test_a_run_fills_the_whole_form_again(found: Run) -> None:
    app = page("lab", run=found.id)
    assert shown(app) == LOOP and app.selectbox("lab model").value == SMALL
    assert [app.selectbox(f"lab {name}").value for name in ("what", "direction", "metric")] == [
        "mlp", "noise", "logit_diff",
    ]  # fmt: skip
    assert app.text_input("lab positions").value == "11-20" and app.toggle("lab space").value is True
    assert app.query_params["run"] == found.id and app.metric


def test_what_is_changed_leaves_the_run_and_comes_back_to_it(found: Run) -> None:
    app = page("lab", run=found.id)
    app.text_area("lab right").set_value("c").run()
    assert not app.exception and "run" not in app.query_params and not app.metric
    assert app.query_params["right"] == "c" and app.query_params["what"] == "mlp"
    app.text_area("lab right").set_value("range").run()
    assert app.query_params["run"] == found.id and "right" not in app.query_params and app.metric


def test_another_run_in_the_address_fills_the_form_again(found: Run) -> None:
    other = runs.run("position-patching", **ADDRESS)
    app = page("lab", run=found.id)
    app.query_params["run"] = other.id
    app.run()
    assert app.selectbox("lab what").value == "resid_pre" and app.query_params["run"] == other.id


def test_a_run_is_shown_whatever_it_was_computed_with(found: Run) -> None:
    """Its form would not find it: another dtype, or a model in a folder, which the app opens none of."""
    words = {"clean": "x = 1\nfor a", "corrupted": "x = 1\nwhile a", "right": " in", "wrong": ":", "space": False}
    half = runs.run("position-patching", model=SMALL, **words, dtype="bfloat16")
    assert page("lab", run=half.id).query_params["run"] == half.id
    edit(found.id, model_name="./models/mine")
    app = page("lab", run=found.id)
    assert app.metric and labels(app) == ["Take this pair"]
    app.text_input("lab positions").set_value("3").run()
    assert "is a path, and the app opens none" in text(app) and not app.metric and labels(app) == ["Take this pair"]


def test_long_prompts_are_kept_out_of_the_address() -> None:
    head = "".join(f"a{i} = b\n" for i in range(30))
    long = {side: head + LOOP[side] for side in ("clean", "corrupted")}
    app = page("lab", **ADDRESS)
    for side, value in long.items():
        app.text_area(f"lab {side}").set_value(value)
    app.run()
    assert app.query_params["clean"] == long["clean"] and "rows are left out" in text(app)
    for side in long:
        app.text_area(f"lab {side}").set_value("#" * 1500 + long[side])
    app.run()
    assert not app.exception and "clean" not in app.query_params and "at most 256" in text(app)


# ---- pairs of tasks ----


@pytest.mark.parametrize(("task", "model"), [("with_as", SMALL), ("ioi", "smollm2-135m")])
def test_a_pair_is_taken_from_a_task(task: str, model: str) -> None:
    app = page("lab", model=model)
    app.selectbox("lab task").set_value(task)
    app.number_input("lab seed").set_value(4)
    app.button[0].click().run()
    pair = draw_pair(registry.get_task(task), 4, tokenizer_of(model))
    assert not app.exception and tuple(shown(app).values()) == pair[:4] and app.toggle("lab space").value == pair.space
    if model == SMALL:
        assert labels(app) == ["Take this pair", "Patch"] and app.query_params["clean"] == pair.clean
    else:  # its weights are not here
        assert "not on this machine yet" in text(app) and labels(app) == ["Take this pair", "Patch"]


def test_a_task_of_other_words_says_why_and_changes_nothing() -> None:
    app = page("lab", **ADDRESS)
    app.text_area("lab right").set_value("reversed").run()
    app.button[0].click().run()  # ioi, in a tokenizer of code
    assert not app.exception and shown(app) == {**LOOP, "right": "reversed"}
    assert f"No pair of ioi can be patched under {SMALL}'s tokenizer" in text(app)
    assert "answers must be one token" in text(app)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clean": ""}, "The clean prompt is empty"),
        ({"corrupted": LOOP["corrupted"] + " d"}, "has 21 tokens and the corrupted one 22"),
        ({"corrupted": LOOP["clean"]}, "are the same tokens"),
        ({"right": "reversed"}, "answers must be one token"),
        ({"right": "b"}, "are both ' b'"),
        ({"clean": "x" * 10_000_000}, "at most 20,000 are read"),
        ({"clean": HOSTILE, "corrupted": HOSTILE + " b"}, "one"),
    ],
)
def test_a_pair_that_cannot_be_patched_is_one_sentence_and_starts_nothing(changes: dict[str, str], says: str) -> None:
    app = page("lab", **ADDRESS)
    for name, value in changes.items():
        app.text_area(f"lab {name}").set_value(value)
    app.run()
    assert not app.exception
    (sentence,) = app.text
    assert says in sentence.value and len(sentence.value) < 700 and labels(app) == ["Take this pair"]


@pytest.mark.parametrize("positions", ["x", "99", "3-1", HOSTILE])
def test_positions_that_are_none_are_a_sentence(positions: str) -> None:
    app = page("lab", **ADDRESS)
    app.text_input("lab positions").set_value(positions).run()
    assert "ositions" in app.text[0].value and labels(app) == ["Take this pair"] and not app.exception


@pytest.mark.parametrize("model", ["/etc", "./models", "~", "no-such-model-at-all", HOSTILE])
def test_a_model_of_the_address_is_never_opened_and_never_breaks_the_page(model: str) -> None:
    app = page("lab", **{**ADDRESS, "model": model})
    says = "is a path, and the app opens none" if model.startswith(("/", ".", "~")) else ""
    assert says in text(app) and app.selectbox("lab model").value == model


@pytest.mark.parametrize("value", ["x", "-1", "é" * 3000, HOSTILE])
@pytest.mark.parametrize("name", ["what", "direction", "metric", "space", "run", "clean", "task"])
def test_an_address_changed_by_hand_is_taken_as_none(name: str, value: str) -> None:
    app = page("lab", **{**ADDRESS, name: value})
    assert app.selectbox("lab what").value == "resid_pre" and app.selectbox("lab direction").value == "denoise"
    assert app.query_params.get("run") is None
    if name == "clean":
        default = registry.get_analysis("position-patching").parameters["clean"].default
        assert app.text_area("lab clean").value == (default if len(value) > 2000 else value)


def test_a_run_of_another_analysis_or_one_that_is_gone_is_taken_as_none(found: Run) -> None:
    other = save(node_scores())
    for id in (other, "../../x", "no-such-run"):
        app = page("lab", run=id)
        assert shown(app)["clean"] == CLEAN and shown(app)["corrupted"] == FLIPPED and "run" not in app.query_params


def test_a_damaged_run_never_breaks_the_page(found: Run) -> None:
    record = json.loads((folder(found.id) / "record.json").read_text())
    edit(found.id, result={"effect": 3})
    assert "damaged" in text(page("lab", run=found.id))
    edit(found.id, key={**record["key"], "parameters": 3})
    assert shown(page("lab", run=found.id))["clean"] == CLEAN


def test_tokens_are_never_markup() -> None:
    given: dict[str, Any] = {side: f"{HOSTILE} {word}" for side, word in (("clean", "if"), ("corrupted", "in"))}
    app = page("lab", model=SMALL, right="b", wrong="c", **given)
    cells = "".join(tokens(app, 0) + tokens(app, 1))
    if not cells:  # refused, in plain text
        assert app.text
    assert "<script>" not in cells and "](http" not in cells
    for element in (*app.markdown, *app.caption):
        assert not getattr(element.proto, "allow_html", False) and "<script>" not in element.value
