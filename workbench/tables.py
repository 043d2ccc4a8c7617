"""Tables, runs and records in words, and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Accept = Annotated[bool, typer.Option("--accept-terms", help="Accept the model's terms of use.")]


def show_as(as_json: bool, value: Any, text: Callable[[], str]) -> None:
    """What a command found: a JSON object, or text for people."""
    typer.echo(json.dumps(value) if as_json else text())


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as their widest cell."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def describe(done: Any) -> str:
    """A finished run for the terminal."""
    t = done.record["task"]
    lines = [
        f"{done.id}  {'found' if done.hit else 'computed'} in {done.seconds:.1f} s, "
        f"{done.forward_passes} forward passes"
    ]
    if t:
        lines.append(
            f"  task   {t['n']} prompts: accuracy {t['accuracy']:.2f}, top-1 {t['top1']:.2f}, "
            f"{t['metric']} {t['clean_mean']:.3f} clean, {t['corrupted_mean']:.3f} corrupted"
        )
    for name, value in done.summary.items():
        lines.append(f"  {name}  {_plain(value)}")
    lines.append(f"  again  {done.record['command']}")
    return "\n".join(lines)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of a record in words, whatever is nested written out."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name} ")
        elif name.endswith(("_bytes", "_budget")):
            yield f"{prefix}{name}", f"{value / 1e6:,.1f} MB"
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.4g}"
        else:
            yield f"{prefix}{name}", f"{value:,}" if type(value) is int and name != "seed" else str(value)


def _plain(value: Any) -> str:
    """Values as words: items of a list of rows and of a dictionary two spaces apart."""
    if isinstance(value, dict):
        return "  ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "  ".join(_plain(item) for item in value)
    return " ".join(map(_plain, value)) if isinstance(value, list) else str(value)
