"""Tasks and analyses by name.

`@task("ioi", metric="logit_diff")` registers a function from a random generator to a `Prompt`. `@analysis("patching")`
registers a function (model, batch, store, *, parameters) -> result. Its keyword-only parameters with defaults *are* its
configuration: from the signature come the command-line flags, the app's form, the run's key and the error messages,
and from the docstring ("name   what it does") their help. What it takes before them is found by name, any of

    model, batch, store   the model, prompts of the task, and activations
    seed, device          those of the run
    folder                where to leave files that belong to the result; a run that was killed finds it as it was

One that takes no model makes one, or looks at none; one that takes no batch has no task.

Tasks are the modules of `workbench.tasks`; packages add more of both through the entry-point group `workbench.plugins`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from workbench import plugins, pretrained
from workbench.errors import UserError, unknown
from workbench.metrics import METRICS
from workbench.prompts import Prompt, Task

F = TypeVar("F", bound=Callable[..., Any])
Prose = Annotated[str, "prose"]  # of a parameter: a text that is kept as it is, and names no file, model or analysis


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: Any  # int, float, bool, str, Prose, a Literal, or one of these or None
    default: Any
    help: str


@dataclass(frozen=True)
class Analysis:
    name: str
    version: int
    n: int  # how many prompts, unless told otherwise
    fn: Callable[..., Any]
    parameters: dict[str, Parameter]
    result: type
    about: str
    takes: tuple[str, ...]
    model: str | None  # unless told otherwise; None where it takes none
    task: str | None


TAKEN = ("model", "batch", "store", "seed", "device", "folder")
_tasks: dict[str, Task] = {}
_analyses: dict[str, Analysis] = {}


def task(name: str, *, metric: str, version: int = 1) -> Callable[[F], F]:
    def register(fn: F) -> F:
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        draw: Callable[[Random], Prompt] = fn
        _add(_tasks, name, Task(name, version, metric, draw, _first_line(fn)), fn)
        return fn

    return register


def analysis(
    name: str, *, version: int = 1, n: int = 32, model: str = pretrained.DEFAULT, task: str = "ioi"
) -> Callable[[F], F]:
    """n, model, task  what it runs on unless told otherwise"""

    def register(fn: F) -> F:
        hints = get_type_hints(fn, include_extras=True)
        if not isinstance(hints.get("return"), type):
            raise TypeError(f"analysis {name!r} must declare the class of its result")
        doc = inspect.getdoc(fn) or ""
        found, takes = {}, []
        for parameter in inspect.signature(fn).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                if parameter.default is inspect.Parameter.empty:
                    raise TypeError(f"parameter {parameter.name!r} of analysis {name!r} needs a default")
                line = re.search(rf"^\s*{parameter.name}\s{{2,}}(.+)$", doc, re.M)
                found[parameter.name] = Parameter(
                    parameter.name, hints[parameter.name], parameter.default, line[1] if line else ""
                )
            elif parameter.name in TAKEN:
                takes.append(parameter.name)
            else:
                raise TypeError(f"analysis {name!r} takes {parameter.name!r}; it can take {', '.join(TAKEN)}")
        on = model if "model" in takes else None, task if "batch" in takes else None
        entry = Analysis(name, version, n, fn, found, hints["return"], _first_line(fn), tuple(takes), *on)
        _add(_analyses, name, entry, fn)
        return fn

    return register


def tasks() -> dict[str, Task]:
    _load()
    return dict(sorted(_tasks.items()))


def analyses() -> dict[str, Analysis]:
    _load()
    return dict(sorted(_analyses.items()))


def get_task(name: str) -> Task:
    if name not in tasks():
        raise unknown("task", name, _tasks)
    return _tasks[name]


def get_analysis(name: str) -> Analysis:
    if name not in analyses():
        raise unknown("analysis", name, _analyses)
    return _analyses[name]


def bind(analysis: Analysis, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter of an analysis: the given values, read from text where they are text, and the defaults.

    Raises UserError for an unknown name or a value of the wrong kind.
    """
    for name in given:
        if name not in analysis.parameters:
            raise unknown(f"parameter of {analysis.name}", name, analysis.parameters)
    return {
        name: _read(parameter, given[name]) if name in given else parameter.default
        for name, parameter in analysis.parameters.items()
    }


def kind_name(kind: Any) -> str:
    """`int`, `float`, `one of a, b`: for help and error messages."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(kind_name(k) for k in get_args(kind))
    return {type(None): "none", Prose: "text"}.get(kind) or str(kind.__name__)


def choices(kind: Any) -> list[Any]:
    """The values that a kind names one by one; none where it does not."""
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def _read(parameter: Parameter, value: Any) -> Any:
    kinds = get_args(parameter.kind) if get_origin(parameter.kind) in (Union, types.UnionType) else (parameter.kind,)
    for kind in kinds:
        try:
            return _read_as(kind, value)
        except (ValueError, TypeError):
            continue
    raise UserError(
        f"{parameter.name}={value!r} is not {kind_name(parameter.kind)}; the default is {parameter.default!r}."
    )


def _read_as(kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        for option in get_args(kind):
            if str(option) == str(value):
                return option
        raise ValueError
    if kind is type(None):
        if value is None or str(value).lower() == "none":
            return None
        raise ValueError
    if kind is bool:
        words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        return words[str(value).lower()] if str(value).lower() in words else _fail()
    if kind is int and isinstance(value, float) and value != int(value):
        raise ValueError
    return kind(value)


def _fail() -> Any:
    raise ValueError


def _add(table: dict[str, Any], name: str, entry: Any, fn: Callable[..., Any]) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ValueError(f"{name!r} is not a name; use lower-case letters, digits, - and _.")
    taken = table.get(name)
    if taken is not None and (getattr(taken, "fn", None) or taken.draw).__module__ != fn.__module__:
        raise ValueError(f"{name!r} is registered twice")
    table[name] = entry


def _first_line(fn: Callable[..., Any]) -> str:
    return (inspect.getdoc(fn) or "").split("\n\n")[0].replace("\n", " ")


@cache
def _load() -> None:
    package = importlib.import_module("workbench.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"workbench.tasks.{module.name}")
    plugins.load()
