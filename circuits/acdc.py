"""ACDC: cut edges one after the other, for good, as long as the model's prediction hardly changes.

Conmy et al. 2023, algorithm 1. Destinations are visited from the logits down, the edges into each from the last source
to the first. An edge is cut if that raises the divergence from the whole model by less than a threshold tau; what was
cut before stays cut. The result depends on the order, and on tau: there is no score of an edge, only a circuit for
each tau.

A trial runs the model from the layer of the edge on, because nothing below it has been cut yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph import Circuit, EdgeScores, Graph
from circuits.wiring import Wiring
from circuits.writes import Ablation
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.metrics import kl
from workbench.models import LanguageModel
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis

Target = Literal["kl", "metric"]


@analysis("acdc", version=1, n=8)
def acdc(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    threshold: float = 0.01,
    target: Target = "kl",
    ablation: Ablation = "resample",
) -> Circuit:
    """Automatic circuit discovery: greedy cutting of edges. One run per edge, so for small models or much patience.

    threshold  tau: an edge is cut if that raises the target by less; larger gives smaller circuits
    target     what must not rise: kl (divergence from the whole model, nats) or metric (loss of the task's metric)
    ablation   what a cut edge carries: resample (corrupted prompt), mean (over corrupted prompts), zero
    """
    if threshold < 0:
        raise UserError(f"threshold={threshold:g} is negative: no edge would be cut; use 0 or more.")
    graph = Graph.of(model.config)
    kept, final = _cut(model, batch, store, graph, threshold, target, ablation)
    return Circuit(
        graph,
        kept,
        f"ACDC: edges that cannot be cut without raising {_words(target, batch)} by {threshold:g} or more, one after "
        f"the other from the logits down; ablation {ablation}, mean over {len(batch)} prompts",
        model=model.name,
        task=batch.task.name,
        method="acdc",
        headline={"threshold": threshold, f"final_{target}": final, "prompts": len(batch), "ablation": ablation},
    )


def acdc_scores(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    thresholds: Sequence[float],
    *,
    target: Target = "kl",
    ablation: Ablation = "resample",
) -> EdgeScores:
    """The score of an edge is the largest threshold whose circuit still has it, 0 if none: ACDC's ROC curve."""
    graph = Graph.of(model.config)
    score = torch.zeros(len(graph))
    for threshold in sorted(thresholds):
        kept, _ = _cut(model, batch, store, graph, threshold, target, ablation)
        score[kept] = threshold
    return EdgeScores(
        graph,
        score,
        f"largest of {len(thresholds)} thresholds on {_words(target, batch)} whose ACDC circuit has the edge; ablation "
        f"{ablation}, {len(batch)} prompts",
        "nats" if target == "kl" else batch.task.metric,
        headline={"prompts": len(batch), "ablation": ablation},
    )


def _words(target: Target, batch: Batch) -> str:
    return "the KL divergence from the whole model" if target == "kl" else f"the loss of {batch.task.metric}"


def _cut(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    graph: Graph,
    threshold: float,
    target: Target,
    ablation: Ablation,
) -> tuple[Bool[Tensor, " edge"], float]:
    """The edges that stay, and the target at the end."""
    groups = [batch.select(part.tolist()) for part in batch.buckets()]
    runs = [Wiring(model, store, some, ablation) for some in groups]
    keep = graph.dense(torch.ones(len(graph)))[None]
    whole = [run.run(keep)[0].float() for run in runs]

    def loss(keep: Float[Tensor, "1 source destination"]) -> float:
        total = 0.0
        for some, run, reference in zip(groups, runs, whole, strict=True):
            logits = run.run(keep)[0].float()
            total += float(
                kl(logits, reference).sum() if target == "kl" else (some.score(reference) - some.score(logits)).sum()
            )
        return total / len(batch)

    now = loss(keep)
    # From the logits down; the edges of one destination from the last source to the first.
    ends = graph.edges.tolist()
    order = sorted(range(len(graph)), key=lambda i: (ends[i][1], ends[i][0]), reverse=True)
    for edge in track(order, "acdc"):
        source, destination = ends[edge]
        keep[0, source, destination] = 0
        after = loss(keep)
        if after - now < threshold:
            now = after
        else:
            keep[0, source, destination] = 1
    return graph.flat(keep[0]) > 0, now
