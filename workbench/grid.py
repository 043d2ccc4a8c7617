"""The circuits of many models, tasks and methods: one run of the analysis `extract` for each combination.

Nothing is remembered here. What was computed is a run and is found again (`workbench.runs`), a circuit's folder exists
when it is whole: so a grid that was killed is started again with the same words, and goes on where it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from workbench import batch, registry, runs, settings
from workbench.batch import Cell
from workbench.errors import UserError
from workbench.runs import Run
from workbench.tables import table

ANALYSIS = "extract"  # its result has `save(folder)`


@dataclass(frozen=True)
class Row:
    """What became of one combination: a run and the folder of its circuit, or the sentence that says why not."""

    model: str
    task: str
    method: str
    run: Run | None = None
    folder: Path | None = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """`seconds` and `passes` are what the circuit took to compute, also where it was found."""
        row = {"model": self.model, "task": self.task, "method": self.method}
        if self.run is None:
            return row | {"error": " ".join(self.error.split())}
        names = ("size", "level", "n_edges", "n_nodes", "faithfulness", "faithfulness_95", "ablation")
        cost = self.run.record["cost"]
        return row | {
            **{name: self.run.summary[name] for name in names},
            "accuracy": round(self.run.record["task"]["accuracy"], 4),
            "seconds": cost["seconds"],
            "passes": cost["forward_passes"],
            "hit": self.run.hit,
            "run": self.run.id,
            "folder": str(self.folder),
        }


def read(path: Path) -> dict[str, Any]:
    """The options in a JSON file, by the names of parameters; lists of names as the command line writes them.

    Raises UserError if the file holds no JSON object.
    """
    try:
        job = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}).") from error
    if not isinstance(job, dict):
        raise UserError(f'{path} is not a JSON object; write {{"models": ["smollm2-135m"], "tasks": ["ioi"]}}.')
    return {
        name.replace("-", "_"): ",".join(map(str, value)) if isinstance(value, list) else value
        for name, value in job.items()
    }


def names(option: str, text: str) -> list[str]:
    """`a, b` as a list without repetitions. Raises UserError if it is empty."""
    found = [*dict.fromkeys(word.strip() for word in text.split(",") if word.strip())]
    if not found:
        raise UserError(f"{option} is empty; give one or more names, separated by commas.")
    return found


def circuits(
    models: Sequence[str],
    tasks: Sequence[str],
    methods: Sequence[str],
    *,
    out: Path | None = None,
    n: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "float32",
    accept_terms: bool = False,
    **parameters: Any,
) -> Iterator[Row]:
    """Find or compute each combination, model after model; a model is loaded when its first circuit is missing.

    out         where each circuit gets a folder of its own: `circuits` in WORKBENCH_HOME, unless told otherwise
    parameters  of the analysis, beside its method

    Raises UserError at once for unknown names and parameters. A combination that fails is a row with its sentence.
    """
    if "method" in parameters:
        raise UserError("there is a grid of methods here, not one method; write --methods.")
    cells = [
        Cell(model, task, ANALYSIS, seed, n, {"method": method, **parameters}, device, dtype)
        for model, task, method in product(models, tasks, methods)
    ]
    for cell in cells:
        registry.get_analysis(str(cell.parameters["method"]))
        cell.check()
    root = (out or settings.home() / "circuits").expanduser().resolve()
    settings.writable_folder(root)
    for row in batch.compute(cells, accept_terms, "circuits"):
        cell, method = row.cell, str(row.cell.parameters["method"])
        run, folder, error = row.run, None, row.error
        try:
            folder = None if run is None else _saved(run, root, cell.model, method)
        except UserError as problem:
            run, error = None, str(problem)
        yield Row(cell.model, cell.task, method, run, folder, error)


def _saved(run: Run, root: Path, model: str, method: str) -> Path:
    """The folder of the run's circuit, written unless it is there."""
    digest = run.id.rpartition("-")[2]
    name = re.sub(r"[^\w.-]", "-", Path(model).name)
    folder = root / f"{name}-{run.record['key']['task']}-{method}-{digest}"
    if not folder.is_dir():
        with runs.whole(folder) as aside:
            run.result.save(aside)
    return folder


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table, the sentences of those that failed, and where the circuits are."""
    head = ("model", "task", "method", "size", "", "faithful", "95 %", "ablation", "accuracy", "seconds", "")
    cells, below = [], []
    for row in rows:
        start = [row["model"], row["task"], row["method"]]
        if "error" in row:
            cells.append([*start, *[""] * 7, "failed"])
            below.append(f"{', '.join(start)}: {row['error']}")
            continue
        low, high = row["faithfulness_95"]
        f = f"{row['faithfulness']:.3f}"
        cost = [f"{row['seconds']:.1f}", "found" if row["hit"] else "computed"]
        accuracy = f"{row['accuracy']:.2f}"
        cells.append(
            [*start, row["size"], row["level"], f, f"{low:.2f} to {high:.2f}", row["ablation"], accuracy, *cost]
        )
    folders = sorted({str(Path(row["folder"]).parent) for row in rows if "folder" in row})
    return "\n".join([table(head, cells), *below, *(f"circuits in {folder}" for folder in folders)])
