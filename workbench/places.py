"""Where runs are: on this machine, under WORKBENCH_HOME, and beside them those that come with packages, which may have
names for what is in them."""

from __future__ import annotations

from pathlib import Path

from workbench import plugins, settings

_shipped: list[Path] = []
_aliases: dict[str, str] = {}


def ship(root: Path) -> None:
    """Runs that come with a package, in folders as `runs.run` writes them: found like any that were made here."""
    if root not in _shipped:
        _shipped.append(root)


def alias(name: str, *targets: str) -> None:
    """A name for runs or parts of them. A run whose parameter is such a name is keyed by what it stands for, so that
    it is computed again when a later version of a package gives the name to something else."""
    _aliases[name] = ",".join(targets)


def aliases() -> dict[str, str]:
    """All such names, and what each stands for."""
    plugins.load()
    return dict(sorted(_aliases.items()))


def behind(name: str) -> str | None:
    """What a name stands for, also after the prefix of a basis (`sae:NAME`); None if it is no such name."""
    plugins.load()
    return _aliases.get(name) or _aliases.get(name.partition(":")[2])


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
