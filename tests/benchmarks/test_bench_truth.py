"""Which method finds the circuit: every method on models whose circuit is known by construction.

For each planted model of the suite, which no method was tuned on, and each trained or compiled toy: ROC AUC of nodes
and of edges by absolute score, on the same prompts (codes on more of them, as published). Edges that the circuit needs
but that carry the same on both prompts (the scaffold) are left out: no patching can see them; so are nodes that are
constant. `heads` is the same over attention heads alone, as codes score nothing else, and `pairs` over pairs of a head
and a later one: the edges between heads, without their ports, which codes can be held to.

The null swaps clean and corrupted prompt in a random half of the pairs and keeps answers where they are: effects of
a true node cancel. Large effects cancel to larger remainders, so raw scores stay above .5 there; against other swaps
(absolute z-score) they must not. Toys have no null: with a true head or two among few, its mean is noise.

Predictions, written before the first run: exact patching .98 of nodes; EAP-IG .95, EAP .85 (saturated models), RelP
.93; edges: exact .97, EAP-IG .93; codes .65 in every mode, and no better than the norm of the mean difference. Before
their own first runs: CD-T .85 of nodes, .80 with patterns decomposed; effects of codes .88 of heads, below attribution
patching, whose products they coarsen; pairs of codes .6.

Scores below 1e-5 of a method's largest are ties at 0: their order is that of rounding errors, which are larger where
more is computed, and so "finds" what a method says nothing about.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from circuits import masks
from circuits.acdc import acdc_scores
from circuits.attribution import attribution_patching, eap, eap_ig
from circuits.cdt import cdt
from circuits.edge_patching import edge_patching
from circuits.graph import EdgeScores, Graph, node_of
from circuits.ig_activations import eap_ig_activations
from circuits.patching import patching
from circuits.planted import SUITE, plant
from circuits.recovery import auc
from circuits.relp import relp
from circuits.toys import Toy, induction, modular_addition, symbolic_ioi
from circuits.tracr_models import compiled, programs
from saes.code_effects import code_effects
from saes.codes import head_outputs, sae_codes
from tests.benchmarks import harness
from workbench.activations import ActivationStore
from workbench.models import LanguageModel
from workbench.plots import node_scores
from workbench.prompts import Batch
from workbench.scores import NodeScores, every_head

N = 16
MANY, MANY_TOYS = 250, 48  # pairs for codes: as published; a toy has no more
MOST_EDGES = 3000  # exact patching of every edge, and ACDC, are left to smaller graphs
NULL_MODELS, SWAPS = 6, 8
ROUNDING = 1e-5
NO_NULL = ("edge-patching", "node-pruning", "sae-codes, paper")  # too slow, or known to fail it by design
Method = Callable[[LanguageModel, Batch, ActivationStore], object]


def mean_difference(model: LanguageModel, batch: Batch, store: ActivationStore) -> NodeScores:
    """Norm of the mean difference of what a head writes: the simplest thing that could work."""
    x = head_outputs(model, store, [*batch.clean, *batch.corrupted], "mean")
    difference = (x[: len(batch)] - x[len(batch) :]).mean(0).norm(dim=-1)
    names = every_head(model.config.n_layers, model.config.n_heads)
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
    "cd-t, patterns decomposed": lambda *a: cdt(*a, attention="paper"),
    "edge-patching": edge_patching,
    "node-pruning": lambda *a: masks.node_pruning(*a, keep=0.2),
}
BY_CODES: dict[str, Method] = {  # run on `Case.many`
    "sae-codes, paper": lambda *a: sae_codes(*a, mode="paper", trials=1, pairs=True),
    "sae-codes, fixed": lambda *a: sae_codes(*a, trials=1, pairs=True),
    "sae-codes, untrained": lambda *a: sae_codes(*a, trials=1, steps=0, pairs=True),
    "sae-codes, k-means": lambda *a: sae_codes(*a, trials=1, encoder="kmeans"),
    "sae-codes, probe": lambda *a: sae_codes(*a, trials=1, encoder="probe"),
    "sae-codes, information": lambda *a: sae_codes(*a, trials=1, statistic="information"),
    "k-means codes, information": lambda *a: sae_codes(*a, trials=1, encoder="kmeans", statistic="information"),
    "probe codes, information": lambda *a: sae_codes(*a, trials=1, encoder="probe", statistic="information"),
    "code-effects": lambda *a: code_effects(*a, trials=1),
    "code-effects, untrained": lambda *a: code_effects(*a, trials=1, steps=0),
    "code-effects, k-means": lambda *a: code_effects(*a, trials=1, encoder="kmeans"),
    "code-effects, probe": lambda *a: code_effects(*a, trials=1, encoder="probe"),
    "mean difference": mean_difference,
}
SLOW: dict[str, Method] = {
    "acdc": lambda m, b, s: acdc_scores(m, b.select(range(4)), s, [1e-1, 1e-2, 1e-3, 1e-4]),
    "edge-pruning": lambda *a: masks.edge_pruning(*a, keep=0.05),
}


@dataclass(frozen=True)
class Case:
    """A model and what is true of it.

    many   prompts for codes, which count and need more of them
    blind  nodes and edges that are needed and the same for all prompts
    """

    name: str
    model: LanguageModel
    batch: Batch
    many: Batch
    nodes: frozenset[str]
    edges: frozenset[str]
    blind: frozenset[str]

    @cached_property
    def pairs(self) -> frozenset[str]:
        """True edges between heads, without ports."""
        ends = [edge.split("->") for edge in self.edges - self.blind]
        return frozenset(f"{u}->{node_of(v)}" for u, v in ends if "." in u and "." in v)


def planted_case(number: int) -> Case:
    options = SUITE[number]
    name = f"{number}: {options['circuit']}, {options['n_layers']}x{options['n_heads']}, seed {options['seed']}"
    planted = plant(**options)
    return Case(
        name,
        planted.model,
        planted.batch(N, seed=0),
        planted.batch(MANY, seed=1),
        planted.nodes,
        planted.edges,
        planted.scaffold,
    )


def toy_case(make: Callable[[], Toy]) -> Case:
    toy = make()
    nodes, edges, constant = (frozenset(found) for found in (toy.nodes, toy.edges, toy.constant))
    return Case(toy.name, toy.model, toy.batch(N, seed=3), toy.batch(MANY_TOYS, seed=4), nodes, edges, constant)


def judged(found: object, case: Case) -> dict[str, float]:
    """AUCs of one method on one model."""
    by_node = found.nodes() if isinstance(found, EdgeScores) else node_scores(found)
    assert by_node is not None
    names = [name for name in by_node.nodes if name not in case.blind]
    value = dict(zip(by_node.nodes, by_node.scores.abs().double().tolist(), strict=True))
    heads = [name for name in names if name.startswith("a")]
    out = {"heads": _auc(value, heads, case.nodes)}
    if len(heads) < len(names):
        out["nodes"] = _auc(value, names, case.nodes)
    if isinstance(found, EdgeScores):
        value = dict(zip(found.graph.names, found.scores.abs().double().tolist(), strict=True))
        out["edges"] = _auc(value, [name for name in found.graph.names if name not in case.blind], case.edges)
    pairs = found.head_pairs() if isinstance(found, EdgeScores) else getattr(found, "edges", None)
    if pairs is not None and case.pairs:
        value = dict(zip(pairs.pairs, pairs.scores.abs().double().tolist(), strict=True))
        out["pairs"] = _auc(value, list(value), case.pairs)
    return out


def _auc(value: dict[str, float], names: list[str], true: frozenset[str]) -> float:
    label = torch.tensor([name in true for name in names])
    if bool(label.all()) or not bool(label.any()):
        return math.nan
    size = torch.tensor([value[name] for name in names], dtype=torch.float64)
    return auc(size.where(size > ROUNDING * size.max(), 0), label)


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


def held_to(cases: Sequence[Callable[[], Case]], title: str, tmp_path: Path, nulls: int) -> None:
    """Run all methods on all models, and record. What the record has already is not run again (delete it to measure
    anew), nor what a run had when it was stopped."""
    torch.set_num_threads(1)  # the models are too small for more
    kept = harness.RESULTS / f"{title}-parts.json"
    settings = {"prompts": N, "prompts of codes": [MANY, MANY_TOYS], "swaps": SWAPS}
    rows = [] if harness.QUICK else earlier(kept, harness.RESULTS / f"{title}-cpu.json", settings)
    for number, make in list(enumerate(cases))[: harness.size(len(cases), 2)]:
        if number == len(rows):
            rows.append({"methods": {}, "null": {}})
        row, wanted = rows[number], METHODS | BY_CODES
        if row["methods"] and not wanted.keys() - row["methods"].keys() - {"edge-patching"}:
            continue
        case, store = make(), ActivationStore(tmp_path / str(number))
        small = len(Graph.of(case.model.config)) <= MOST_EDGES
        row["model"] = case.name
        for method, run in (wanted | (SLOW if small else {})).items():
            if method in row["methods"] or (method == "edge-patching" and not small):
                continue
            batch = case.many if method in BY_CODES else case.batch
            started = time.perf_counter()
            found = run(case.model, batch, store)
            seconds = {"seconds": round(time.perf_counter() - started, 2)}
            row["methods"][method] = {k: v for k, v in judged(found, case).items() if not math.isnan(v)} | seconds
            if number < nulls and method not in (*SLOW, *NO_NULL):
                row["null"][method] = null(run, case.model, batch, store, case.nodes)
        if not harness.QUICK:
            harness.RESULTS.mkdir(exist_ok=True)
            kept.write_text(json.dumps({"settings": settings, "models": rows}))
    harness.record(title, settings | {"summary": summary(rows), "models": rows})
    kept.unlink(missing_ok=True)


def earlier(kept: Path, record: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a run that was stopped, or else of the record, if they were measured in the same way."""
    for path in (kept, record):
        if path.exists():
            found = json.loads(path.read_text())
            rows: list[dict[str, Any]] = found["models"]
            return rows if settings == {name: found.get("settings", found)[name] for name in settings} else []
    return []


@pytest.mark.slow
def test_planted_circuits(tmp_path: Path) -> None:
    cases = [partial(planted_case, number) for number in range(len(SUITE))]
    held_to(cases, "truth-planted", tmp_path, NULL_MODELS)


@pytest.mark.slow
def test_trained_and_compiled_models(tmp_path: Path) -> None:
    pytest.importorskip("tracr", reason="compiled models need the extra `tracr`")
    toys: list[Callable[[], Toy]] = [induction, symbolic_ioi, modular_addition]
    toys += [partial(compiled, name) for name in programs()]
    held_to([partial(toy_case, make) for make in toys], "truth-toys", tmp_path, 0)


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean over models with its standard error, the worst, on how many; and the null."""
    out: dict[str, dict[str, Any]] = {}
    for method in {name: None for row in rows for name in row["methods"]}:
        figures: dict[str, Any] = {}
        for what in ("nodes", "heads", "edges", "pairs", "seconds"):
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
