"""Figures that the pages quote are those of the records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "tests" / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "circuits.md").read_text()


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDS / f"{name}-cpu.json").read_text())
    return found


def rows(heading: str = "## Which method finds the circuit") -> dict[str, list[str]]:
    """The table of methods under a heading, cell by cell; the first row is called "" and says what the columns are."""
    _, _, section = PAGE.partition(heading)
    table = re.findall(r"^\| (?:`([\w-]+)` )?\|(.+)\|$", re.split(r"\n##", section)[0], re.M)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in table}


REAL = rows("### On other tasks and another model")


@pytest.mark.parametrize("method", [name for name in REAL if name])
def test_the_table_of_real_models_is_that_of_the_records(method: str) -> None:
    for column, cell in zip(REAL[""], REAL[method], strict=True):
        model, task = column.split(", ")
        row = record(f"compare-{model}-{task}")["table"].get(method)
        if row is None:
            assert cell == "" and method in record(f"compare-{model}-{task}")["failed"]
        else:
            assert cell == f"{row['heads']:,.0f}" + (f" / {row['edges']:,.0f}" if "edges" in row else "")


def test_every_record_of_a_real_model_is_in_the_table() -> None:
    kept = {path.name.removeprefix("compare-").removesuffix("-cpu.json") for path in RECORDS.glob("compare-*-cpu.json")}
    assert kept == {column.replace(", ", "-") for column in REAL[""]}


@pytest.mark.parametrize("method", [name for name in rows() if name])
def test_the_table_of_methods_is_that_of_the_records(method: str) -> None:
    planted, trained = (record(f"truth-{name}")["summary"] for name in ("planted", "toys"))
    real = record("compare-smollm2-135m-ioi")["table"]

    def auc(of: dict[str, Any], what: str) -> str:
        return f"{of[method][what]['mean']:.2f}" if what in of.get(method, {}) else ""

    def size(what: str) -> str:
        return f"{real[method][what]:,.0f}" if what in real.get(method, {}) else ""

    agreement = f"{real[method]['exact']:.2f}" if method in real else ""
    expected = [auc(planted, "nodes"), auc(planted, "edges"), auc(trained, "nodes"), size("heads"), size("edges")]
    assert rows()[method] == [*expected, agreement]


def test_the_prose_on_codes_is_that_of_the_records() -> None:
    planted = record("truth-planted")["summary"]
    prose = " ".join(PAGE.split())
    for pattern, method in (
        (r"published mode is \*below\* chance, (\d\.\d+)", "sae-codes, paper"),
        (r"fixed mode (\d\.\d+)", "sae-codes, fixed"),
        (r"untrained (\d\.\d+)", "sae-codes, untrained"),
        (r"a linear probe (\d\.\d+)", "sae-codes, probe"),
        (r"k-means (\d\.\d+)", "sae-codes, k-means"),
        (r"trained codes come to (\d\.\d+)", "code-effects"),
        (r"random ones to (\d\.\d+)", "code-effects, untrained"),
        (r"the probe's to (\d\.\d+)", "code-effects, probe"),
        (r"below the (\d\.\d+) of attribution", "attribution-patching"),
    ):
        (quoted,) = re.findall(pattern, prose)
        assert float(quoted) == round(planted[method]["heads"]["mean"], 2), method


def test_codes_on_the_real_model_are_those_of_the_records() -> None:
    pattern = (
        r"\((\d\.\d+) on IOI, (\d\.\d+) on Greater-Than; a\s+random SAE (\d\.\d+) and (\d\.\d+)\), and the plain norm"
    )
    (quoted,) = re.findall(pattern + r" of the mean difference more \((\d\.\d+) and (\d\.\d+)\)", PAGE)
    tasks = [record(f"codes-smollm2-135m-{task}")["arms"] for task in ("ioi", "greater_than")]
    arms = ("fixed", "untrained", "mean difference")
    assert [float(x) for x in quoted] == [round(arm[name]["auc"], 2) for name in arms for arm in tasks]


def test_nulls_are_within_what_the_page_says() -> None:
    nulls = {name: row["null"] for name, row in record("truth-planted")["summary"].items() if "null" in row}
    (low, high, odd) = re.findall(r"(\d\.\d+) to (\d\.\d+) for all but\s+k-means codes, (\d\.\d+)", PAGE)[0]
    assert round(nulls.pop("sae-codes, k-means"), 2) == float(odd)
    assert round(min(nulls.values()), 2) == float(low) and round(max(nulls.values()), 2) == float(high)
