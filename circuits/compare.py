"""Many methods on one task: do they agree, do they find what is known, does what they find do the task, at what cost.

Half of the prompts are for finding, the other half for judging. Methods are compared on the attention heads, which all
of them score (an edge method by the largest score of a head's edges); circuits of heads keep all MLPs. Methods that
score edges are also judged by the circuits of their edges.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from circuits import evaluate
from circuits.evaluate import Ends, Judged
from circuits.graph import EdgeScores
from circuits.known import Known
from circuits.known import get as known_circuit
from circuits.recovery import recovery
from workbench import parts, registry, scores
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.plots import node_scores
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import Analysis, analysis
from workbench.scores import NodeScores

METHODS = "patching,attribution-patching,eap,eap-ig,node-pruning,sae-codes"
EXACT = "patching"
STORED = ("hook_resid_pre", "attn.hook_z", "attn.hook_rot_k", "attn.hook_k", "attn.hook_v", "hook_mlp_out")


@dataclass(frozen=True)
class Comparison:
    """One row per method.

    scores     of the heads, as each method gives them; agreement: Spearman correlation of their absolute values
    table      by method: `exact` (correlation with exact patching), `heads` and `heads_f` (size and held-out
               faithfulness of the smallest faithful circuit of heads), `heads_cmd`, the same for edges, `auc` and its
               95 % against a known circuit, `seconds` and `passes` on the finding half; None where there is none
    failed     the methods that refused this model or task, and why: the others are not lost with them
    """

    methods: tuple[str, ...]
    heads: tuple[str, ...]
    scores: Float[Tensor, "method head"]
    agreement: Float[Tensor, "method method"]
    table: dict[str, dict[str, float | None]]
    failed: dict[str, str]
    definition: str

    def summary(self) -> dict[str, Any]:
        def short(row: dict[str, float | None]) -> dict[str, float | None]:
            return {name: None if value is None else round(value, 4) for name, value in row.items()}

        table = {name: short(row) for name, row in self.table.items()}
        return {"table": table, "failed": self.failed, "definition": self.definition}


@analysis("compare", version=3, n=32)
def compare(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    methods: str = METHODS,
    truth: str = "none",
    at_least: float = 0.9,
    ablation: Judged = "resample",
    edges: bool = True,
) -> Comparison:
    """Run several discovery methods with their default parameters and judge them on held-out prompts.

    methods   names of analyses, separated by commas
    truth     a published circuit to hold the heads to (its name in circuits.known), or none
    at_least  faithfulness that a circuit must reach on held-out prompts
    ablation  of everything outside a circuit when it is judged; optimal fits constants on the finding half
    edges     also judge circuits of edges, for methods that score them

    A method that refuses the model or task is left out and named in the result. Raises UserError if all do. A run that
    was killed goes on with the first method that was not judged.
    """
    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    if not names:
        raise UserError("methods is empty; name analyses that score nodes or edges, separated by commas.")
    chosen = [scoring(name) for name in names]
    known = None if truth == "none" else _truth(truth, model, batch)
    find, judge = halves(batch)
    # Stored first, so that a method's cost does not depend on which methods ran before it.
    stored = [hook for hook in model.hook_points if hook.endswith(STORED)]
    store.fill(model, [*batch.clean, *batch.corrupted], [*stored, model.hook_points[-1]])
    table: dict[str, dict[str, float | None]] = {}
    failed: dict[str, str] = {}
    by_head: list[NodeScores] = []

    ends = evaluate.ends_of(model, judge, store, ablation=ablation, fit=find)
    judges = _Judges(model, store, find, judge, ends, known, at_least, ablation, edges)
    for method in track(chosen, "compare"):
        try:
            found = parts.once(method.name, _Row, partial(judges.row, method))
        except UserError as error:
            failed[method.name] = str(error)
            continue
        by_head.append(found.heads)
        table[method.name] = found.figures
    if not by_head:
        raise UserError(f"every method failed; {names[0]}: {failed[names[0]]}")
    names = tuple(table)
    agreement = torch.tensor([[scores.rank_agreement(one, other) for other in by_head] for one in by_head])
    for i, name in enumerate(names):
        table[name]["exact"] = float(agreement[i, names.index(EXACT)]) if EXACT in names else None
    return Comparison(
        names,
        by_head[0].nodes,
        torch.stack([heads.scores.float() for heads in by_head]),
        agreement,
        table,
        failed,
        f"found on {len(find)} prompts, judged on {len(judge)} others; smallest circuit of best-scored heads (with all "
        f"MLPs) or edges with faithfulness {at_least:g} to {2 - at_least:g}, ablation {ablation}, ratio of means; "
        "exact and agreement: Spearman correlation of absolute head scores; cost once both prompts' activations are "
        "stored" + ("" if known is None else f"; AUC of heads against {known}"),
    )


@dataclass(frozen=True)
class _Row:
    """What a comparison keeps of one method."""

    heads: NodeScores
    figures: dict[str, float | None]


@dataclass(frozen=True)
class _Judges:
    """What all methods are judged by: prompts to find with and to judge by, and the ends of the scale."""

    model: LanguageModel
    store: ActivationStore
    find: Batch
    judge: Batch
    ends: Ends
    known: Known | None
    at_least: float
    ablation: Judged
    edges: bool

    def row(self, method: Analysis) -> _Row:
        started, passes = time.perf_counter(), self.model.forward_passes
        found = score(method, self.model, self.find, self.store)
        seconds, passes = time.perf_counter() - started, self.model.forward_passes - passes
        heads = _heads(found)
        figures = self.circuits(heads, "heads")
        if self.edges and isinstance(found, EdgeScores):
            figures |= self.circuits(found, "edges")
        if self.known is not None:
            against = recovery(heads, self.known.heads, name=str(self.known))
            figures |= {"auc": against.auc, "auc_low": against.auc_low, "auc_high": against.auc_high}
        return _Row(heads, figures | {"seconds": seconds, "passes": float(passes)})

    def circuits(self, found: NodeScores | EdgeScores, level: str) -> dict[str, float | None]:
        asked: dict[str, Any] = {"ablation": self.ablation, "fit": self.find, "ends": self.ends}
        prompts = self.model, self.judge, self.store
        size, reached = evaluate.smallest(*prompts, found, at_least=self.at_least, **asked)
        return {
            level: float(size),
            f"{level}_f": reached,
            f"{level}_cmd": evaluate.curve(*prompts, found, **asked).area,
        }


def _truth(name: str, model: LanguageModel, batch: Batch) -> Known:
    """A published circuit, if it is of this model and task: heads of other models have the same names."""
    found = known_circuit(name)
    if (found.model, found.task) != (model.name, batch.task.name):
        raise UserError(
            f"truth={name!r} is a circuit of {found.model} on {found.task}, not of {model.name} on {batch.task.name}."
        )
    return found


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Every other prompt of each length: one half to find with, one to judge by. Raises UserError below 4 prompts."""
    if len(batch) < 4:
        raise UserError(f"{len(batch)} prompts cannot be halved for finding and judging; ask for at least 4.")
    order = [i for bucket in batch.buckets() for i in bucket.tolist()]
    return batch.select(sorted(order[::2])), batch.select(sorted(order[1::2]))


def scoring_methods() -> list[str]:
    """Analyses that score nodes or edges of a task, by name."""
    return [name for name, one in registry.analyses().items() if one.task is not None and _scores(one)]


def scoring(name: str) -> Analysis:
    """An analysis that scores nodes or edges. Raises UserError for any other, before it computes anything."""
    found = registry.get_analysis(name)
    if not _scores(found):
        raise UserError(
            f"{name!r} gives a {found.result.__name__}, which scores no nodes or edges; take patching or eap-ig."
        )
    return found


def _scores(one: Analysis) -> bool:
    return one.result in (NodeScores, EdgeScores) or get_type_hints(one.result).get("scores") is NodeScores


def score(
    method: Analysis, model: LanguageModel, batch: Batch, store: ActivationStore, **parameters: Any
) -> NodeScores | EdgeScores:
    """The scores of an analysis that `scoring` lets pass."""
    found = method.fn(model, batch, store, **registry.bind(method, parameters))
    scores = found if isinstance(found, EdgeScores) else node_scores(found)
    assert scores is not None
    return scores


def _heads(found: NodeScores | EdgeScores) -> NodeScores:
    """Scores of the heads alone."""
    nodes = found.nodes() if isinstance(found, EdgeScores) else found
    heads = nodes.heads()
    return NodeScores(
        tuple(heads), torch.tensor(list(heads.values())), nodes.definition, nodes.unit, headline=nodes.headline
    )
