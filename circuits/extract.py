"""One circuit to keep: found by any method on half of the prompts, judged on the other half.

Of the size that is asked for, or the smallest that is faithful on the held-out half. `wb extract` makes one for each of
many models, tasks and methods.
"""

from __future__ import annotations

from circuits import evaluate
from circuits.compare import halves, score, scoring
from circuits.graph import Circuit, EdgeScores, Graph
from circuits.writes import Ablation
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch
from workbench.registry import analysis


@analysis("extract", version=2, n=32)
def extract(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    method: str = "eap-ig",
    size: int | None = None,
    at_least: float = 0.9,
    ablation: Ablation = "resample",
) -> Circuit:
    """The circuit that a method finds, of a given size or the smallest that is faithful, judged on held-out prompts.

    method    an analysis that scores nodes or edges, with its default parameters
    size      how many nodes or edges of largest score; none: as few as are faithful
    at_least  held-out faithfulness of the smallest circuit, which is also at most 2 minus this
    ablation  of everything outside the circuit, also while it is found if the method leaves the choice
    """
    chosen = scoring(method)
    if size is not None and size < 1:
        raise UserError(f"size={size} makes no circuit; ask for at least 1 node or edge.")
    if not 0 < at_least <= 1:
        raise UserError(f"at_least={at_least:g} must be above 0 and at most 1, the faithfulness of the whole model.")
    find, judge = halves(batch)
    scores = score(chosen, model, find, store, **({"ablation": ablation} if "ablation" in chosen.parameters else {}))
    level = "edges" if isinstance(scores, EdgeScores) else "nodes"
    if size is None:
        n, _ = evaluate.smallest(model, judge, store, scores, at_least=at_least, ablation=ablation)
    elif size <= len(scores.scores):
        n = size
    else:
        raise UserError(f"size={size} is more than the {len(scores.scores)} {level} that {method} scores.")
    graph = Graph.of(model.config)
    kept = evaluate.best(graph, scores, n)
    found = evaluate.faithfulness(model, judge, store, graph, kept[None], ablation=ablation)
    why = (
        f"fewest that were tried with faithfulness {at_least:g} to {2 - at_least:g} on these"
        if size is None
        else "given"
    )
    return Circuit(
        graph,
        kept,
        f"{n} {level} of largest absolute score, those without one, and no edge that is on no path from input to "
        f"logits; found on {len(find)} prompts, judged on {len(judge)} others (ratio of means, ablation {ablation}); "
        f"size: {why}; score: {scores.definition}",
        model=model.name,
        task=batch.task.name,
        method=method,
        weights=scores.scores if isinstance(scores, EdgeScores) else None,
        headline={
            "size": n,
            "level": level,
            "faithfulness": round(float(found.value[0]), 4),
            "faithfulness_95": [round(float(found.low[0]), 4), round(float(found.high[0]), 4)],
            "ablation": ablation,
        },
    )
