"""What came of a batch: a row for each run, how far its methods agree, and what they cost."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from workbench import canvas, plots, scores, settings, tables
from workbench.batch import Row
from workbench.scores import NodeScores


@dataclass(frozen=True)
class Batch:
    """
    rows       what `Row.to_json` says of each cell
    pairs      model and task, in the order of the plan
    methods    with their parameters
    first      the first method that scores heads
    agreement  Spearman correlation of absolute head scores with that method's, mean over seeds; not a number where
               either has none
    seeds      the same between a method's own seeds, mean over pairs of them
    """

    rows: tuple[dict[str, Any], ...]
    pairs: tuple[str, ...]
    methods: tuple[str, ...]
    first: str
    agreement: Float[Tensor, "pair method"]
    seeds: Float[Tensor, "pair method"]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Batch:
        """Reads the result of every run."""
        found: dict[tuple[str, str], dict[int, NodeScores]] = {}
        for row in rows:
            scored = None if row.run is None else _nodes(row.run.result)
            if scored is not None:
                found.setdefault((row.cell.pair, row.cell.way), {})[row.cell.seed] = scored
        pairs = list(dict.fromkeys(row.cell.pair for row in rows))
        methods = list(dict.fromkeys(row.cell.way for row in rows))
        first = next((name for name in methods if any((pair, name) in found for pair in pairs)), "")

        def table(value: Callable[[str, str], float]) -> Tensor:
            return torch.tensor([[value(pair, name) for name in methods] for pair in pairs], dtype=torch.float32)

        def beside(pair: str, name: str) -> float:
            mine, other = found.get((pair, name), {}), found.get((pair, first), {})
            return _mean(scores.rank_agreement(mine[seed], other[seed]) for seed in mine.keys() & other.keys())

        def again(pair: str, name: str) -> float:
            mine = found.get((pair, name), {}).values()
            return _mean(scores.rank_agreement(a, b) for a, b in itertools.combinations(mine, 2))

        told = tuple(row.to_json() for row in rows)
        return cls(told, tuple(pairs), tuple(methods), first, table(beside), table(again))

    def summary(self) -> dict[str, Any]:
        done = [row for row in self.rows if "run" in row]
        return {
            "runs": len(done),
            "failed": len(self.rows) - len(done),
            "computed": sum(not row["hit"] for row in done),
            "seconds": round(sum(row["seconds"] for row in done), 1),
            "passes": sum(row["passes"] + row.get("shared_passes", 0) for row in done),
            "agreement": self._told(self.agreement),
            "between_seeds": self._told(self.seeds),
        }

    def _told(self, table: Tensor) -> dict[str, dict[str, float]]:
        rows = zip(self.pairs, table.tolist(), strict=True)
        return {
            pair: {name: round(x, 3) for name, x in zip(self.methods, row, strict=True) if math.isfinite(x)}
            for pair, row in rows
        }

    def text(self) -> str:
        """The rows as a table, and the sentences of those that failed."""
        head = ("model", "task", "method", "seed", "accuracy", "top", "seconds", "passes", "", "run")
        lines, below = [], []
        for row in self.rows:
            start = [row["model"], row["task"], row["method"], row["seed"]]
            if "error" in row:
                lines.append([*start, "", "", "", "", "failed", ""])
                below.append(f"{', '.join(map(str, start))}: {row['error']}")
                continue
            cost = [f"{row['seconds']:.1f}", row["passes"], "found" if row["hit"] else "computed", row["run"]]
            lines.append([*start, f"{row['accuracy']:.2f}", " ".join(row["top"]), *cost])
        return "\n".join([tables.table(head, lines), *below])

    def save(self, folder: Path) -> None:
        """`summary.json` and `figure.html`, each written aside and renamed into place."""
        settings.writable_folder(folder)
        told = json.dumps(self.summary() | {"rows": self.rows}, indent=1)
        figure = plots.figure(self).to_html(include_plotlyjs=True)
        for name, content in (("summary.json", told), ("figure.html", figure)):
            aside = folder / f".{name}.{os.getpid()}"
            aside.write_text(content)
            os.replace(aside, folder / name)


def _mean(some: Iterable[float]) -> float:
    values = list(some)
    return fmean(values) if values else math.nan


def _nodes(result: Any) -> NodeScores | None:
    """The scores of nodes that a result is, carries, or makes of its edges."""
    found = plots.node_scores(result)
    if found is None and callable(make := getattr(result, "nodes", None)):
        found = make()
    return found if isinstance(found, NodeScores) and len(found.heads()) > 1 else None


@plots.figure.register
def batch_figure(result: Batch) -> go.Figure:
    """How far each method agrees with the first one, on each model and task; beside it what the methods cost."""
    n, methods = len(result.pairs), [escape(name) for name in result.methods]
    fig = make_subplots(rows=1, cols=2, column_widths=[0.62, 0.38], horizontal_spacing=0.2,
                        subplot_titles=[f"agreement with {escape(result.first)}", "seconds"])  # fmt: skip
    hover = [
        [f"{escape(pair)}, {name}: {canvas.number(x, 3)}" for name, x in zip(methods, row, strict=True)]
        for pair, row in zip(result.pairs, result.agreement.tolist(), strict=True)
    ]
    text = [
        [canvas.number(x, 2, signed=False) if math.isfinite(x) else "" for x in row]
        for row in result.agreement.tolist()
    ]
    colours = {"colorscale": canvas.DIVERGING, "zmin": -1, "zmax": 1, "showscale": False}
    written = {"text": text, "texttemplate": "%{text}", "textfont": canvas.WRITTEN}
    fig.add_trace(canvas.heatmap(result.agreement, hover, hoverongaps=False, **colours, **written), row=1, col=1)
    fig.update_xaxes(tickvals=list(range(len(methods))), ticktext=methods, tickangle=40, row=1, col=1)
    pairs = [escape(pair) for pair in result.pairs]
    fig.update_yaxes(tickvals=list(range(n)), ticktext=pairs, autorange="reversed", automargin=True, row=1, col=1)
    spent = [
        sum(row["seconds"] for row in result.rows if "run" in row and row["method"] == name) for name in result.methods
    ]
    bar = {"orientation": "h", "marker_color": canvas.POSITIVE.format(0.6), "marker_line_width": 0}
    fig.add_trace(go.Bar(x=spent, y=methods, showlegend=False, **bar), row=1, col=2)
    fig.update_yaxes(autorange="reversed", automargin=True, row=1, col=2)
    return canvas.finish(fig, max(160, 34 * max(n, len(methods))), top=34, bottom=110)


@plots.definition.register
def _(result: Batch) -> str:
    return (
        f"Spearman correlation of absolute head scores with those of {result.first or 'no method'}, mean over seeds; "
        "seconds: of all runs of a method, when they were computed"
    )
