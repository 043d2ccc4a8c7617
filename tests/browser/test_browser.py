"""The app in a real browser: every page opens, what it is for is done, and its address alone brings it back.

Screenshots go to $WORKBENCH_SCREENSHOTS, or else to pytest's temporary folder: light ones of what was done, and dark
ones of a fresh browser that was given nothing but the address.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from circuits.sparse.shipped import DATA
from saes.pretrained import DATA as SAES
from tests.test_app import HOSTILE, MAIN, save
from tests.test_plots import attention_result, lens_result, node_scores
from workbench import places, runs

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium: apt-get install chromium"),
]
SHIPPED = sum(len(list((folder / "runs").iterdir())) for folder in (DATA, SAES))
ALL = SHIPPED + 3
SIZE = {"width": 1280, "height": 800}
# Below a page's own address Streamlit first asks for its two start-up files there, and then at the root.
EXPECTED = ("/_stcore/health", "/_stcore/host-config")


@pytest.fixture
def url(home: Path, tmp_path: Path) -> Iterator[str]:
    """The server, started as `wb app` starts it but on a free port, from another working directory."""
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(MAIN), "--server.headless", "true"]
    log = tmp_path / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--server.port", str(port)], cwd=tmp_path, env=os.environ.copy(), stdout=out, stderr=out
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/_stcore/health", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(20)


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.25)
    pytest.fail(f"the server did not answer: {log.read_text()}")


class Visitor:
    """A page of a browser, and whatever it complained about, ran from a record, or asked of other machines."""

    def __init__(self, page: Any, url: str, scheme: str):
        self.page = page
        self.url = url
        self.scheme = scheme
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"a script ran: {dialog.message}"))
        page.on("console", self._console)
        page.on("request", lambda request: self._request(request.url, url))

    def _console(self, message: Any) -> None:
        if message.type == "error" and not message.location.get("url", "").endswith(EXPECTED):
            self.complaints.append(f"{message.text} {message.location}")

    def _request(self, wanted: str, own: str) -> None:
        if not wanted.startswith((own, own.replace("http", "ws"), "data:", "blob:")):
            self.complaints.append(f"asked for {wanted}")

    def is_content(self) -> None:
        assert self.page.locator("[data-testid=stException]").count() == 0
        assert self.complaints == []


@pytest.fixture
def visitor(url: str) -> Iterator[Visitor]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        yield fresh(browser, url)
        browser.close()


def fresh(browser: Any, url: str, scheme: str = "light") -> Visitor:
    """A browser that has seen nothing yet."""
    context = browser.new_context(viewport=SIZE, color_scheme=scheme)
    context.set_default_timeout(90_000)
    return Visitor(context.new_page(), url, scheme)


def settled(page: Any) -> None:
    page.locator("[data-test-script-state=notRunning]").wait_for()
    page.wait_for_timeout(800)  # transitions


def screenshot(visitor: Visitor, name: str, tmp_path: Path) -> None:
    """Of the page, and of its address in a dark browser that is new to it; both are without complaint."""
    folder = Path(os.environ.get("WORKBENCH_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    dark = fresh(visitor.page.context.browser, visitor.url, "dark")
    dark.page.goto(visitor.page.url)
    for one in (visitor, dark):
        settled(one.page)
        one.page.screenshot(path=str(folder / f"{name}-{one.scheme}.png"))
        one.is_content()
    dark.page.context.close()


def test_from_the_list_to_a_run_and_back_by_its_address(url: str, visitor: Visitor, tmp_path: Path) -> None:
    save(lens_result(), "logit-lens", seed=1)
    save(attention_result(), "attention-patterns", seed=2)
    scores = node_scores(n_layers=12, n_heads=12)
    id = save(scores, seed=3, created="2126-01-01T00:00:00+00:00")  # newer than what comes with the package
    page = visitor.page

    page.goto(f"{url}/runs")
    table = page.get_by_test_id("stDataFrame")
    table.wait_for()
    page.get_by_text(f"{ALL} of {ALL} runs").wait_for()
    screenshot(visitor, "runs", tmp_path)
    table.click(position={"x": 60, "y": 54})  # the first row, drawn on a canvas: the newest run

    page.wait_for_url(f"**/run?run={id}")
    assert_shows(page, scores)
    screenshot(visitor, "run", tmp_path)
    visitor.is_content()

    other = fresh(page.context.browser, url)
    other.page.goto(f"{url}/run?run={id}")
    assert_shows(other.page, scores)
    other.is_content()

    page.get_by_text("All runs").click()
    page.get_by_text(f"{ALL} of {ALL} runs").wait_for()
    assert "run=" not in page.url
    visitor.is_content()


def assert_shows(page: Any, scores: Any) -> None:
    """The heat map is drawn, and the numbers are those of the result."""
    page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for(timeout=90_000)
    best, score = scores.top(1)[0]
    command = "wb run patching --model tiny --task ioi --n 5 --seed 3"
    for part in ("80%", "3.25 ± 0.50", best, f"{abs(score):.2f}", "loss of the metric", "Mary and John went", command):
        playwright.expect(page.get_by_test_id("stMain")).to_contain_text(part, timeout=30_000)
    written = page.locator(".js-plotly-plot .annotation-text").all_text_contents()
    assert sorted(text[0] for text in written) == sorted("+" if score > 0 else "−" for _, score in scores.top(10))


def test_the_first_page_after_a_start_may_be_any(url: str, visitor: Visitor, tmp_path: Path) -> None:
    """A hostile address, as the very first: one sentence, nothing executed, and a link that leads on."""
    page = visitor.page
    page.goto(f"{url}/run?run=%3Cscript%3Edocument.title%3D1%3C%2Fscript%3E")
    page.get_by_text("No run is called '<script>document.title=1</script>'").wait_for()
    assert page.title() == "Workbench"
    screenshot(visitor, "unknown", tmp_path)
    page.get_by_text("All runs").click()
    page.get_by_text(f"{SHIPPED} of {SHIPPED} runs").wait_for()
    screenshot(visitor, "first", tmp_path)
    visitor.is_content()


def test_the_other_results_are_drawn_too(url: str, visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    for result, analysis in ((lens_result(12), "logit-lens"), (attention_result(12, 12), "attention-patterns")):
        id = save(result, analysis)
        page.goto(f"{url}/run?run={id}")
        page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for()
        screenshot(visitor, analysis, tmp_path)
        visitor.is_content()


def test_text_of_a_run_is_shown_and_never_run(url: str, visitor: Visitor) -> None:
    page = visitor.page
    id = save(lens_result(tokens=(HOSTILE, "<b>", "x")), "logit-lens", model_name=HOSTILE, command=HOSTILE)
    page.goto(f"{url}/run?run={id}")
    page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for()
    playwright.expect(page.get_by_test_id("stMain")).to_contain_text("<script>alert(1)</script>")
    assert page.locator("[data-testid=stMain] :is(script, img[src=x], a[href*=evil])").count() == 0
    visitor.is_content()


TITLES = {
    "": "Workbench",
    "discovery": "Find a circuit",
    "lab": "Patch a pair of prompts",
    "sparse": "Sparse models",
    "steering": "Steer a language",
    "playground": "Playground",
    "latent": "Latents",
    "compare": "Compare",
    "export": "Export and import",
    "glossary": "Glossary",
    "start": "Start an analysis",
    "jobs": "Jobs",
    "tasks": "Tasks",
    "models": "Models and SAEs",
    "store": "Activation store",
}


def test_every_page_opens(url: str, visitor: Visitor, tmp_path: Path) -> None:
    for name, title in TITLES.items():
        visitor.page.goto(f"{url}/{name}")
        visitor.page.get_by_role("heading", name=title, exact=True).wait_for()
        screenshot(visitor, name or "home", tmp_path)


def test_from_a_form_to_a_job_to_its_run(url: str, visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    page.goto(f"{url}/start?form=sparse-train")
    for name, value in {"width": "32", "layers": "1", "tokens": "4096"}.items():
        page.get_by_label(name, exact=True).fill(value)
        page.get_by_label(name, exact=True).press("Enter")
        page.get_by_test_id("stMain").get_by_text(f"--{name}={value}").wait_for()
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/job?job=*")
    page.get_by_text("All jobs").wait_for()
    screenshot(visitor, "job", tmp_path)
    page.get_by_role("button", name="Open the run").click()
    page.wait_for_url("**/run?run=sparse-train-*")
    page.get_by_text("All runs").wait_for()
    page.locator(".js-plotly-plot").first.wait_for()
    visitor.is_content()


def test_from_scores_to_the_ablation_of_a_node_and_back_by_its_address(
    url: str, visitor: Visitor, tmp_path: Path
) -> None:
    """Real jobs on a model of the package: faithfulness at each size, a node picked in the graph, and without it."""
    found = runs.run("eap", model="pycode-small-dense", task="with_as", n=16)
    page = visitor.page
    page.goto(url)
    page.get_by_role("link", name="circuit", exact=True).click()  # of what was computed last
    page.wait_for_url(f"**/circuit?run={found.id}*")
    page.get_by_role("button", name="Measure faithfulness").click()
    page.get_by_text("metric of the model").wait_for()
    page.goto(f"{url}/circuit?run={found.id}&size=100&node=m1&change=m1")
    page.get_by_text("it is read by").wait_for()
    page.locator("[data-test-script-state=notRunning]").wait_for()
    dots = page.locator(".js-plotly-plot").first.locator("g.trace", has=page.locator("text")).locator("path.point")
    dots.nth(1).scroll_into_view_if_needed()
    box = dots.nth(1).bounding_box()  # of the first node above the input
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_url("**node=a0.h*")
    page.get_by_role("button", name="Ablate").click()
    page.get_by_text("faithfulness without").wait_for()
    screenshot(visitor, "circuit", tmp_path)
    page.get_by_label("how").click()
    page.get_by_text("clean run, these from the corrupted prompt").click()
    page.get_by_role("button", name="Patch").click()
    page.get_by_text("metric patched").wait_for()
    visitor.is_content()
    address, shown = page.url, page.get_by_test_id("stMetricValue").all_text_contents()

    other = fresh(page.context.browser, url)
    other.page.goto(address)
    other.page.get_by_text("metric patched").wait_for()
    assert other.page.get_by_test_id("stMetricValue").all_text_contents() == shown
    other.is_content()


@pytest.mark.slow
def test_two_at_once_on_one_model_have_what_each_has_alone(
    url: str, visitor: Visitor, home: Path, smollm: Any, shared_home: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """One steers, one patches; then the first looks at the latent that it steered with."""
    places.ship(SAES / "runs")
    (home / "models").mkdir(parents=True, exist_ok=True)
    (home / "models" / "smollm2-135m").symlink_to(shared_home / "models" / "smollm2-135m")
    steering, patching = visitor.page, fresh(visitor.page.context.browser, url)
    steered = {"unit": 40.0, "strengths": "0,2", "steps": 8}
    steering.goto(f"{url}/playground?" + "&".join(f"{name}={value}" for name, value in steered.items()))
    patching.page.goto(f"{url}/lab?positions=-1,10")
    for page, label in ((steering, "Write"), (patching.page, "Patch")):
        page.get_by_role("button", name=label, exact=True).click()
    steering.get_by_role("heading", name="Every strength").wait_for(timeout=300_000)
    patching.page.get_by_role("heading", name="Strongest cells").wait_for(timeout=300_000)
    screenshot(visitor, "written", tmp_path)
    screenshot(patching, "patched", tmp_path)

    found = {run.record["key"]["analysis"]: run for run in runs.all_runs()[0]}
    asked = {name: found[name].record["key"]["parameters"] for name in ("steer", "position-patching")}
    played, effects = (found[name].result for name in asked)
    steering.get_by_text("What this latent responds to").click()
    steering.wait_for_url("**/latent?*")
    steering.get_by_role("combobox", name="text").click()
    steering.get_by_role("option", name="parallel").click()
    settled(steering)
    steering.get_by_role("button", name="Look at it").click()
    steering.get_by_role("heading", name="Where it is largest").wait_for(timeout=300_000)
    screenshot(visitor, "looked", tmp_path)

    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "alone"))
    (tmp_path / "alone" / "models").mkdir(parents=True)
    (tmp_path / "alone" / "models" / "smollm2-135m").symlink_to(shared_home / "models" / "smollm2-135m")
    alone, apart = (runs.run(name, seed=0, **given).result for name, given in asked.items())
    assert [row.tokens for row in played.rows] == [row.tokens for row in alone.rows]
    torch.testing.assert_close(effects.effect, apart.effect, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.slow
def test_what_each_other_page_is_for_is_done(url: str, visitor: Visitor, home: Path, tmp_path: Path) -> None:
    """A method is run and its circuit followed; a size moved; two runs compared; a bundle taken out and brought in; a
    word looked up; a task's prompts drawn; the store checked."""
    page, main = visitor.page, visitor.page.get_by_test_id("stMain")

    page.goto(f"{url}/discovery?model=pycode-small-dense&task=with_as&method=eap&n=8")
    page.get_by_role("button", name="Find it").click()
    page.get_by_role("link", name="Its circuit").wait_for()
    visitor.is_content()
    page.get_by_role("link", name="Its circuit").click()
    page.wait_for_url("**/circuit?run=eap-with_as-*")
    found = page.url.split("run=")[1].split("&")[0]

    page.goto(f"{url}/sparse?model=pycode-small&sparse+task=with_as")
    page.get_by_text("held-out loss").nth(1).wait_for()
    settled(page)
    loss = page.get_by_test_id("stMetricValue").all_text_contents()
    page.get_by_role("slider").press("ArrowLeft")
    page.wait_for_url("**size=*")
    settled(page)
    assert page.get_by_test_id("stMetricValue").all_text_contents() != loss
    visitor.is_content()

    runs.run("eap-ig", model="pycode-small-dense", task="with_as", n=8)
    other = next(run.id for run in runs.all_runs()[0] if run.id.startswith("eap-ig"))
    page.goto(f"{url}/compare?a={found}&b={other}")
    page.get_by_text("What decides").first.wait_for()
    page.get_by_role("button", name="Swap").click()
    page.wait_for_url(f"**a={other}*")
    visitor.is_content()

    page.goto(f"{url}/export?run={found}")
    with page.expect_download() as taken:
        page.get_by_role("button", name="Download the bundle").click()
    taken.value.save_as(tmp_path / "run.zip")
    shutil.rmtree(home / "runs" / found)
    page.goto(f"{url}/export")
    page.locator("input[type=file]").set_input_files(tmp_path / "run.zip")
    page.get_by_text("It is here:").wait_for()
    assert (home / "runs" / found / "record.json").is_file()
    visitor.is_content()

    page.goto(f"{url}/glossary")
    page.get_by_label("search").fill("faithfulness")
    page.get_by_label("search").press("Enter")
    page.wait_for_url("**term=faithfulness*")
    main.get_by_text("normalised by the whole model").first.wait_for()
    page.goto(f"{url}/tasks?task=ioi&seed=3")
    main.get_by_text("corrupted").first.wait_for()
    page.goto(f"{url}/store")
    page.get_by_role("button", name="Verify").click()
    page.wait_for_url("**/job?job=*")
    main.get_by_text("done").first.wait_for()
    visitor.is_content()
