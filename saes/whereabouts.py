"""SAEs that are on this machine, without their weights being read, and the runs that speak of one of their latents.

An SAE may have several names: its own, its model's, that of the run it came of. By the folder that they stand for they
are one. SAEs in folders of one's own and those of SAELens are not listed: they have no run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saes.sae import CONFIG, NAMES
from workbench import places, registry, sites, texts
from workbench.runs import Run

BASIS = "sae:"
MEASURED = {"l0": "L0", "fvu": "FVU", "recovered": "loss recovered", "dead": "dead"}  # when an SAE was trained
# What reading a file or record that was changed by hand may raise. Loading the SAE, or opening the run, tells why.
_BROKEN = (OSError, KeyError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Place:
    """Where an SAE is, and what its configuration says of it."""

    folder: str
    model: str
    hook: str
    n_latents: int
    transcoder: bool


def where(spec: str) -> dict[str, Place]:
    """The SAEs that a name stands for, by hook point in order of computation; none for a path."""
    found: dict[str, Place] = {}
    for one in (places.behind(spec) or spec).split(","):
        run, _, which = one.partition("/")
        folder = None if one.startswith(texts.PATHS) else places.folder_of(run)
        if not run or folder is None:
            continue
        files = folder / "files"
        for config in [files / CONFIG, *sorted(files.glob(f"*/{CONFIG}"))]:
            place = _read(config)
            if place is not None and which in ("", config.parent.name):
                found[place.hook] = place
    return dict(sorted(found.items(), key=lambda item: sites.depth(item[0])))


def _read(config: Path) -> Place | None:
    try:
        found = json.loads(config.read_text())
        about = found["metadata"]
        hook, model = str(about["hook_name"]), str(about["model_name"])
        sites.depth(hook)
        return Place(str(config.parent), model, hook, int(found["d_sae"]), NAMES[found["architecture"]][1])
    except _BROKEN:
        return None


def known() -> dict[str, dict[str, Place]]:
    """By name and hook point all SAEs that have a name or came of a run here."""
    names = [*places.aliases(), *(name for name in places.names() if name.startswith("train-sae"))]
    return {name: found for name in names if (found := where(name))}


def called(names: Mapping[str, Mapping[str, Place]], spec: str, hook: str) -> tuple[str, str]:
    """Of these names the first for what a name and a hook point stand for, with the hook point; without one, the first
    that it has. Two empty words if there is none."""
    found = where(spec)
    place = found.get(hook) if hook else next(iter(found.values()), None)
    if place is None:
        return "", ""
    others = (name for name, some in names.items() if some.get(place.hook) == place)
    return spec if spec in names else next(others, ""), place.hook


def listing(found: Iterable[Run]) -> list[dict[str, Any]]:
    """A row for each SAE, under a name that is its own if it has one, with what was measured when it was trained."""
    some: dict[str, tuple[str, Place]] = {}
    for name, inside in sorted(known().items(), key=lambda item: len(item[1]) > 1):
        for place in inside.values():
            some.setdefault(place.folder, (name, place))
    trained = {str(run.folder / "files"): run for run in found if run.id.startswith("train-sae")}
    rows = []
    for name, place in sorted(some.values(), key=lambda one: (one[1].model, sites.depth(one[1].hook))):
        path = Path(place.folder)
        run = trained.get(str(path)) or trained.get(str(path.parent))
        told = run.summary.get(place.hook, {}) if run is not None else {}
        told = told if isinstance(told, dict) else {}
        rows.append(
            {"name": name, "model": place.model, "hook point": place.hook, "latents": place.n_latents}
            | {label: told.get(key) for key, label in MEASURED.items()}
        )
    return rows


@dataclass(frozen=True)
class Use:
    """A run that speaks of a latent.

    folder  of the SAE
    how     what the latent is to the run
    """

    folder: str
    latent: int
    run: str
    analysis: str
    how: str


def uses(found: Iterable[Run]) -> list[Use]:
    """Which latents the runs speak of, in their order, by their records alone."""
    known: dict[str, dict[str, Place]] = {}
    some: list[Use] = []
    for run in found:
        try:
            for spec, hook, latent, how in _spoken_of(run.record):
                place = known.setdefault(spec, where(spec)).get(hook)
                if place is not None:
                    some.append(Use(place.folder, int(latent), run.id, str(run.record["key"]["analysis"]), how))
        except _BROKEN:
            continue
    return list(dict.fromkeys(some))


def _spoken_of(record: dict[str, Any]) -> Iterator[tuple[str, str, int, str]]:
    """Name of the SAE, hook point, latent, and what it is to the run."""
    name, given, told = record["key"]["analysis"], record["key"]["parameters"], record["summary"]
    if name == "latents":
        # A run of another version has a summary, and nothing that could be shown.
        if record["key"]["analysis_version"] == registry.get_analysis(name).version:
            for one in told["latents"]:
                yield given["sae"], told["hook"], one["latent"], "looked at"
    elif name == "language-steering":
        recipe = told["recipe"]
        how = f"steers to {recipe['target']}: {recipe['kind']}, strength {recipe['strength']:.3g}"
        yield recipe["sae"], recipe["hook"], recipe["latent"], how
    elif name == "language-hybrid":
        recipe = told["recipe"]
        yield recipe["sae"], recipe["hook"], recipe["latent"], f"holds {recipe['target']} once the prompt is turned"
    elif name == "language-heads":
        yield given["sae"], told["hook"], told["latent"], f"whose heads write and carry it, for {given['target']}"
    elif name == "language-latents":
        for language, rankings in told["top"].items():
            for latent in dict.fromkeys(i for some in rankings.values() for i, _ in some):
                yield given["sae"], told["hook"], latent, f"among the first of a ranking for {language}"
    elif name == "steer":
        yield given["sae"], told["hook"], told["latent"], f"steered, {given['kind']}"
    elif str(given.get("basis", "")).startswith(BASIS):
        nodes = [node for node, _ in told.get("top_features", [])]
        nodes += record["result"].get("graph", {}).get("sources", [])
        for node in nodes:
            hook, _, latent = node.rpartition("/")
            if latent.isdecimal():
                yield given["basis"].removeprefix(BASIS), hook, int(latent), "a node of it"
