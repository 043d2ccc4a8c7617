"""`wb export` and `wb import`: a run in one file, out of this machine and into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from workbench.errors import UserError
from workbench.tables import AsJson, show_as

bundle_cli = typer.Typer()


@bundle_cli.command("export")
def export_run(
    run: Annotated[str, typer.Argument(help="Id of a run: see `wb runs`.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default the id with .zip, here.")] = None,
    as_json: AsJson = False,
) -> None:
    """A run as one zip: its folder, what it needs, and its figure as a page that needs no server."""
    from workbench import bundle, runs

    done = runs.get_run(run)
    path = out or Path(f"{done.id}.zip")
    if path.exists():
        raise UserError(f"{path} is there already; give another name: --out FILE.")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        manifest = bundle.write(done, aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
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
