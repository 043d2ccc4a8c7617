"""Extraction: circuits against their parts done by hand, and a grid of them that is killed, goes on, and computes
nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from circuits.attribution import eap
from circuits.compare import halves
from circuits.evaluate import faithfulness, smallest
from circuits.extract import extract
from circuits.graph import Circuit, Graph, top_edges
from circuits.patching import patching
from tests.conftest import Wb
from tests.test_attribution import draw
from tests.test_runs import equal
from workbench import registry, runs
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel

ROOT = Path(__file__).parents[1]


# ---- one circuit ----


def test_edges_are_found_on_one_half_and_judged_on_the_other(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=8)
    find, judge = halves(batch)
    found = extract(tiny, batch, store, method="eap", size=40)
    expected = top_edges(eap(tiny, find, store), 40).pruned()
    assert torch.equal(found.kept, expected.kept) and 0 < len(found) <= 40
    f = faithfulness(tiny, judge, store, expected.graph, expected.kept[None])
    assert found.headline["faithfulness"] == pytest.approx(float(f.value[0]), abs=1e-4)
    assert (found.headline["size"], found.headline["level"]) == (40, "edges")
    assert (found.model, found.task, found.method) == (tiny.name, "ioi", "eap")


def test_without_a_size_it_is_the_smallest_that_is_faithful(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=8)
    find, judge = halves(batch)
    found = extract(tiny, batch, store, method="patching", at_least=0.8)
    scores = patching(tiny, find, store)
    n, f = smallest(tiny, judge, store, scores, at_least=0.8)
    best = {scores.nodes[i] for i in scores.scores.abs().topk(n).indices.tolist()}
    assert found.headline["size"] == n and torch.equal(found.kept, Graph.of(tiny.config).between(best))
    assert found.headline["faithfulness"] == pytest.approx(f, abs=1e-3) and 0.8 <= f <= 1.2


def test_a_method_is_asked_with_the_ablation_that_judges(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=6)
    found = extract(tiny, batch, store, method="eap", size=30, ablation="zero")
    assert torch.equal(found.kept, top_edges(eap(tiny, halves(batch)[0], store, ablation="zero"), 30).pruned().kept)


@pytest.mark.parametrize(
    ("n", "given", "message"),
    [
        (3, {}, "cannot be halved"),
        (4, {"size": 0}, "size=0 makes no circuit"),
        (4, {"at_least": 1.5}, "at_least=1.5 must be"),
        (4, {"method": "acdc"}, "gives a Circuit, which scores no nodes or edges"),
        (4, {"method": "patching", "size": 99}, "more than the 15 nodes that patching scores"),
        (4, {"method": "eapp"}, "did you mean 'eap'"),
    ],
)
def test_bad_requests_are_sentences(
    n: int, given: dict[str, Any], message: str, tiny: LanguageModel, store: ActivationStore
) -> None:
    with pytest.raises(UserError, match=message):
        extract(tiny, draw(tiny, n=n), store, **given)


# ---- many ----


def asked(model: str, *more: str) -> list[str]:
    words = ["extract", "--models", model, "--tasks", "ioi,induction", "--methods", "eap,patching", "--n", "4"]
    return [*words, *more, "--json"]


def test_a_grid_is_computed_once_with_each_model_loaded_once(
    wb: Wb, tiny_folder: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = LanguageModel.load
    monkeypatch.setattr(LanguageModel, "load", lambda name, **given: loaded.append(name) or load(name, **given))
    status, out, _ = wb(*asked(tiny_folder, "--size", "9"))
    first = json.loads(out)
    assert status == 0 and out.count("\n") == 1 and first["failed"] == 0 and loaded == [tiny_folder]
    rows = first["circuits"]
    combinations = [(task, method) for task in ("ioi", "induction") for method in ("eap", "patching")]
    assert [(row["task"], row["method"]) for row in rows] == combinations
    assert not any(row["hit"] for row in rows) and all(row["size"] == 9 and row["seconds"] > 0 for row in rows)
    for row in rows:
        circuit = Circuit.load(Path(row["folder"]))
        assert equal(circuit, runs.get_run(row["run"]).result) and Path(row["folder"]).parent == home / "circuits"
        assert (circuit.task, circuit.method, len(circuit)) == (row["task"], row["method"], row["n_edges"])
    again = json.loads(wb(*asked(tiny_folder, "--size", "9"))[1])
    assert loaded == [tiny_folder]  # what was found needed no weights
    assert again["circuits"] == [row | {"hit": True} for row in rows]
    text = wb(*asked(tiny_folder, "--size", "9")[:-1])[1]
    assert text.count("found") == 4 and str(home / "circuits") in text


def test_what_fails_is_a_row_and_the_others_go_on(
    wb: Wb, tiny_folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A method refuses a size, another has a defect, a model is not there: sentences, and exit status 1."""

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of all\nthings")

    chosen = registry.get_analysis("relp")
    monkeypatch.setitem(registry._analyses, "relp", replace(chosen, fn=broken))
    words = ("--models", f"{tmp_path}/no-model,{tiny_folder}", "--methods", "patching,relp,eap", "--out")
    status, out, _ = wb("extract", *words, str(tmp_path / "mine"), "--n", "4", "--size", "99", "--json")
    rows = json.loads(out)["circuits"]
    assert status == 1 and json.loads(out)["failed"] == 5 and len(rows) == 6
    assert all("has no config.json" in row["error"] for row in rows[:3])
    assert "more than the 15 nodes that patching scores" in rows[3]["error"]
    assert rows[4]["error"] == "ZeroDivisionError: of all things" and "Traceback" in caplog.text
    assert rows[5]["size"] == 99 and Circuit.load(Path(rows[5]["folder"])).method == "eap"
    status, text, _ = wb("extract", *words, str(tmp_path / "mine"), "--n", "4", "--size", "99")
    assert status == 1 and text.count("failed") == 5 and "found" in text and "ZeroDivisionError: of all things" in text


def test_a_job_file_gives_the_options_and_the_command_line_comes_first(
    wb: Wb, tiny_folder: str, tmp_path: Path
) -> None:
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"models": [tiny_folder], "methods": ["eap", "patching"], "n": 5, "size": 8}))
    rows = json.loads(wb("extract", "--job", str(job), "--size", "7", "--methods", "eap", "--json")[1])["circuits"]
    assert [(row["model"], row["task"], row["method"], row["size"]) for row in rows] == [(tiny_folder, "ioi", "eap", 7)]
    assert runs.get_run(rows[0]["run"]).record["key"]["n"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "iio"), "no task is called 'iio'; did you mean 'ioi'?"),
        (("--methods", "eap,pathcing"), "did you mean 'patching'?"),
        (("--methods", " , "), "methods is empty"),
        (("--method", "eap"), "write --methods"),
        (("--sizes", "3"), "no parameter of extract is called 'sizes'; did you mean 'size'?"),
        (("--size", "many"), "size='many' is not int or none"),
        (("--n", "many"), "n='many' is not int"),
        (("--n", "0"), "n=0 prompts cannot be drawn"),
        (("--job", "no-such.json"), "no-such.json: No such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(wb: Wb, words: tuple[str, ...], message: str) -> None:
    status, out, err = wb("extract", *words)
    assert status == 2 and out == "" and err.startswith("wb: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[1]", "not a JSON object"), ('{"bananas": 3}', "'bananas'")]
)
def test_bad_job_files_are_one_line(wb: Wb, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(content)
    status, out, err = wb("extract", "--job", str(tmp_path / "job.json"))
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err


def test_a_newer_method_is_not_mistaken_for_the_old(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is one of `extract`, but its result is the method's."""
    given: dict[str, Any] = {"model": tiny, "task": "ioi", "n": 4, "size": 5}
    first = runs.run("extract", method="eap", **given)
    chosen = registry.get_analysis("eap")
    with monkeypatch.context() as patch:
        patch.setitem(registry._analyses, "eap", replace(chosen, version=chosen.version + 1))
        assert runs.find("extract", method="eap", **given) is None
    again = runs.find("extract", method="eap", **given)
    assert again is not None and again.id == first.id and again.hit


# A folder becomes one by renaming: its run is the first, then two files and the folder of its circuit.
KILLED = """
import os, signal, sys
from workbench import cli

rename, left = os.rename, [int(sys.argv.pop(1))]

def last(*given, **more):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*given, **more)

os.rename = last
cli.main()
"""


@pytest.mark.parametrize(
    ("renames", "whole_runs", "whole_circuits"),
    [(3, 1, 0), (5, 1, 1)],
    ids=["half a circuit written", "before its second run is whole"],
)
def test_after_kill_9_it_goes_on_where_it_was(
    renames: int, whole_runs: int, whole_circuits: int, wb: Wb, tiny_folder: str, home: Path
) -> None:
    words = asked(tiny_folder, "--size", "9")
    command = [sys.executable, "-c", KILLED, str(renames), *words]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=home.parent, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and killed.stdout == b""
    done, circuits = ([*(home / kind).glob("[!.]*")] for kind in ("runs", "circuits"))
    assert (len(done), len(circuits)) == (whole_runs, whole_circuits)
    before = {path: path.stat().st_mtime_ns for folder in (*done, *circuits) for path in folder.iterdir()}
    rows = json.loads(wb(*words)[1])["circuits"]
    assert [row["hit"] for row in rows] == [True] * whole_runs + [False] * (4 - whole_runs)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for row in rows:
        assert equal(Circuit.load(Path(row["folder"])), runs.get_run(row["run"]).result)
