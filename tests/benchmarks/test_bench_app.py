"""How long the app takes to show what was computed before, in a real browser on this machine.

    click to page  from a click on a row of the list to a run's figure, drawn and the script at rest
    circuit        the page of a circuit of 1,000 edges, by its address
    5,000 runs     the list, by its address

Each in a browser session that has the app open, after a first visit that imports what the pages need. Predicted: .8 s,
1.5 s and 1.5 s on two quiet cores; the first list of 5,000 runs, which reads as many records, longer.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import harness
from tests.browser.test_browser import CHROMIUM, SHIPPED, Visitor, url, visitor
from tests.test_app import folder, save
from tests.test_plots import node_scores
from workbench import runs

__all__ = ["url", "visitor"]  # fixtures
N = harness.size(5000, 50)


def seconds(visit: Callable[[], None], rounds: int = harness.size(9, 1)) -> dict[str, Any]:
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        visit()
        taken.append(time.perf_counter() - started)
    return harness.quartiles(taken)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium: apt-get install chromium")
def test_time_to_a_drawn_page(url: str, visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    newest = save(node_scores(n_layers=12, n_heads=12), created="2126-01-01T00:00:00+00:00")
    scored = runs.run("eap", model="pycode-small-dense", task="with_as", n=16)
    runs.run("judge-sizes", model="pycode-small-dense", task="with_as", n=16, seed=1, found=scored.id)
    rest = "[data-test-script-state=notRunning]"

    def listed(n: int) -> None:
        page.goto(f"{url}/runs")
        page.get_by_text(f"{n} of {n} runs").wait_for()
        page.get_by_test_id("stDataFrame").wait_for()
        page.locator(rest).wait_for()

    def clicked() -> float:
        page.get_by_test_id("stDataFrame").wait_for()
        page.wait_for_timeout(500)
        started = time.perf_counter()
        page.get_by_test_id("stDataFrame").click(position={"x": 60, "y": 54})
        page.wait_for_url(f"**/run?run={newest}")
        page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for()
        page.locator(rest).wait_for()
        taken = time.perf_counter() - started
        page.get_by_text("All runs").click()
        return taken

    def circuit() -> None:
        page.goto(f"{url}/circuit?run={scored.id}&size=1000")
        page.get_by_text("it is read by").wait_for()
        page.locator(".js-plotly-plot").nth(1).wait_for()
        page.locator(rest).wait_for()

    few = SHIPPED + len(runs.all_runs()[0])
    listed(few)
    clicked()
    click = harness.quartiles([clicked() for _ in range(harness.size(9, 1))])
    circuit()
    drawn = seconds(circuit)

    template = folder(scored.id)
    for i in range(N):
        copy = template.with_name(f"{template.name}-{i:04}")
        shutil.copytree(template, copy)
        record = json.loads((copy / "record.json").read_text()) | {"id": copy.name}
        (copy / "record.json").write_text(json.dumps(record))
    total = few + N
    first = seconds(lambda: listed(total), rounds=1)
    harness.record(
        "app-pages",
        {
            "click_to_page": {**click, **harness.judge(click["median"], at_most=1.0)},
            "circuit_of_1000_edges": {**drawn, **harness.judge(drawn["median"], at_most=2.0)},
            "runs": N,
            "first_list": first["median"],
            "list": (again := seconds(lambda: listed(total))) | harness.judge(again["median"], at_most=2.0),
        },
    )
    visitor.is_content()
