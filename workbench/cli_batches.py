"""`wb batch`."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from workbench.tables import Accept, AsJson, show_as

batch_cli = typer.Typer()


@batch_cli.command("batch")
def run_batch(
    plan: Annotated[Path, typer.Argument(help="YAML or JSON file: models, tasks, methods, seeds, n.")],
    workers: Annotated[int, typer.Option(help="Processes of this machine, or of a Ray that is started here.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster that shares WORKBENCH_HOME; local.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of table and figure; default WORKBENCH_HOME/batches.")
    ] = None,
    accept_terms: Accept = False,
    as_json: AsJson = False,
) -> None:
    """Every model, task, method and seed of a plan. Started again, it goes on where it was.

    Exit status 1 says that something failed.
    """
    from workbench import batch, settings
    from workbench.batch_result import Batch

    cells = batch.read(plan)
    done = Batch.of(batch.run(cells, workers=workers, ray=ray, accept_terms=accept_terms))
    digest = hashlib.blake2b("\n".join(map(repr, cells)).encode(), digest_size=6).hexdigest()
    folder = (out or settings.home() / "batches" / f"{plan.stem}-{digest}").expanduser()  # another plan's stays
    done.save(folder)
    told = done.summary() | {"rows": done.rows, "folder": str(folder)}
    show_as(as_json, told, lambda: f"{done.text()}\ntable and figure in {folder}")
    if told["failed"]:
        sys.exit(1)
