"""Many runs from one plan: models x tasks x methods x seeds, a run for each combination.

    models: [smollm2-135m, gemma-3-270m]
    tasks: [ioi, induction]
    methods: [attribution-patching, eap, {eap-ig: {steps: 3}}]  # analyses, and parameters
    seeds: [0, 1]
    n: 16

Work is grouped by model, which is loaded once, and inside it by task and seed. What all methods read of the prompts of
one task is computed in one pass before them, once it is known from another task which hook points they read. Groups go
to processes of this machine, or to a Ray cluster, whose nodes share WORKBENCH_HOME.

Nothing is remembered here: what was computed is a run and is found again (`workbench.runs`). So a batch that was killed
is started again with the same plan and goes on where it was, and a worker that was killed is replaced by one that does.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from workbench import activations, registry, runs, settings, sites
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel
from workbench.progress import track
from workbench.prompts import sample
from workbench.runs import Run

log = logging.getLogger(__name__)
ATTEMPTS = 3  # of a group whose worker dies
KEYS = ("models", "tasks", "methods", "seeds", "n", "device", "dtype")


@dataclass(frozen=True)
class Cell:
    """One combination: what `runs.run` takes."""

    model: str
    task: str
    method: str
    seed: int = 0
    n: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str = "float32"

    @property
    def asked(self) -> dict[str, Any]:
        given = {"task": self.task, "n": self.n, "seed": self.seed, "device": self.device, "dtype": self.dtype}
        return given | dict(self.parameters)

    @property
    def size(self) -> int:
        """Prompts."""
        return registry.get_analysis(self.method).n if self.n is None else self.n

    @property
    def pair(self) -> str:
        return f"{self.model}, {self.task}"

    @property
    def way(self) -> str:
        """The method with its parameters."""
        return self.method + "".join(f" {name}={value}" for name, value in self.parameters.items())

    def find(self) -> Run | None:
        return runs.find(self.method, model=self.model, **self.asked)

    def check(self) -> None:
        """Raises UserError for names and parameters that there are not."""
        chosen = registry.get_analysis(self.method)
        if chosen.model is None or chosen.task is None:
            raise UserError(
                f"{self.method} takes no {'model' if chosen.model is None else 'task'}; it is for `wb run`."
            )
        runs.key_of(chosen, self.task, self.n, self.seed, self.parameters, "", "")

    def __str__(self) -> str:
        return f"{self.way} on {self.pair}, seed {self.seed}"


@dataclass(frozen=True)
class Row:
    """What became of a cell: a run, or the sentence that says why not; shared: forward passes before it, for it and
    others of its task and seed."""

    cell: Cell
    run: Run | None = None
    error: str = ""
    shared: int = 0

    def to_json(self) -> dict[str, Any]:
        """`seconds` and `passes` are what the run took to compute, also where it was found."""
        cell = self.cell
        row: dict[str, Any] = {"model": cell.model, "task": cell.task, "method": cell.way, "seed": cell.seed}
        if self.run is None:
            return row | {"error": " ".join(self.error.split())}
        cost = self.run.record["cost"]
        return row | {
            "run": self.run.id,
            "hit": self.run.hit,
            "accuracy": round(self.run.record["task"]["accuracy"], 4),
            "top": _top(self.run.summary),
            "seconds": cost["seconds"],
            "passes": cost["forward_passes"],
            **({"shared_passes": self.shared} if self.shared else {}),
        }


def _top(summary: Mapping[str, Any]) -> list[str]:
    """The three nodes or edges of largest score, where a result has such."""
    some = summary.get("top_heads") or summary.get("top_edges") or summary.get("top_features") or []
    return [str(name) for name, _ in some[:3]]


# ---- plans ----


def read(path: Path) -> list[Cell]:
    """The cells of a plan in a YAML or JSON file, grouped by model, then task and seed.

    Raises UserError at once for what is no plan, and for unknown names and parameters.
    """
    try:
        plan = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(plan, dict):
        raise UserError(f"{path} is no plan; write models, tasks and methods, each with a list of names.")
    return cells(plan)


def cells(plan: Mapping[str, Any]) -> list[Cell]:
    """As `read`, of a plan that is there already."""
    for name in plan:
        if name not in KEYS:
            raise unknown("part of a plan", str(name), KEYS)
    methods = [_method(one) for one in _list(plan, "methods")]
    on = {"n": plan.get("n"), "device": plan.get("device"), "dtype": plan.get("dtype", "float32")}
    seeds = _list(plan, "seeds", [0])
    for what, value in [("n", on["n"]), *(("seeds", seed) for seed in seeds)]:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise UserError(f"{what}={value!r} of the plan is no number; write one, from 0.")
    found = [
        Cell(str(model), str(task), method, seed, parameters=parameters, **on)
        for model, task, seed in itertools.product(_list(plan, "models"), _list(plan, "tasks"), seeds)
        for method, parameters in methods
    ]
    for cell in found:
        cell.check()
    return found


def _list(plan: Mapping[str, Any], name: str, default: Sequence[Any] = ()) -> list[Any]:
    value = plan.get(name, default)
    some = [value] if isinstance(value, str | int) else value
    if not isinstance(some, Sequence) or not some:
        raise UserError(f"the plan has no {name}; write {name}: [...], with at least one.")
    return [one for i, one in enumerate(some) if one not in some[:i]]


def _method(given: Any) -> tuple[str, dict[str, Any]]:
    """A name, or a name with parameters."""
    if isinstance(given, Mapping) and len(given) == 1:
        ((name, parameters),) = given.items()
        if isinstance(parameters, Mapping):
            return str(name), {str(key).replace("-", "_"): value for key, value in parameters.items()}
    if not isinstance(given, str):
        raise UserError(f"{given!r} is no method; write a name, or {{name: {{parameter: value}}}}.")
    return given, {}


# ---- work ----


def compute(some: Sequence[Cell], accept_terms: bool = False, desc: str = "batch") -> Iterator[Row]:
    """Find or compute cell after cell; a model is loaded when its first run is missing, and let go when the next comes.
    A cell that fails is a row with its sentence."""
    loaded: tuple[Cell, LanguageModel | UserError] | None = None
    learned: dict[str, set[str]] = {}
    with track(total=len(some), desc=desc) as bar:
        for group in _grouped(
            some, lambda cell: (cell.model, cell.device, cell.dtype, cell.task, cell.seed, cell.size)
        ):
            missing = [cell for cell in group if _find(cell) is None]
            for cell in group:
                shared = 0
                try:
                    run = cell.find()
                    if run is None:
                        if loaded is None or _home(loaded[0]) != _home(cell):
                            loaded = None  # before the next takes its place in memory
                            loaded = (cell, _load(cell, accept_terms))
                        model = loaded[1]
                        if isinstance(model, UserError):
                            raise model
                        shared = _fill(model, missing, learned)
                        missing = []  # once
                        log.info("%s", cell)
                        run = runs.run(cell.method, model=model, **cell.asked)
                    learned[cell.way] = _read(run)
                    row = Row(cell, run, shared=shared)
                except UserError as error:
                    row = Row(cell, error=str(error))
                except Exception as error:  # a defect of one method must not cost the night's others
                    log.exception("%s failed", cell)
                    row = Row(cell, error=f"{type(error).__name__}: {error}")
                bar.update()
                yield row


def _find(cell: Cell) -> Run | None:
    try:
        return cell.find()
    except UserError:  # which its row will say
        return None


def _read(run: Run) -> set[str]:
    """The hook points whose activations a run took from the store; none where it does not tell."""
    try:
        return {scope.hook for scope in run.activations if not scope.edit}
    except UserError:  # the run is whole for all that: its methods read for themselves
        return set()


def _fill(model: LanguageModel, missing: Sequence[Cell], learned: Mapping[str, set[str]]) -> int:
    """What several methods read of the same prompts, in one pass: known from what they read of other prompts, perhaps
    of another model. How many forward passes that took."""
    known = [learned.get(cell.way) for cell in missing]
    if len(missing) < 2 or not all(known):
        return 0
    hooks = sorted(set().union(*(some for some in known if some)) & set(model.hook_points), key=sites.depth)
    prompts = sample(registry.get_task(missing[0].task), model, missing[0].size, missing[0].seed)
    before = model.forward_passes
    try:
        activations.shared().fill(model, [*prompts.clean, *prompts.corrupted], hooks)
    except UserError as error:  # no room for all of it, say: each method reads for itself, and says what fails
        log.warning("%s", error)
    return model.forward_passes - before


def _home(cell: Cell) -> tuple[str, str | None, str]:
    """What a loaded model is."""
    return cell.model, cell.device, cell.dtype


def _load(cell: Cell, accept_terms: bool) -> LanguageModel | UserError:
    """Tried once: a model that cannot be loaded for one cell cannot be for the next."""
    try:
        return LanguageModel.load(cell.model, device=cell.device, dtype=cell.dtype, accept_terms=accept_terms)
    except UserError as error:
        return error


def groups(some: Sequence[Cell], least: int = 1) -> list[list[Cell]]:
    """Cells of one model together; with fewer models than workers, those of one model, task and seed."""
    by_model = _grouped(some, _home)
    if len(by_model) >= least:
        return by_model
    return _grouped(some, lambda cell: (*_home(cell), cell.task, cell.seed))


def _grouped(some: Sequence[Cell], of: Callable[[Cell], tuple[Any, ...]]) -> list[list[Cell]]:
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in some:
        found.setdefault(of(cell), []).append(cell)
    return list(found.values())


Outcome = list[tuple[bool, str, int]]  # of each cell of a group: was its run there already; why there is none; shared


def work(group: Sequence[Cell], accept_terms: bool = False, threads: int | None = None) -> Outcome:
    """A group, in a worker."""
    if threads is not None:
        torch.set_num_threads(threads)
    return [(row.run is not None and row.run.hit, row.error, row.shared) for row in compute(group, accept_terms)]


def run(
    some: Sequence[Cell], *, workers: int = 1, ray: str | None = None, accept_terms: bool = False
) -> list[Row]:  # fmt: skip
    """A row for each cell, in their order.

    workers  processes of this machine; 1: this one
    ray      address of a Ray cluster whose nodes share WORKBENCH_HOME, `local` for one that is started here, with as
             many workers; needs the extra `cluster`

    Raises UserError where there is no such cluster, or if a group's worker dies again and again.
    """
    if workers < 1:
        raise UserError(f"{workers} workers compute nothing; give at least 1.")
    if ray is None and workers == 1:
        return list(compute(some, accept_terms))
    parts = groups(some, workers)
    spread = _on_ray(parts, ray, workers, accept_terms) if ray else _in_processes(parts, workers, accept_terms)
    outcomes: dict[int, Outcome] = {}
    for at, outcome in track(spread, "batch", total=len(parts)):
        outcomes[at] = outcome
    rows: dict[int, Row] = {}
    for at, group in enumerate(parts):
        for cell, (hit, error, shared) in zip(group, outcomes[at], strict=True):
            found = None if error else cell.find()
            if found is None and not error:
                error = "its run was computed and is not here; does the worker share WORKBENCH_HOME?"
            rows[id(cell)] = Row(cell, None if found is None else replace(found, hit=hit), error, shared)
    return [rows[id(cell)] for cell in some]


def _in_processes(parts: Sequence[list[Cell]], workers: int, accept_terms: bool) -> Iterator[tuple[int, Outcome]]:
    """Groups as they are done. When a worker dies, all groups that are not done are given to new ones."""
    threads = max(1, torch.get_num_threads() // workers)
    left, attempts = set(range(len(parts))), 0
    while left:
        context = multiprocessing.get_context("spawn")  # a fork would share the store's and torch's threads
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = {pool.submit(work, parts[at], accept_terms, threads): at for at in sorted(left)}
            try:
                for future in as_completed(futures):
                    outcome = future.result()
                    left.discard(futures[future])
                    yield futures[future], outcome
            except BrokenProcessPool as error:
                attempts += 1
                log.warning("a worker died; the groups that are not done are started again")
                if attempts >= ATTEMPTS:
                    raise UserError(
                        f"workers died {attempts} times; what they computed is kept. Is there memory for {workers}?"
                    ) from error


def _on_ray(
    parts: Sequence[list[Cell]], address: str, workers: int, accept_terms: bool
) -> Iterator[tuple[int, Outcome]]:  # fmt: skip
    if importlib.util.find_spec("ray") is None:
        raise UserError("Ray is not installed; pip install 'mechinterp-workbench[cluster]', or use --workers.")
    import ray

    env = {name: value for name, value in os.environ.items() if name.startswith("WORKBENCH_")}
    env |= {"WORKBENCH_HOME": str(settings.home()), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    options: dict[str, Any] = {"runtime_env": {"env_vars": env}, "log_to_driver": False, "address": address}
    if address == "local":
        options |= {"num_cpus": workers, "include_dashboard": False}
    else:
        _check_address(address)
    with redirect_stdout(sys.stderr):  # where Ray says what became of its workers
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster answers at {address} ({' '.join(str(error).split())[:200]}).") from error
        try:
            remote = ray.remote(num_cpus=1, max_retries=ATTEMPTS)(work)
            waiting = {remote.remote(group, accept_terms, 1): at for at, group in enumerate(parts)}
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                try:
                    yield waiting.pop(done), ray.get(done)
                except ray.exceptions.WorkerCrashedError as error:
                    raise UserError(f"workers died {ATTEMPTS + 1} times; what they computed is kept.") from error
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself waits for minutes. Raises UserError where nobody listens."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`.") from error
