"""`wb export` and `wb import`: a run in one file, out of this machine and into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from workbench.errors import UserError
from workbench.tables import AsJson, show_as

bundle_cli = typer.Typer()


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write; in place once all is written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@bundle_cli.command("export")
def export_run(
    run: Annotated[str, typer.Argument(help="Id of a run: see `wb runs`.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default the id with .zip or .py, here.")] = None,
    as_program: Annotated[
        bool,
        typer.Option("--program", help="Of a steering recipe: one file of Python that steers, and needs torch alone."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """A run as one zip: its folder, what it needs, and its figure as a page that needs no server."""
    from workbench import bundle, runs, standalone

    done = runs.get_run(run)
    path = out or Path(f"{done.id}{'.py' if as_program else '.zip'}")
    if path.exists():
        raise UserError(f"{path} is there already; give another name: --out FILE.")
    if as_program:
        with _whole(path) as aside:
            aside.write_text(standalone.program(done.result, done))
        show_as(as_json, {"file": str(path), "bytes": path.stat().st_size}, lambda: str(path))
        return
    with _whole(path) as aside:
        manifest = bundle.write(done, aside)
    size, files = path.stat().st_size, len(manifest["files"])

    def text() -> str:
        left_out = [f"  without {name[:200]}: {why}" for name, why in manifest["left_out"].items()]
        return "\n".join([f"{path}  {size / 1e6:,.1f} MB, {files} files", *left_out])

    show_as(as_json, {"file": str(path), "bytes": size, "manifest": manifest}, text)


@bundle_cli.command("import")
def import_bundle(
    file: Annotated[Path, typer.Argument(help="What `wb export` wrote.")], as_json: AsJson = False
) -> None:
    """Check a bundle and put its run among those of this machine. One that is here already stays as it is."""
    from workbench import bundle

    run = bundle.read(file)
    origin, notes = bundle.origin(run), bundle.notes(run)
    when = "was here already" if origin is None else f"imported {origin['imported']}"
    value = {"run": run.id, "folder": str(run.folder), "imported": origin, "notes": notes}
    show_as(as_json, value, lambda: "\n".join([f"{run.id}  {when}", *(f"  {note}" for note in notes)]))
