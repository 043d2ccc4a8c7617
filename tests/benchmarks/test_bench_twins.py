"""Sparse against dense: how many edges circuits need in models of equal held-out loss, and the frontier over densities
and widths. Hours on two cores; every training and every task is a run of its own, so that a second start goes on.

Each dense twin has the data, tokenizer, shape and schedule of the sparse model, its own optimiser, and just so many
tokens that a whole, annealed training ends at the sparse model's loss. Arms:

    dense            all weights and activations
    dense, AbsTopK   all weights, activations as sparse as in the sparse model

The twin with AbsTopK ends at 2.158 nats after 7.5, at 2.114 after 11.4 and at 2.100 after 13 million tokens, where the
dense one took 5.25 million for 2.111; the sparse model's is 2.091.

All are pruned by the same search, with the same target, for each task that they solve. The ratio is that of the
geometric means of edges, over the tasks that both solve and have a circuit of.

Predictions, written before the first run: at the small size (width 256, one weight in 32) the dense twin needs more
than 25 times the edges, and the one with AbsTopK somewhat fewer, as most of its neurons are idle. On the frontier edges
fall with density at both widths, and at equal nonzeros with the width.

Seen: 26.2 times (17 tasks), and 3.8 times with AbsTopK (18 tasks), far fewer than predicted. On the frontier edges fall
with density at both widths (128: 104, 41, 16; 256: 150, 104, 44), and with the width at about equal nonzeros (104 with
81,920, and 44 with 65,536).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from circuits.sparse.shipped import DATA
from circuits.sparse.validate import geometric_mean
from tests.benchmarks import harness
from workbench import canvas, places, runs, standalone

WITHIN = 0.02  # nats, in which losses count as equal
ATTEMPTS, SLOPE = 6, -0.16  # nats, for e times the tokens, of dense models of this size
PRESET, TOKENS = "small", 8_000_000
ARMS: dict[str, dict[str, float]] = {"dense": {}, "dense, AbsTopK": {"afrac": 0.25}}
FIRST = {"dense": 5_250_000, "dense, AbsTopK": 13_000_000}  # tokens of the first twin that is tried
WIDTHS, DENSITIES = (128, 256), (1 / 8, 1 / 16, 1 / 32)
MANY = 1000  # edges: a task of the frontier that has more, or no circuit, with one setting of the search gets all three
RATES: dict[str, dict[str, float]] = {"0.0256": {}, "0.0128": {"lr": 0.0128}, "0.0064": {"lr": 0.0064}}
QUICK: dict[str, Any] = {"tasks": "all", "pairs": 8, "settings": 1, "steps": 3}
SEARCH: dict[str, Any] = harness.size({}, QUICK)  # else the defaults


def trained(preset: str, **options: Any) -> runs.Run:
    return runs.run("sparse-train", preset=preset, **options)


def loss_of(run: runs.Run) -> float:
    return float(run.result.curve["held_out_loss"][-1])


def matched(preset: str, loss: float, tokens: int, **options: Any) -> runs.Run:
    """A dense twin whose held-out loss is the given one: its loss is nearly a line over the logarithm of its tokens."""
    tried: list[tuple[float, float]] = []
    for _ in range(ATTEMPTS):
        tokens = 1024 * round(tokens / 1024)  # whole steps, and names that recur
        run = trained(preset, density=1.0, tokens=tokens, **options)
        tried.append((math.log(tokens), loss_of(run)))
        if abs(loss_of(run) - loss) <= WITHIN:
            return run
        (x, y), *others = sorted(tried, key=lambda point: abs(point[1] - loss))
        slope = (others[0][1] - y) / (others[0][0] - x) if others else SLOPE
        tokens = round(math.exp(x + max(-1.0, min(1.0, (loss - y) / min(slope, -0.03)))))
    raise AssertionError(f"no dense twin ends within {WITHIN} of {loss:.3f}: {tried}")


def table_of(run: runs.Run, **options: Any) -> dict[str, Any]:
    """Circuits of all solved tasks, with loss and accuracies."""
    found = runs.run("sparse-tasks", model=run.id, **(options | SEARCH))
    rows = found.result.rows
    return {
        "train": run.record["command"],
        "tasks": found.record["command"],
        "held_out_loss": round(loss_of(run), 4),
        "tokens": run.summary["tokens"],
        "nonzero": run.summary["nonzero"],
        "of_weights": run.summary["of_weights"],
        "search": found.record["key"]["parameters"],
        "tasks_solved": run.summary["tasks_solved"],
        "solved": sorted(rows),
        "edges": {name: row.edges for name, row in rows.items() if row.edges is not None},
        "nodes": {name: row.nodes for name, row in rows.items() if row.nodes is not None},
        "without": {name: round(row.without, 4) for name, row in rows.items() if row.without is not None},
        "seconds": {"train": run.record["cost"]["seconds"], "tasks": found.record["cost"]["seconds"]},
    }


def against(sparse: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """The ratio of geometric means over the tasks that both have circuits of."""
    common = sorted(sparse["edges"].keys() & dense["edges"].keys())
    means = [geometric_mean([model["edges"][name] for name in common]) for model in (sparse, dense)] if common else []
    ratio = means[1] / means[0] if common else 0.0
    figures = {"tasks": len(common), "geometric_means": [round(mean, 1) for mean in means]}
    return figures | harness.judge(round(ratio, 2), at_least=25)


@pytest.fixture
def home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_HOME", str(shared_home))  # where runs of an earlier start are found again
    places.ship(DATA / "runs")  # and those of the package: the sparse model and its dense twin, with their circuits
    return shared_home


@pytest.mark.slow
def test_sparse_against_dense(home: Path) -> None:
    tokens = harness.size(TOKENS, 8192)
    shape: dict[str, Any] = harness.size({}, {"width": 32, "layers": 1})
    run = trained(PRESET, tokens=tokens, **shape, **harness.size({}, {"density": 0.5}))
    models = {"sparse": table_of(run)}
    found: dict[str, Any] = {}
    for arm, options in ARMS.items():
        models[arm] = table_of(matched(PRESET, loss_of(run), harness.size(FIRST[arm], 4096), **shape, **options))
        found[arm] = against(models["sparse"], models[arm])
        harness.record(f"twins-{PRESET}", {"within": WITHIN, "ratios": found, "models": models})


@pytest.mark.slow
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("width", WIDTHS)
def test_frontier(width: int, density: float, home: Path) -> None:
    """Held-out loss against edges, of equal tokens, each model at the best of three learning rates: which one that
    is depends on width and density. Circuits are looked for with one setting of the search, and with three where that
    leaves many edges: where it does not find the channels that matter, it leaves nearly all of them."""
    tokens = harness.size(int(os.environ.get("FRONTIER_TOKENS", 2_000_000)), 8192)
    options: dict[str, Any] = {"width": width, "density": density, "embedding_density": min(1.0, 2 * density)}
    if harness.QUICK:
        options |= {"layers": 1, "density": 0.5}
    tried = {rate: trained("tiny", tokens=tokens, **options, **given) for rate, given in RATES.items()}
    run = min(tried.values(), key=loss_of)
    model = table_of(run, settings=1)
    many = sorted(name for name in model["solved"] if model["edges"].get(name, math.inf) > MANY)
    if many:
        again = table_of(run, tasks=",".join(many))
        model |= {what: model[what] | again[what] for what in ("edges", "nodes", "without")}
        model |= {"searched again": again["tasks"], "seconds again": again["seconds"]["tasks"]}
    edges = list(model["edges"].values())
    mean = round(geometric_mean(edges), 1) if edges else None
    name = f"frontier-{width}-{round(1 / density)}"
    losses = {rate: round(loss_of(run), 4) for rate, run in tried.items()}
    figures = {"width": width, "density": density, "losses by rate": losses, "geometric_mean_edges": mean}
    harness.record(name, figures | model)


@pytest.mark.slow
def test_the_frontier_is_drawn(tmp_path: Path) -> None:
    """From the figures that are kept: over the tasks of which every model has a circuit with edges."""
    rows = [json.loads(path.read_text()) for path in sorted(harness.RESULTS.glob("frontier-*-*-cpu.json"))]
    common = set.intersection(*({name for name, edges in row["edges"].items() if edges} for row in rows))
    fig = go.Figure()
    for i, width in enumerate(sorted({row["width"] for row in rows})):
        some = sorted((row for row in rows if row["width"] == width), key=lambda row: -row["density"])
        shade = (canvas.POSITIVE, canvas.NEGATIVE)[i % 2].format(1)
        fig.add_scatter(
            x=[geometric_mean([row["edges"][name] for name in common]) for row in some],
            y=[row["held_out_loss"] for row in some], name=f"width {width}", mode="lines+markers+text",
            text=[f"1/{round(1 / row['density'])}" for row in some], textposition="top center",
            marker={"size": 9, "symbol": ("circle", "diamond")[i % 2], "color": shade},
            line={"color": shade, "width": 2},
        )  # fmt: skip
    ticks = [10, 20, 50, 100, 200, 500, 1000]
    fig.update_xaxes(
        type="log",
        tickvals=ticks,
        ticktext=[f"{n:,}" for n in ticks],
        title_text=f"edges, geometric mean over {len(common)} tasks",
    )
    fig.update_yaxes(title_text="held-out loss, nats per token")
    fig.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    canvas.finish(fig, 320, top=40)
    path = tmp_path if harness.QUICK else Path(__file__).parents[2] / "docs"
    (path / "frontier.svg").write_text(standalone.drawn(fig))
    harness.record("frontier", {"tasks": sorted(common), "models": len(rows)})
