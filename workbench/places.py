"""Where runs are: on this machine, under WORKBENCH_HOME, and beside them those that come with packages."""

from __future__ import annotations

from pathlib import Path

from workbench import plugins, settings

_shipped: list[Path] = []


def ship(root: Path) -> None:
    """Runs that come with a package, in folders as `runs.run` writes them: found like any that were made here."""
    if root not in _shipped:
        _shipped.append(root)


def roots() -> list[Path]:
    """Folders of runs, that of this machine first."""
    plugins.load()  # they may ship some
    return [root for root in (settings.home() / "runs", *_shipped) if root.is_dir()]


def names() -> list[str]:
    """All runs by id."""
    return sorted({folder.name for root in roots() for folder in root.glob("[!.]*")})


def folder_of(id: str) -> Path | None:
    """The folder of a run, if there is such a run."""
    return next((root / id for root in roots() if (root / id).is_dir()), None)
