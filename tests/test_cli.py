"""The command line: exactly one JSON object on stdout, one line of error, status 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Wb


def test_run_prints_one_object_and_hits_the_second_time(wb: Wb, tiny_folder: str) -> None:
    words = ("run", "patching", "--model", tiny_folder, "--task", "ioi", "--n", "3", "--mlps", "false", "--json")
    status, out, _ = wb(*words)
    first = json.loads(out)
    assert status == 0 and out.count("\n") == 1
    assert first["hit"] is False and first["forward_passes"] > 0 and first["seconds"] > 0
    second = json.loads(wb(*words)[1])
    assert second["hit"] is True and second["forward_passes"] == 0
    assert second["run"] == first["run"] and second["result"] == first["result"] and second["task"] == first["task"]
    shown = json.loads(wb("show", first["run"], "--json")[1])
    assert shown["result"] == first["result"]
    listed = json.loads(wb("runs", "--json")[1])
    assert [row["run"] for row in listed["runs"]] == [first["run"]]


def test_the_recorded_command_reproduces_the_run(wb: Wb, tiny_folder: str) -> None:
    options = ("--n", "3", "--direction", "denoise", "--seed", "4", "--dtype", "bfloat16")
    _, out, _ = wb("run", "patching", "--model", tiny_folder, *options, "--json")
    first = json.loads(out)
    _, text, _ = wb("show", first["run"])
    (command,) = [line.removeprefix("  again  ") for line in text.splitlines() if line.startswith("  again  ")]
    again = json.loads(wb(*command.split()[1:], "--json")[1])
    assert again["run"] == first["run"] and again["hit"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "patching", "--task", "iio"), "no task is called 'iio'; did you mean 'ioi'?"),
        (("run", "pathcing"), "did you mean 'patching'?"),
        (("run", "sae-codes", "--steps", "banana"), "steps='banana' is not int"),
        (("run", "patching", "--steps", "3"), "no parameter of patching is called 'steps'"),
        (("run", "patching", "--n", "many"), "n='many' is not int"),
        (("run", "patching", "--n", "0"), "n=0 prompts cannot be drawn"),
        (("run", "patching", "stray"), "'stray' is not understood"),
        (("run", "patching", "--mlps"), "--mlps needs a value"),
        (("run", "patching", "--model", "./nowhere"), "has no config.json"),
        (("show", "../../etc"), "no run is called '../../etc'"),
        (("bogus",), "No such command 'bogus'"),
        (("store", "evict", "--keep-mb", "-1"), "keep_bytes=-1000000 is negative"),
        (("store", "evict", "--model", "gpt5"), "no stored model is called 'gpt5'"),
        (("store", "show", "zz"), "letters other than 0-9 a-f"),
        (("store", "show", "--run", "nope"), "nothing is stored for run 'nope'"),
        (("store", "pin"), "a pin of everything would leave no room"),
        (("store", "pin", "--hook", "h", "--off"), "there is no such pin"),
    ],
)
def test_bad_input_is_one_line_and_status_2(wb: Wb, words: tuple[str, ...], message: str) -> None:
    status, out, err = wb(*words)
    assert status == 2 and out == ""
    assert err.startswith("wb: ") and err.count("\n") == 1 and message in err


def test_gpt2_without_a_network_is_one_line(wb: Wb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    status, _, err = wb("run", "patching", "--model", "no-such/gpt2-here")
    assert status == 2 and "smollm2-135m" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [("models",), ("tasks",), ("analyses",), ("runs",), ("store", "stats"), ("store", "verify")]
)
def test_lists_have_text_and_json(wb: Wb, words: tuple[str, ...]) -> None:
    status, text, _ = wb(*words)
    assert status == 0 and text.strip()
    status, out, _ = wb(*words, "--json")
    assert status == 0 and isinstance(json.loads(out), dict) and out.count("\n") == 1


def test_parameters_are_listed_with_their_help(wb: Wb) -> None:
    assert "--direction" in wb("analyses")[1]


def test_store_commands(wb: Wb, tiny_folder: str) -> None:
    before = json.loads(wb("store", "estimate", "--model", tiny_folder, "--n", "4", "--json")[1])
    assert before["missing"] == before["entries"] == 4 * 3
    wb("run", "sae-codes", "--model", tiny_folder, "--n", "4", "--steps", "2", "--trials", "1", "--examples", "2")
    assert json.loads(wb("store", "estimate", "--model", tiny_folder, "--n", "4", "--json")[1])["missing"] == 0
    (run,) = [row["run"] for row in json.loads(wb("runs", "--json")[1])["runs"]]
    entries = json.loads(wb("store", "show", "--run", run, "--json")[1])["entries"]
    assert entries and all(run in one["runs"] for one in entries)
    assert entries[0]["sequence"] in wb("store", "show", entries[0]["sequence"][:8])[1]
    checked = json.loads(wb("store", "verify", "--recompute", "3", "--model", tiny_folder, "--json")[1])
    assert checked["damaged"] == [] and len(checked["computed_anew"]) == 3
    assert json.loads(wb("store", "pin", "--run", run, "--json")[1])["pins"] == [{"model": "", "hook": "", "run": run}]
    assert json.loads(wb("store", "evict", "--json")[1])["freed_bytes"] == 0
    assert json.loads(wb("store", "pin", "--run", run, "--off", "--json")[1])["pins"] == []
    stats = json.loads(wb("store", "stats", "--json")[1])
    freed = json.loads(wb("store", "evict", "--json")[1])["freed_bytes"]
    assert freed == stats["disk_bytes"] > 0
    assert json.loads(wb("store", "stats", "--json")[1])["disk_entries"] == 0
