"""README and docs: every command is one that exists, every snippet runs, every link leads somewhere, and the site is
built without a warning."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
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
from workbench.models import LanguageModel

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)  # in turn, so that none ends another
    return [text for known, text in fenced if known == language]


def commands(page: Path) -> list[str]:
    """In the order of the page: in blocks a line each, in prose what has no placeholder of a name."""
    found: list[str] = []
    for language, block, prose in re.findall(r"^```(\w*)\n(.*?)^```$|`(wb [^`]+)`", page.read_text(), re.M | re.S):
        if prose and "..." not in prose:
            found.append(" ".join(prose.split()))
        elif language in ("", "sh"):
            found += [line.split("  ")[0] for line in block.splitlines() if line.startswith("wb ")]
    return found


class Asked(Exception):
    """What a command would have done."""


@pytest.mark.parametrize("command", dict.fromkeys(command for page in PAGES for command in commands(page)))
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
        (ActivationStore, "merge"),
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
    # What needs nothing ran; a file that is none, and an empty store, were at least asked for.
    assert status == 0 or "is no zip file" in err or "nothing is stored yet" in err, err


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


SMALLER: dict[str, dict[str, Any]] = {  # in place of what takes minutes to hours; the rest is as the page has it
    "attention-truncation": {"n": 2}, "attention-sinks": {"n": 2}, "attention-entropy": {"n": 2}, "cka": {"n": 4},
    "kv-saliency": {"n": 2}, "modular-addition": {"steps": 200}, "icl-regression": {"steps": 200},
    "compare": {"n": 4, "methods": "patching,eap"}, "patching": {"n": 2},
    "sparse-bridge": {"seconds": 5},
    "sparse-prune": {"n": 16, "settings": 1, "steps": 40},
    "train-sae": {"latents": 512, "tokens": 20_000, "batch": 64},
    "latents": {"tokens": 2000, "length": 16, "examples": 3},
    "language-layers": {"strengths": "1", "steps": 4, "n-validation": 2, "n-test": 2},
    "steer": {"steps": 8},
}  # fmt: skip
TERMS = "gemma-3-270m"


class Reader:
    """Types what a page says, one command after another; placeholders are what an earlier one gave."""

    def __init__(self, wb: Wb, folder: Path) -> None:
        self.wb, self.folder = wb, folder
        self.ids = {"RUN": min(path.name for path in (saes.DATA / "runs").glob("language-steering-*"))}

    def __call__(self, command: str, page: Path) -> None:
        words = [self.ids.get(word.removesuffix(".zip"), word) for word in shlex.split(command)[1:]]
        kind = words[words.index("run") + 1] if "run" in words else words[0]
        found = kind == "sparse-prune" and "pycode-small" in words  # comes with the package
        for name, value in ({} if found else SMALLER.get(kind, {})).items():
            if f"--{name}" in words:
                at = words.index(f"--{name}")
                del words[at : at + 2]
            words += [f"--{name}", str(value)]
        if words[0] == "extract":
            words += ["--n", "4"]
        if kind == "language-steering" and "--n-test" not in words:  # the one with all its numbers is found
            words += ["--top", "1", "--written", "2", "--steps", "4", "--n-validation", "3", "--n-test", "3"]
        if words[1:] == ["sparse-tasks"]:  # of the model that was just trained; those of others are found
            words += ["--tasks", "with_as,for_while", "--pairs", "8", "--settings", "1", "--steps", "40"]
        if words[0] == "batch":
            plan = yaml.safe_load(blocks(page, "yaml")[0])
            (self.folder / "plan.yaml").write_text(yaml.safe_dump(plan | {"n": 2}))
        if words[0] == "import":  # as from elsewhere
            shutil.rmtree(settings.home() / "runs" / words[1])
            words[1] += ".zip"
        if words[:2] == ["store", "merge"]:
            shutil.copytree(settings.home() / "store", self.folder / "other")
            words[2] = str(self.folder / "other")
        status, out, err = self.wb(*words)
        assert status == 0, f"{command}: {err}"
        self.remember(words, out)
        if words[:2] == ["job", "resume"]:  # nothing goes on when the test has ended
            while jobs.get(self.ids["ID"]).state not in jobs.ENDED:
                time.sleep(0.5)
            assert jobs.get(self.ids["ID"]).state == "done"

    def remember(self, words: list[str], out: str) -> None:
        """Ids that a reader would copy."""
        if words[:2] == ["job", "start"]:
            self.ids["ID"] = out.strip()
        if words[0] == "run":
            names = {"attribution-patching": "attribution-patching-with_as-0123456789ab", "train-sae": "RUN",
                     "sparse-bridge": "sparse-bridge-29ae0b8d9be8"}  # fmt: skip
            made = [path.name for path in (settings.home() / "runs").glob(f"{words[1]}-*")]
            if words[1] in names:
                (self.ids[names[words[1]]],) = made


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if re.search("```python|`wb |^wb ", page.read_text(), re.M)],
    ids=lambda page: page.name,
)
def test_snippets_and_commands_of_a_page_run(
    page: Path, wb: Wb, smollm: LanguageModel, shared_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its snippets, then its commands, on the models that come along and embedded ones."""
    here = ["smollm2-135m"]
    if TERMS in page.read_text() and any(TERMS in command or "--accept-terms" in command for command in commands(page)):
        if TERMS not in os.environ.get("WORKBENCH_ACCEPT_TERMS", ""):
            pytest.skip(f"WORKBENCH_ACCEPT_TERMS does not name {TERMS}")
        with monkeypatch.context() as patch:
            patch.setenv("WORKBENCH_HOME", str(shared_home))
            LanguageModel.load(TERMS, accept_terms=True)
        here.append(TERMS)
    for data in (models.DATA, saes.DATA):
        places.ship(data / "runs")
    (settings.home() / "models").mkdir(parents=True, exist_ok=True)
    for model in here:
        (settings.home() / "models" / model).symlink_to(shared_home / "models" / model)
    monkeypatch.setattr(pio.renderers, "default", "json")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, snippet {i}", "exec"), names)
    read = Reader(wb, tmp_path)
    for command in commands(page):
        read(command, page)


def test_the_plan_for_a_big_model_is_of_measured_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """Its constants are those of the records, and its table and prose what it computes."""
    page = (ROOT / "docs" / "scale.md").read_text()
    names: dict[str, Any] = {}
    exec(blocks(ROOT / "docs" / "scale.md", "python")[1], names)
    disk, tiers, curve = (
        json.loads((ROOT / "tests" / "benchmarks" / "results" / f"store-{name}.json").read_text())
        for name in ("disk-cpu", "tiers-cuda", "curve-cpu")
    )
    measured = disk["gigabytes per second"]
    assert (names["write"], names["read"]) == (
        measured["write"]["ours, store"] * 1e9, measured["read"]["ours, store"] * 1e9,
    )  # fmt: skip
    assert names["into_store"] == tiers["gigabytes per second"]["store alone"] * 1e9
    assert names["lookup"] == pytest.approx(curve["ours"]["sizes"][-1]["lookup_us"] * 1e-6, rel=0.01)
    assert names["growth"] == curve["ours"]["growth of lookup_us"]["power"]
    table = {
        row[0]: row[1:] for row in re.findall(r"^\| ([a-z ,]+) \| ([\d,]+).*\| ([\d,]+).*\| ([\d,]+).*\|$", page, re.M)
    }
    size, rows = list(names["size"].values()), names["rows"]
    for name, values in {
        "bytes of a row": size,
        "in all": [rows * one / 1e12 for one in size],
        "hours to write, one process": [rows * one / names["write"] / 3600 for one in size],
        "hours to read, one process": [rows * one / names["read"] / 3600 for one in size],
        "dollars a month on disk": [rows * one / 1e9 * names["month"] for one in size],
    }.items():
        assert table[name] == tuple(f"{value:,.0f}" for value in values), name
    printed = capsys.readouterr().out
    for said in ("583 GPU hours, $1,458", "10 million entries"):
        assert said in printed and said.split(",")[0] in page
    assert "78 MB/s of 1,520" in printed and "At 78 MB/s" in page


def test_figures_of_the_published_measurements_are_those_of_the_records() -> None:
    page = " ".join((ROOT / "docs" / "papers.md").read_text().split())
    kept = {
        path.name.removeprefix("papers-").removesuffix("-cpu.json"): json.loads(path.read_text())["summary"]
        for path in (ROOT / "tests" / "benchmarks" / "results").glob("papers-*-cpu.json")
    }
    for name in kept:
        assert f"`{name}`" in page
    cut, sinks, spread = (kept[f"attention-{name}"] for name in ("truncation", "sinks", "entropy"))
    waves, step, alike, cache = (kept[name] for name in ("modular-addition", "icl-regression", "cka", "kv-saliency"))
    kl, agreement, ahead = (
        [cache[f"{what}_by_score"][score] for score in ("joint", "value", "key")]
        for what in ("kl", "agreement", "ahead")
    )
    loss = sinks["next_token_loss"]
    assert cut["violations"] == spread["violations"] == 0
    for said in (
        f"in {cut['checks']:,} comparisons", f"need {cut['key_share']:.0%} of the keys".replace("%", " %"),
        f"certify {cut['certified_share']:.0%} by the head and tail".replace("%", " %"),
        f"{cut['gap_share']:.0%} by the gap".replace("%", " %"),
        f"{sinks['sink_metric']:.0%} of heads".replace("%", " %"),
        f"channel {sinks['massive_channels'][0]} of the first",
        f"{sinks['ratio_to_median']:,.0f} times the median from block {sinks['massive_from_layer']} on",
        f"from {loss['unchanged']:.2f} to {loss['set to zero']:.2f}; setting it to its mean gives "
        f"{loss['set to mean']:.2f}, and as many other channels at zero {loss['others set to zero']:.2f}",
        f"layers are at {alike['neighbours']:.2f} and the ends of the network at {alike['ends']:.2f}",
        f"null is at most {alike['null_most']:.3f}",
        f"{kl[0]:.3f} nats by the joint score, {kl[1]:.3f} by value, {kl[2]:.3f} by key, "
        f"{cache['kl_by_score']['attention']:.3f} by attention and {cache['kl_by_score']['random']:.2f} at random",
        f"does ({min(agreement):.3f} to {max(agreement):.3f})", f"moderately ({min(ahead):.2f} to {max(ahead):.2f})",
        f"never broken in {spread['checks']:,}", f"by heart by step {waves['memorised_at']} and the others by step "
        f"{waves['generalised_at']}",
        f"to {waves['phase_error']:.2f} rad ({waves['untrained']['phase_error']:.2f} before",
        f"explain {waves['logits_explained']:.0%} of".replace("%", " %"),
        f"without them {waves['accuracy_with_waves']['without_key']:.1%}, and".replace("%", " %"),
        f"others alone {waves['accuracy_with_waves']['other']:.1%}.".replace("%", " %"),
        f"QK is {step['distance_to_closed_form']:.1%} from it".replace("%", " %"),
        f"loss is {step['regression_loss']:.3f} where the optimum is {step['optimum_loss']:.3f}",
        f"step is {step['r2_of_step']:.4f}, with the Bayes predictor {step['r2_of_bayes']:.2f}",
    ):  # fmt: skip
        assert said in page, said
    assert len(waves["key_frequencies"]) == 4 and waves["accuracy_with_waves"]["key"] == 1.0
