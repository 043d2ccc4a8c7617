"""Packages that add tasks, analyses, bases and types of models when they are imported: entry points of the group
`workbench.plugins`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points


@cache
def load() -> None:
    for plugin in entry_points(group="workbench.plugins"):
        plugin.load()
