"""Sparse against dense: how many edges circuits need in models of equal held-out loss, and the frontier over densities
and widths. Hours on two cores; every training and every task is a run of its own, so that a second start goes on.

Each dense twin has the data, tokenizer, shape and schedule of the sparse model, its own optimiser, and just so many
tokens that a whole, annealed training ends at the sparse model's loss. Arms:

    dense            all weights and activations
    dense, AbsTopK   all weights, activations as sparse as in the sparse model
    dense, narrow    half as wide

All are pruned by the same search, with the same target, for each task that they solve. The ratio is that of the
geometric means of edges, over the tasks that both solve and have a circuit of.

Predictions, written before the first run: at the tiny size (width 128, one weight in eight) the dense twin needs 15 to
25 times the edges and the one with AbsTopK somewhat fewer, as half of its neurons are idle; at the small size (256,
one in 32) more than 25 times. Edges fall with density at every width, and at equal nonzeros with the width.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from circuits.sparse.train import PRESETS
from circuits.sparse.validate import geometric_mean
from tests.benchmarks import harness
from workbench import runs

WITHIN = 0.02  # nats, in which losses count as equal
ATTEMPTS = 8
# Preset, tokens of the sparse model, and of the first dense twin that is tried.
SIZES = {"tiny": (3_000_000, 750_000), "small": (8_000_000, 5_250_000)}
ARMS = {"dense": {}, "dense, AbsTopK": {"afrac": 0.25}, "dense, narrow": {"width": 0.5}}
WIDTHS, DENSITIES = (128, 256), (1 / 8, 1 / 16, 1 / 32)
QUICK: dict[str, Any] = {"tasks": "all", "pairs": 8, "settings": 1, "steps": 3}
SEARCH: dict[str, Any] = harness.size({}, QUICK)  # else the defaults


def trained(preset: str, **options: Any) -> runs.Run:
    return runs.run("sparse-train", preset=preset, **options)


def loss_of(run: runs.Run) -> float:
    return float(run.result.curve["held_out_loss"][-1])


def matched(preset: str, loss: float, tokens: int, **options: Any) -> runs.Run:
    """A dense twin whose held-out loss is the given one, by bisection on the logarithm of its tokens."""
    bounds: list[float | None] = [None, None]  # logarithms of too few tokens, and of too many
    tried = []
    for _ in range(ATTEMPTS):
        tokens = 1024 * round(tokens / 1024)  # whole steps, and names that recur
        run = trained(preset, density=1.0, tokens=tokens, **options)
        tried.append((tokens, loss_of(run)))
        if abs(loss_of(run) - loss) <= WITHIN:
            return run
        bounds[loss_of(run) < loss] = math.log(tokens)
        few, many = bounds
        if few is None:
            tokens = round(tokens / 2)
        elif many is None:
            tokens = round(tokens * 2)
        else:
            tokens = round(math.exp((few + many) / 2))
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
    return shared_home


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_sparse_against_dense(size: str, home: Path) -> None:
    tokens, first = harness.size(SIZES[size], (8192, 4096))
    few: dict[str, Any] = {} if not harness.QUICK else {"width": 32, "layers": 1, "density": 0.5}
    run = trained(size, tokens=tokens, **few)
    width = few.get("width", PRESETS[size].model.d_model)
    models = {"sparse": table_of(run)}
    found: dict[str, Any] = {}
    for arm, options in ARMS.items():
        more = dict(options)
        if "width" in more:
            more["width"] = int(width * more["width"])
        layers = {name: value for name, value in few.items() if name == "layers"}
        twin = matched(size, loss_of(run), first, **{"width": width, **layers, **more})
        models[arm] = table_of(twin)
        found[arm] = against(models["sparse"], models[arm])
        harness.record(f"twins-{size}", {"within": WITHIN, "ratios": found, "models": models})


@pytest.mark.slow
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("width", WIDTHS)
def test_frontier(width: int, density: float, home: Path) -> None:
    """Held-out loss against edges, of equal tokens."""
    tokens = harness.size(int(os.environ.get("FRONTIER_TOKENS", 2_000_000)), 8192)
    options: dict[str, Any] = {"width": width, "density": density, "embedding_density": min(1.0, 2 * density)}
    if harness.QUICK:
        options |= {"layers": 1, "density": 0.5}
    model = table_of(trained("tiny", tokens=tokens, **options), settings=1)
    edges = list(model["edges"].values())
    mean = round(geometric_mean(edges), 1) if edges else None
    name = f"frontier-{width}-{round(1 / density)}"
    harness.record(name, {"width": width, "density": density, "geometric_mean_edges": mean, **model})
