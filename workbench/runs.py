"""Runs: recorded executions of an analysis on a model and a task.

A run is keyed by everything that decides its result: the analysis and its version and parameters, the versions of other
analyses and tasks, the weights of other models, texts, files and folders, that those name; the model's weights and
numerics, the task and its version, how many prompts, and the seed; without what the analysis does not take. Asking
again with the same key computes nothing.
A run's folder holds `record.json` (key, result, task figures, environment, cost), `arrays.safetensors`, the digests
of the stored activations it used (`activations.safetensors`), and in `files` what else belongs to the result; it is
written aside and renamed last, so a folder that exists is whole.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from workbench import activations, parts, places, pretrained, registry, results, settings, texts
from workbench.activations import ActivationStore, inventory
from workbench.activations.keys import Scope
from workbench.errors import UserError, unknown
from workbench.metrics import top1
from workbench.models import LanguageModel, numerics
from workbench.prompts import Batch, sample
from workbench.spread import SPREAD

log = logging.getLogger(__name__)
RECORD_VERSION = 1
FILES = "files"
_RECORD = ("key", "model_name", "command", "created", "task", "summary", "cost", "environment", "result")


@dataclass(frozen=True)
class Run:
    """A finished run. `hit` tells whether it was there already; seconds and forward passes are those of *this* call."""

    id: str
    folder: Path
    record: dict[str, Any] = field(repr=False)
    hit: bool
    seconds: float
    forward_passes: int

    @cached_property
    def result(self) -> Any:
        """The result object, an instance of the analysis' declared class."""
        try:
            arrays = load_file(self.folder / "arrays.safetensors")
            declared = registry.get_analysis(self.record["key"]["analysis"]).result
            return results.decode(declared, self.record["result"], arrays)
        except UserError:  # of an analysis that is not known here: nothing is damaged
            raise
        # What reading a record that was changed by hand may raise.
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
            raise UserError(self._unreadable(error)) from error

    def _unreadable(self, error: Exception) -> str:
        key = self.record["key"]
        known, written = registry.analyses().get(key.get("analysis")), key.get("analysis_version")
        if known is not None and written != known.version:
            return (
                f"run {self.id} is of version {written} of {known.name}, and version {known.version} cannot read its "
                "result: the summary stands; run it again for the rest."
            )
        return f"run {self.id} is damaged ({error}); delete {self.folder} and run it again."

    @property
    def files(self) -> Path:
        """What the analysis left beside its result: a model that was trained."""
        return self.folder / FILES

    @property
    def activations(self) -> dict[Scope, set[bytes]]:
        """The stored activations that the run used: digests of sequences by scope."""
        try:
            sequences = load_file(self.folder / "activations.safetensors")
            return inventory.unpack_used(self.record["activations"], sequences)
        except (OSError, SafetensorError, LookupError, TypeError) as error:
            raise UserError(f"run {self.id} does not tell which activations it used ({error}).") from error

    @property
    def summary(self) -> dict[str, Any]:
        """The headline numbers."""
        summary: dict[str, Any] = self.record["summary"]
        return summary

    def _ipython_display_(self) -> None:
        """Draws itself where a cell ends with it."""
        from workbench import jupyter, tables

        key, task = self.record["key"], self.record["task"] or {}
        on = [self.record["model_name"], *([f"{key['task']}, {key['n']} prompts"] if "task" in key else [])]
        how = "found" if self.hit else f"computed in {self.seconds:.1f} s, {self.forward_passes} forward passes"
        told = {"run": f"{self.id}, {how}", "accuracy": task.get("accuracy")} | {
            name: value for name, value in self.summary.items() if isinstance(value, str | int | float)
        }
        said = {name: value for name, value in told.items() if value is not None and name != "definition"}
        jupyter.show(" · ".join([key["analysis"], *filter(None, on)]), tables.flat(said), lambda: self.result)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.id,
            "hit": self.hit,
            "seconds": round(self.seconds, 3),
            "forward_passes": self.forward_passes,
            "key": self.record["key"],
            "task": self.record["task"],
            "result": self.summary,
            "computed_in": self.record["cost"],
            "folder": str(self.folder),
        }


def run(
    analysis: str,
    *,
    model: str | LanguageModel | None = None,
    task: str | None = None,
    n: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "float32",
    accept_terms: bool = False,
    store: ActivationStore | None = None,
    **parameters: Any,
) -> Run:
    """Run an analysis, or find that it was run before.

    model, task, n  None: the analysis' own

    Raises UserError for unknown names and parameters, for a model or task that the analysis does not take, and for
    whatever the model, task or store refuse.
    """
    started = time.perf_counter()
    chosen = registry.get_analysis(analysis)
    model, task = model or chosen.model, task or chosen.task
    look = partial(find, analysis, task=task, n=n, seed=seed, device=device, dtype=dtype, **parameters)
    found = look(model=model)
    if found is None and isinstance(model, str):
        model = LanguageModel.load(model, device=device, dtype=dtype, accept_terms=accept_terms)
        found = look(model=model)
    if found is not None:
        return replace(found, seconds=time.perf_counter() - started)
    assert not isinstance(model, str)
    on, how = (model.fingerprint, model.numerics) if model else ("", numerics(dtype, device or settings.device()))
    key = key_of(chosen, task, n, seed, parameters, on, how)
    id, bound = _id(key), key["parameters"]
    root = settings.home() / "runs"
    settings.writable_folder(root)
    passes = model.forward_passes if model else 0
    store = (store or activations.shared()).session()  # counts and entries of this run alone
    given: dict[str, Any] = {"model": model, "store": store, "seed": seed, "device": device or settings.device()}
    figures: dict[str, Any] = {}
    if model is not None and task is not None:
        given["batch"] = sample(registry.get_task(task), model, key["n"], seed)
        figures = task_figures(model, given["batch"], store)
        log.info("%s on %s, %d %s prompts", analysis, model.name, key["n"], task)
    with parts.kept_in(settings.home() / "parts" / id) as before:
        given["folder"] = before.folder / FILES
        result = chosen.fn(**{name: given[name] for name in chosen.takes}, **bound)
        seconds = time.perf_counter() - started
        passes = model.forward_passes - passes if model else 0
        encoded, arrays = results.encode(result)
        used, sequences = inventory.pack_used(store.used or {})
        # A run that was stopped cost what all its attempts did.
        cost = {"seconds": round(before.earlier + seconds, 3), "forward_passes": passes, "store": asdict(store.stats())}
        record = {
            "id": id,
            "key": key,
            "model_name": model.name if model else "",
            "command": command(key, model, dtype, given["device"]),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "task": figures,
            "summary": result.summary(),
            "cost": cost | ({"parts_of_earlier_attempts": before.found} if before.found else {}),
            "environment": environment(model),
            "activations": used,
            "result": encoded,
        }
        _save(root / id, record, {"arrays": arrays, "activations": sequences}, given["folder"])
    store.note_run(id)
    return Run(id, root / id, record, False, seconds, passes)


def find(
    analysis: str,
    *,
    model: str | LanguageModel | None = None,
    task: str | None = None,
    n: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "float32",
    **parameters: Any,
) -> Run | None:
    """The run, if it is there already. A named model is not loaded for it, so one that must be fetched is not found.

    Raises UserError for unknown names and parameters, and for a model or task that the analysis does not take.
    """
    chosen = registry.get_analysis(analysis)
    model, task = model or chosen.model, task or chosen.task
    for what, value, taken in (("model", model, chosen.model), ("task", task, chosen.task), ("n", n, chosen.task)):
        if value is not None and taken is None:
            raise UserError(f"{analysis} takes no {what}; leave {what}={_named(value)} out.")
    fingerprint: str | None = ""
    if isinstance(model, LanguageModel):
        fingerprint, how = model.fingerprint, model.numerics
    else:
        fingerprint = "" if model is None else pretrained.fingerprint(model)
        how = numerics(dtype, device or settings.device())
    key = key_of(chosen, task, n, seed, parameters, fingerprint or "", how)
    folder = places.folder_of(_id(key))
    if fingerprint is None or folder is None:
        return None
    return Run(folder.name, folder, _read(folder), True, 0.0, 0)


def _named(value: Any) -> str:
    return value.name if isinstance(value, LanguageModel) else str(value)


def key_of(
    chosen: registry.Analysis,
    task: str | None,
    n: int | None,
    seed: int,
    parameters: Mapping[str, Any],
    fingerprint: str,
    how: str,
) -> dict[str, Any]:
    """Everything that decides the result. Raises UserError for unknown names and parameters."""
    bound = registry.bind(chosen, parameters)
    key = {
        "analysis": chosen.name,
        "analysis_version": chosen.version,
        "parameters": bound,
        "numerics": how,
        "seed": seed,
        "record_version": RECORD_VERSION,
    }
    if chosen.model is not None:
        key |= {"model": fingerprint}
    if task is not None:
        n = chosen.n if n is None else n
        if n < 1:
            raise UserError(f"n={n} prompts cannot be drawn; ask for at least 1.")
        key |= {"task": task, "task_version": registry.get_task(task).version, "n": n}
    # What a parameter names (another analysis, another task) decides the result as much as the analysis itself.
    names = [x for name, x in bound.items() if chosen.parameters[name].kind != registry.Prose]
    named = {word.strip() for value in names if isinstance(value, str) for word in value.split(",")}
    known = registry.analyses() | registry.tasks()
    versions = {name: known[name].version for name in sorted(named & known.keys())}
    models = {name: pretrained.fingerprint(name) for name in sorted(named - known.keys() - {""})}
    models = {name: digest for name, digest in models.items() if digest is not None}
    others = sorted(named - known.keys() - {""})
    found = {name: digest for name in others if (digest := content(name)) is not None}
    more = {"versions": versions, "models": models, "contents": found}
    return key | {name: value for name, value in more.items() if value}


def content(name: str) -> str | None:
    """What decides a result by a name: what it stands for, or the digest of its file; None for any other word."""
    return places.behind(name) or texts.digest(name)


def task_figures(model: LanguageModel, batch: Batch, store: ActivationStore) -> dict[str, Any]:
    """How well the model does the task, from the stored last residual stream: no result is read without it.

    accuracy: share of prompts whose metric is above 0; top1: the right answer is the likeliest token of all.
    """
    last = model.hook_points[-1]
    figures: dict[str, Any] = {"n": len(batch), "drawn": batch.drawn, "metric": batch.task.metric}
    for side, sequences in (("clean", batch.clean), ("corrupted", batch.corrupted)):
        resid = torch.stack([x[-1] for x in store.get(model, sequences, [last])[last]])
        logits = model.unembed(resid, torch.stack([x[-1] for x in sequences])).cpu()
        score = batch.score(logits)
        figures[f"{side}_mean"] = float(score.mean())
        figures[f"{side}_std"] = float(score.std(correction=0))
        if side == "clean":
            figures["accuracy"] = float((score > 0).double().mean())
            figures["top1"] = float(top1(logits, batch.answers).double().mean())
    example = batch.prompts[0]
    figures["example"] = {
        "clean": example.clean,
        "corrupted": example.corrupted,
        "answers": model.token_strings(batch.answers[0].tolist()),
        "wrong": model.token_strings(batch.wrong[0].tolist()),
    }
    return figures


def all_runs() -> tuple[list[Run], list[str]]:
    """Every readable run, newest first, and a sentence for each folder that cannot be read."""
    found, sentences = [], []
    for name in places.names():
        try:
            found.append(get_run(name))
        except UserError as error:
            sentences.append(str(error))
    return sorted(found, key=lambda run: str(run.record["created"]), reverse=True), sorted(sentences)


def get_run(id: str) -> Run:
    """A run by id. Raises UserError for an unknown id or a damaged folder."""
    folder = places.folder_of(id) if re.fullmatch(r"[a-z0-9_-]{1,200}", id) else None
    if folder is None:
        raise unknown("run", id[:200], places.names())
    return Run(id, folder, _read(folder), True, 0.0, 0)


def named(id: str, model: LanguageModel, what: str, analysis: str = "") -> Run:
    """The run that another is about.

    what      which runs will do, for whoever named none
    analysis  the only one that will do, if there is only one

    Raises UserError if none is named, and for a run of another analysis or of other weights.
    """
    if not id:
        raise UserError(f"no run is named; give the id of one {what}.")
    run = get_run(id)
    key = run.record["key"]
    if analysis and key["analysis"] != analysis:
        raise UserError(f"{id} is of {key['analysis']}; give the id of a run of {analysis}.")
    if key.get("model") != model.fingerprint:
        raise UserError(
            f"{id} is of {run.record['model_name']} with other weights than {model.name}; go on with it there."
        )
    return run


def command(key: Mapping[str, Any], model: LanguageModel | None, dtype: str, device: str) -> str:
    """The command line that reproduces a run; parameters at their defaults are left out."""
    defaults = registry.get_analysis(key["analysis"]).parameters
    words = ["wb", "run", key["analysis"]]
    if model is not None:
        words += ["--model", model.name]
        dtype, device = str(model.dtype).removeprefix("torch."), SPREAD if model.spread else str(model.device)
    words += ["--task", key["task"], "--n", str(key["n"])] if "task" in key else []
    words += ["--seed", str(key["seed"])]
    words += ["--dtype", dtype] if dtype != "float32" else []
    words += ["--device", device] if device != "cpu" else []
    for name, value in key["parameters"].items():
        if value != defaults[name].default:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def environment(model: LanguageModel | None = None) -> dict[str, Any]:
    """What a number may depend on beyond its key."""
    names = ("mechinterp-workbench", "torch", "transformers", "numpy")
    found: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if model is not None:
        found |= {"device": SPREAD if model.spread else str(model.device), "numerics": model.numerics}
        if model.device.type == "cuda":
            found["gpu"] = torch.cuda.get_device_name(model.device)
    return found


def _id(key: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=6).hexdigest()
    return "-".join([key["analysis"], *([key["task"]] if "task" in key else []), digest])


def _read(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / "record.json").read_text())
        version = record["key"]["record_version"]
        missing = [name for name in _RECORD if name not in record]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"run {folder.name} is damaged ({error}); delete {folder} and run it again.") from error
    if version != RECORD_VERSION:
        raise UserError(f"run {folder.name} was written in format {version}; this version reads {RECORD_VERSION}.")
    if missing:
        raise UserError(f"run {folder.name} is damaged (no {missing[0]!r}); delete {folder} and run it again.")
    return record


def _save(
    folder: Path,
    record: Mapping[str, Any],
    files: Mapping[str, dict[str, torch.Tensor]],
    more: Path | None = None,
) -> None:
    with whole(folder) as aside:
        if more is not None and more.is_dir():
            shutil.copytree(more, aside / FILES)
        for name, arrays in files.items():
            save_file(arrays, aside / f"{name}.safetensors")
        (aside / "record.json").write_text(json.dumps(record, indent=1))


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write in, renamed to `folder` at the end: what exists is whole. One that is there already stays.

    Raises UserError if it cannot be written.
    """
    settings.writable_folder(folder.parent)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        yield aside
        os.chmod(aside, 0o755)
        if not folder.is_dir():  # another process may have finished the same; what it wrote stays
            os.rename(aside, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} could not be saved ({error}); free space and run it again.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
