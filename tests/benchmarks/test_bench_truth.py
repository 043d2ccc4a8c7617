"""Which method finds the circuit: every method on models whose circuit is known by construction.

For each planted model of the suite, which no method was tuned on: ROC AUC of nodes and of edges by absolute score, on
the same prompts. Edges that the circuit needs but that carry the same on both prompts (the scaffold) are left out: no
patching can see them. `heads` is the same over attention heads alone, as codes score nothing else.

The null swaps clean and corrupted prompt in a random half of the pairs and keeps answers where they are: effects of
a true node cancel. Large effects cancel to larger remainders, so raw scores stay above .5 there; against other swaps
(absolute z-score) they must not.

Predictions, written before the first run: exact patching .98 of nodes; EAP-IG .95, EAP .85 (saturated models), RelP
.93; edges: exact .97, EAP-IG .93; codes .65 in every mode, and no better than the norm of the mean difference. CD-T
came later, its predictions before its own first run: .80 of nodes, .85 with patterns kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from circuits import masks
from circuits.acdc import acdc_scores
from circuits.attribution import attribution_patching, eap, eap_ig
from circuits.cdt import cdt
from circuits.edge_patching import edge_patching
from circuits.graph import EdgeScores, Graph
from circuits.ig_activations import eap_ig_activations
from circuits.patching import patching
from circuits.planted import SUITE, plant
from circuits.recovery import auc
from circuits.relp import relp
from saes.codes import head_outputs, sae_codes
from tests.benchmarks import harness
from workbench import scores
from workbench.activations import ActivationStore
from workbench.models import LanguageModel
from workbench.plots import node_scores
from workbench.prompts import Batch
from workbench.scores import NodeScores

N = 16
MOST_EDGES = 3000  # exact patching of every edge, and ACDC, are left to smaller graphs
NULL_MODELS, SWAPS = 6, 8
NO_NULL = ("edge-patching", "node-pruning", "sae-codes, paper")  # too slow, or known to fail it by design
Method = Callable[[LanguageModel, Batch, ActivationStore], object]


def mean_difference(model: LanguageModel, batch: Batch, store: ActivationStore) -> NodeScores:
    """Norm of the mean difference of what a head writes: the simplest thing that could work."""
    x = head_outputs(model, store, [*batch.clean, *batch.corrupted], "mean")
    difference = (x[: len(batch)] - x[len(batch) :]).mean(0).norm(dim=-1)
    c = model.config
    names = tuple(scores.head(layer, h) for layer in range(c.n_layers) for h in range(c.n_heads))
    return NodeScores(names, difference.cpu(), "norm of the mean difference of a head's output", "none")


METHODS: dict[str, Method] = {
    "patching": patching,
    "attribution-patching": attribution_patching,
    "attribution-patching, 5 steps": lambda *a: attribution_patching(*a, steps=5),
    "eap": eap,
    "eap-ig": eap_ig,
    "eap-ig, 20 midpoints": lambda *a: eap_ig(*a, steps=20, rule="midpoint"),
    "eap-ig-activations": eap_ig_activations,
    "relp": relp,
    "cd-t": cdt,
    "cd-t, patterns kept": lambda *a: cdt(*a, attention="values"),
    "cd-t, signs": lambda *a: cdt(*a, signs=True),
    "edge-patching": edge_patching,
    "node-pruning": lambda *a: masks.node_pruning(*a, keep=0.2),
    "sae-codes, paper": lambda *a: sae_codes(*a, mode="paper", trials=1),
    "sae-codes, fixed": lambda *a: sae_codes(*a, trials=1),
    "sae-codes, untrained": lambda *a: sae_codes(*a, trials=1, steps=0),
    "sae-codes, k-means": lambda *a: sae_codes(*a, trials=1, encoder="kmeans"),
    "sae-codes, probe": lambda *a: sae_codes(*a, trials=1, encoder="probe"),
    "sae-codes, information": lambda *a: sae_codes(*a, trials=1, statistic="information"),
    "probe codes, information": lambda *a: sae_codes(*a, trials=1, encoder="probe", statistic="information"),
    "mean difference": mean_difference,
}
SLOW: dict[str, Method] = {
    "acdc": lambda m, b, s: acdc_scores(m, b.select(range(4)), s, [1e-1, 1e-2, 1e-3, 1e-4]),
    "edge-pruning": lambda *a: masks.edge_pruning(*a, keep=0.05),
}


def judged(found: object, nodes: frozenset[str], edges: frozenset[str], scaffold: frozenset[str]) -> dict[str, float]:
    """AUCs of one method on one model."""
    by_node = found.nodes() if isinstance(found, EdgeScores) else node_scores(found)
    assert by_node is not None
    value = by_node.scores.abs().double()
    label = torch.tensor([name in nodes for name in by_node.nodes])
    heads = torch.tensor([name.startswith("a") for name in by_node.nodes])
    out = {"heads": auc(value[heads], label[heads])}
    if not bool(heads.all()):
        out["nodes"] = auc(value, label)
    if isinstance(found, EdgeScores):
        fair = torch.tensor([name not in scaffold for name in found.graph.names])
        true = torch.tensor([name in edges for name in found.graph.names])
        out["edges"] = auc(found.scores.abs().double()[fair], true[fair])
    return out


def swapped(batch: Batch, generator: torch.Generator) -> Batch:
    turned = (torch.rand(len(batch), generator=generator) < 0.5).tolist()
    pairs = list(zip(batch.clean, batch.corrupted, turned, strict=True))
    return replace(
        batch,
        clean=tuple(corrupted if turn else clean for clean, corrupted, turn in pairs),
        corrupted=tuple(clean if turn else corrupted for clean, corrupted, turn in pairs),
    )


def null(method: Method, model: LanguageModel, batch: Batch, store: ActivationStore, nodes: frozenset[str]) -> float:
    """Mean AUC over swaps of the absolute z-score of each swap against the others."""
    generator = torch.Generator().manual_seed(0)
    rows, names = [], ()
    for _ in range(SWAPS):
        found = method(model, swapped(batch, generator), store)
        by_node = found.nodes("sum") if isinstance(found, EdgeScores) else node_scores(found)
        assert by_node is not None
        rows.append(by_node.scores.double())
        names = by_node.nodes
    every = torch.stack(rows)
    label = torch.tensor([name in nodes for name in names])
    out = []
    for i in range(SWAPS):
        others = every[torch.arange(SWAPS) != i]
        spread = others.std(0)
        z = torch.where(spread > 0, (every[i] - others.mean(0)) / spread.clamp(min=1e-300), 0)
        out.append(auc(z.abs(), label))
    return sum(out) / SWAPS


@pytest.mark.slow
def test_planted_circuits(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # the models are too small for more
    kept = harness.RESULTS / "truth-planted-parts.jsonl"  # a run that was stopped goes on
    done: dict[str, dict[str, Any]] = {}
    if kept.exists() and not harness.QUICK:
        done = {row["model"]: row for row in map(json.loads, kept.read_text().splitlines())}
    for number, options in enumerate(SUITE[: harness.size(len(SUITE), 2)]):
        name = f"{number}: {options['circuit']}, {options['n_layers']}x{options['n_heads']}, seed {options['seed']}"
        if name in done:
            continue
        planted = plant(**options)
        batch, store = planted.batch(N, seed=0), ActivationStore(tmp_path / str(number))
        small = len(Graph.of(planted.model.config)) <= MOST_EDGES
        row: dict[str, Any] = {"model": name, "options": options, "methods": {}, "null": {}}
        for method, run in (METHODS | (SLOW if small and number % 12 == 0 else {})).items():
            if method == "edge-patching" and not small:
                continue
            started = time.perf_counter()
            found = run(planted.model, batch, store)
            row["methods"][method] = judged(found, planted.nodes, planted.edges, planted.scaffold) | {
                "seconds": round(time.perf_counter() - started, 2)
            }
            if number < NULL_MODELS and method not in (*SLOW, *NO_NULL):
                row["null"][method] = null(run, planted.model, batch, store, planted.nodes)
        done[name] = row
        if not harness.QUICK:
            with kept.open("a") as file:
                file.write(json.dumps(row) + "\n")
    harness.record("truth-planted", {"prompts": N, "swaps": SWAPS, "summary": summary(list(done.values())),
                                     "models": list(done.values())})  # fmt: skip
    kept.unlink(missing_ok=True)


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean over models with its standard error, the worst, on how many; and the null."""
    out: dict[str, dict[str, Any]] = {}
    for method in {name: None for row in rows for name in row["methods"]}:
        figures: dict[str, Any] = {}
        for what in ("nodes", "heads", "edges", "seconds"):
            values = [row["methods"][method][what] for row in rows if what in row["methods"].get(method, {})]
            if values:
                each = torch.tensor(values, dtype=torch.float64)
                figures[what] = {
                    "mean": round(float(each.mean()), 4),
                    "error": round(float(each.std()) / len(each) ** 0.5, 4) if len(each) > 1 else None,
                    "worst": round(float(each.max() if what == "seconds" else each.min()), 4),
                    "models": len(values),
                }
        nulls = [row["null"][method] for row in rows if method in row["null"]]
        if nulls:
            figures["null"] = round(sum(nulls) / len(nulls), 4)
        out[method] = figures
    return out
