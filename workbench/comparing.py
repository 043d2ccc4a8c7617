"""What differs between two runs: what decides their results, what these may also depend on, and every number of both.

One of the two, a, is the baseline: every difference is b minus a. Intervals are of the difference, hold 95 %, and are
given where a record holds what they need:

    scores per prompt, of the same prompts      paired t, of each node or edge by itself
    metric of the task, of independent prompts  Welch 1947, from means, standard deviations and numbers of prompts
    shares of independent prompts               Newcombe 1998, method 10, from the Wilson intervals of both

A record keeps the task's figures and not what each prompt gave. So where the two share prompts there is no interval of
the difference of figures: what it would take is not there. The same holds for the numbers of a summary.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.runs import Run

LEVEL = 0.95
ABSENT = "(none)"  # what a record does not have at all, unlike a value None
Ends = tuple[float | None, float | None]  # of an interval
NO_ENDS: Ends = (None, None)


class Row(NamedTuple):
    """One thing that both runs may have, of a part of the comparison; low and high hold 95 % of the difference.

    how  the interval's method, or why there is none
    """

    part: str
    name: str
    a: float | str | None
    b: float | str | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    how: str = ""


# ---- what decides the result ----


class Differences(NamedTuple):
    same: dict[str, str]
    different: list[tuple[str, str, str]]  # name, in a, in b


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Differences:
    """Of two nested records, by the path of each value; a list is one value."""
    left, right = dict(_flat(a)), dict(_flat(b))
    names = dict.fromkeys([*left, *right])
    shown = {name: (_text(left, name), _text(right, name)) for name in names}
    # Compared as JSON: 1 and True, or 1 and "1", are different values.
    alike = {n for n in names if n in left and n in right and json.dumps(left[n]) == json.dumps(right[n])}
    return Differences(
        {name: one for name, (one, _) in shown.items() if name in alike},
        [(name, *both) for name, both in shown.items() if name not in alike],
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name, ABSENT)
    return value if isinstance(value, str) else json.dumps(value)


def cautions(a: Run, b: Run) -> list[str]:
    """What besides its subject a difference may come from, a sentence for each."""
    if a.id == b.id:
        return ["Both are the same run."]
    one, other = a.record["key"], b.record["key"]
    found = []
    if one["analysis"] == other["analysis"] and one.get("analysis_version") != other.get("analysis_version"):
        versions = f"{one.get('analysis_version')} and {other.get('analysis_version')}"
        found.append(f"The code of {one['analysis']} changed between the two, which are of its versions {versions}.")
    if one.get("numerics") != other.get("numerics"):
        found.append(f"The numerics differ, {one.get('numerics')} and {other.get('numerics')}: part may be rounding.")
    code = differences(a.record["environment"].get("versions", {}), b.record["environment"].get("versions", {}))
    if code.different:
        words = ", ".join(f"{name} {old} and {new}" for name, old, new in code.different)
        found.append(f"They were computed by other versions of the code: {words}.")
    if one.get("model") != other.get("model"):
        found.append(
            f"They are of other weights, {a.record['model_name'] or ABSENT} and {b.record['model_name'] or ABSENT}: "
            "parts of the same name need not do the same."
        )
    return found


# ---- which prompts ----


class Prompts(NamedTuple):
    """How many prompts two runs share; why: in words, to be read after the number or the lack of one."""

    shared: Literal["all", "some", "none", "unknown"]
    why: str


def prompts(a: Run, b: Run) -> Prompts:
    """They are drawn one after the other from task and seed; those that a tokenizer has no use for are drawn again."""
    one, other = a.record["key"], b.record["key"]
    if "task" not in one or "task" not in other:
        return Prompts("unknown", "one of the two has no task, so no prompts of one")
    if one["task"] != other["task"]:
        return Prompts("none", "prompts of two tasks")
    if one.get("task_version") != other.get("task_version"):
        return Prompts("unknown", "the task was changed between the two, and may give some prompts again")
    if one["seed"] != other["seed"]:
        return Prompts("none", "prompts of two seeds")
    redrawn = any(run.record["task"].get("drawn") != run.record["key"]["n"] for run in (a, b))
    if one.get("model") != other.get("model") and redrawn:
        return Prompts("unknown", "some prompts were drawn again, which depends on the model's tokenizer")
    if one["n"] != other["n"]:
        return Prompts("some", f"the first {min(one['n'], other['n'])} prompts are of both")
    return Prompts("all", "the same prompts")


# ---- numbers ----


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a summary by its path: `table eap heads_f`, `faithfulness_95[0]`, `top_heads a5.h1`."""
    return dict(_numbers(summary, ""))


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield path, float(value)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{path} {name}".strip())
    elif isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        yield from _numbers(value[1], f"{path} {value[0]}")
    elif isinstance(value, list) and value and isinstance(value[0], str):
        yield from _numbers(value[1:], f"{path} {value[0]}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            named = isinstance(item, list) and bool(item) and isinstance(item[0], str)
            yield from _numbers(item, path if named else f"{path}[{i}]")


def headline(a: Run, b: Run) -> list[Row]:
    """The numbers of both summaries, those that one alone has last."""
    left, right = numbers(a.summary), numbers(b.summary)
    names = dict.fromkeys([*left, *right])
    rows = [Row("headline", n, left.get(n), right.get(n), _less(left.get(n), right.get(n))) for n in names]
    return sorted(rows, key=lambda row: row.a is None or row.b is None)


def task_figures(a: Run, b: Run) -> list[Row]:
    """How well the models do the tasks: shares of prompts, and the metric's means; nothing where one has no task."""
    one, other = a.record["task"], b.record["task"]
    if "task" not in a.record["key"] or "task" not in b.record["key"]:
        return []
    shared = prompts(a, b)
    alone = f"no interval: {shared.why}, and a record does not keep what each gave"
    rows = []
    for name in ("accuracy", "top1"):
        x, y = float(one[name]), float(other[name])
        ends, how = NO_ENDS, alone
        if shared.shared == "none":
            ends, how = newcombe(x, int(one["n"]), y, int(other["n"])), f"Newcombe, {shared.why}"
        rows.append(Row("task", name, x, y, y - x, *ends, how))
    units = str(one["metric"]), str(other["metric"])
    for side in ("clean", "corrupted"):
        (x, s, n), (y, t, m) = (
            (float(figures[f"{side}_mean"]), float(figures[f"{side}_std"]), int(figures["n"]))
            for figures in (one, other)
        )
        if units[0] != units[1]:
            how = f"no difference: {units[0]} and {units[1]} are different metrics"
            rows.append(Row("task", f"metric, {side}", x, y, how=how))
            continue
        ends, how = NO_ENDS, alone
        if shared.shared == "none":
            ends = welch(x, s, n, y, t, m)
            how = f"Welch, {shared.why}" if ends != NO_ENDS else "no interval: a single prompt has no spread"
        rows.append(Row("task", f"{units[0]}, {side}", x, y, y - x, *ends, how))
    return rows


def definitions(a: Run, b: Run) -> list[str]:
    """What the numbers are, as the two summaries say it; one where they say the same, "" for one that does not."""
    return list(dict.fromkeys(str(run.summary.get("definition", "")) for run in (a, b)))


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else b - a


# ---- intervals ----


class Paired(NamedTuple):
    """Mean of b - a over the same prompts, and 95 % of it; of each item."""

    mean: Float[Tensor, " item"]
    low: Float[Tensor, " item"]
    high: Float[Tensor, " item"]


def paired(a: Float[Tensor, "item prompt"], b: Float[Tensor, "item prompt"]) -> Paired:
    """By Student's t of the differences, of each item by itself: of twenty that do not differ, one lies outside.

    With one prompt there is no spread, and the ends are not numbers.
    """
    each = b.double() - a.double()
    n = each.shape[1]
    mean = each.mean(1)
    half = each.std(1) / math.sqrt(n) * _t(n - 1) if n > 1 else torch.full_like(mean, torch.nan)
    return Paired(mean, mean - half, mean + half)


def welch(a: float, std_a: float, n_a: int, b: float, std_b: float, n_b: int) -> Ends:
    """Of the difference of two means of independent samples, from standard deviations that divide by n; no ends where
    a sample is of one."""
    if min(n_a, n_b) < 2:
        return NO_ENDS
    u, v = std_a**2 / (n_a - 1), std_b**2 / (n_b - 1)  # squared standard errors
    if u + v == 0:
        return b - a, b - a
    half = math.sqrt(u + v) * _t((u + v) ** 2 / (u**2 / (n_a - 1) + v**2 / (n_b - 1)))
    return b - a - half, b - a + half


def newcombe(a: float, n_a: int, b: float, n_b: int) -> Ends:
    """Of the difference of two shares of independent samples."""
    (low_a, high_a), (low_b, high_b) = wilson(a, n_a), wilson(b, n_b)
    return b - a - math.hypot(b - low_b, high_a - a), b - a + math.hypot(high_b - b, a - low_a)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Of one share of n (Wilson 1927)."""
    found = scipy.stats.binomtest(round(share * n), n).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def _t(freedom: float) -> float:
    return float(scipy.stats.t.ppf(0.5 + LEVEL / 2, freedom))


# ---- files ----


def records(a: Run, b: Run) -> list[Row]:
    """What decides both results, what these may also depend on, and their numbers."""
    rows = []
    for part, name in (("decides", "key"), ("environment", "environment")):
        found = differences(a.record[name], b.record[name])
        rows += [Row(part, path, value, value) for path, value in found.same.items()]
        rows += [Row(part, *both) for both in found.different]
    return [*rows, *task_figures(a, b), *headline(a, b)]


def to_csv(a: Run, b: Run, rows: Sequence[Row]) -> str:
    """A line for each row, the runs first. Text that a spreadsheet would take for a formula begins with a quote."""
    file = io.StringIO()
    write = csv.writer(file, lineterminator="\n").writerow
    write(Row._fields)
    for row in (Row("run", "id", a.id, b.id), *rows):
        write(["'" + x if isinstance(x, str) and x.startswith(("=", "+", "-", "@", "\t", "\r")) else x for x in row])
    return file.getvalue()


def to_json(a: Run, b: Run, rows: Sequence[Row]) -> str:
    """An object with both runs and the rows as objects; what is no number is null, as JSON has none of these."""
    plain = [
        {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row._asdict().items()}
        for row in rows
    ]
    return json.dumps({"a": a.id, "b": b.id, "level": LEVEL, "rows": plain}, indent=1)
