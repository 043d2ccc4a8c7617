"""README and docs: every command is one that exists, every snippet runs, every link leads somewhere, and the site is
built without a warning."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly.io as pio
import pytest
import yaml

from circuits.sparse import shipped as models
from saes import pretrained as saes
from tests.conftest import Wb
from workbench import batch, jobs, places, registry, runs, settings
from workbench.activations import ActivationStore

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [page for page in PAGES if "```python" in page.read_text()]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands() -> Iterator[str]:
    """In blocks, a line each; in prose those that give an option, and no placeholder."""
    for page in PAGES:
        for block in [*blocks(page, ""), *blocks(page, "sh")]:
            yield from (line.split("  ")[0] for line in block.splitlines() if line.startswith("wb "))
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        yield from (one for one in re.findall(r"`(wb [^`]+)`", prose) if "--" in one and "..." not in one)


class Asked(Exception):
    """What a command would have done."""


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_a_command_is_one_that_exists(
    command: str, wb: Wb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
) -> None:
    """It comes as far as what it asks for: names, options and values are those of the code."""

    def run(analysis: str, **given: Any) -> None:
        known = registry.get_analysis(analysis)
        own = {"model", "task", "n", "seed", "device", "dtype", "accept_terms", "store"}
        registry.bind(known, {name: value for name, value in given.items() if name not in own})
        if given.get("task") is not None:
            assert known.task is not None and registry.get_task(given["task"])
        assert given.get("model") is None or known.model is not None
        raise Asked

    def asked(*_: Any, **__: Any) -> None:
        raise Asked

    for module, name in (
        (jobs, "start"), (jobs, "cancel"), (jobs, "resume"), (runs, "get_run"), (batch, "run"), (batch, "compute"),
        (ActivationStore, "estimate"), (ActivationStore, "verify"), (ActivationStore, "recheck"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, asked)
    monkeypatch.setattr(runs, "run", run)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    for word in words:
        if word.endswith((".zip", ".yaml", ".json")):
            text = yaml.safe_dump({"models": ["x"], "tasks": ["ioi"], "methods": ["eap"]}) if "yaml" in word else "{}"
            (tmp_path / word).write_text(text)
    if words[0] in ("demo", "app"):
        return
    try:
        status, _, err = wb(*words)
    except Asked:
        return
    # What needs nothing ran; a file that is none was at least asked for.
    assert status == 0 or "is no zip file" in err, err


def test_makefile_targets_that_pages_name_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z]+)\b", page.read_text())}
    assert {"demo", "test", "app", "docs"} <= named
    assert {name for name in named if name not in targets} <= {"of"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http") and not target.startswith("reference/"):  # which the site makes
            assert (page.parent / target).exists(), target


def test_the_plan_of_a_batch_is_one() -> None:
    (plan,) = [block for page in PAGES for block in blocks(page, "yaml")]
    assert len(batch.cells(yaml.safe_load(plan))) == 2 * 2 * 3 * 2


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pages = {path.name for path in (tmp_path / "site").rglob("*.html")}
    assert {"circuits.html", "workbench.activations.html", "saes.steering.html"} <= pages
    text = (tmp_path / "site" / "reference" / "workbench.html").read_text()
    assert "LanguageModel" in text and "Raises UserError" in text


@pytest.mark.slow
@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.name)
def test_snippets_run_from_top_to_bottom(page: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the models that come along, and the embedded one."""
    for data in (models.DATA, saes.DATA):
        places.ship(data / "runs")
    (settings.home() / "models").mkdir(parents=True, exist_ok=True)
    (settings.home() / "models" / "smollm2-135m").symlink_to(shared_home / "models" / "smollm2-135m")
    monkeypatch.setattr(pio.renderers, "default", "json")
    names: dict[str, Any] = {"__name__": page.stem}
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, snippet {i}", "exec"), names)
