"""Is what a run found the mechanism? Circuits of an earlier run, judged on other prompts.

    wb run eap-ig --task ioi                                  -> eap-ig-1a2b..., scores of edges
    wb run judge-sizes --task ioi --seed 1 --found eap-ig-1a2b...              faithfulness over sizes
    wb run judge --task ioi --seed 1 --found eap-ig-1a2b... --size 200         one of them, and each of its nodes

The circuit of a run that scores nodes or edges is made of those of largest absolute score; a run that found a circuit
has it already. The measures are those of `circuits.evaluate`.
"""

from __future__ import annotations

from dataclasses import replace

from circuits import evaluate
from circuits.evaluate import Curve, Report
from circuits.graph import INPUT, Circuit, EdgeScores, Graph, node_of, transformer
from circuits.writes import Ablation
from workbench import plots, pretrained, runs
from workbench.activations import ActivationStore
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel
from workbench.prompts import Batch
from workbench.registry import analysis
from workbench.runs import Run
from workbench.scores import NodeScores

SCORED = "that scored nodes or edges, or found a circuit"
STEPS = (1, 2, 5)


@analysis("judge-sizes", version=1, n=32)
def judge_sizes(
    model: LanguageModel, batch: Batch, store: ActivationStore, seed: int, *, found: str = "",
    ablation: Ablation = "resample",
) -> Curve:  # fmt: skip
    """How faithful circuits of 1, 2, 5, 10, ... of a run's best nodes or edges are, up to all.

    found     id of the run
    ablation  of everything outside a circuit
    """
    run = runs.named(found, model, SCORED)
    scores = scores_of(run)
    if scores is None:
        raise UserError(f"{found} found one circuit and no scores, so there are no sizes to choose from; use judge.")
    total = len(scores.scores)
    fractions = [size / total for size in ladder(total)]
    curve = evaluate.curve(model, batch, store, scores, ablation=ablation, fractions=fractions)
    return replace(curve, definition=f"{curve.definition}; {_apart(run, batch, seed)}")


@analysis("judge", version=1, n=32)
def judge(
    model: LanguageModel, batch: Batch, store: ActivationStore, seed: int, *, found: str = "", size: int | None = None,
    without: str = "", each: bool = True, ablation: Ablation = "resample", subsets: int = 20, random: int = 20,
) -> Report:  # fmt: skip
    """Judge one circuit of a run: what it keeps, what is left without it and without each of its nodes, random ones.

    found     id of the run
    size      how many of the nodes or edges of largest score; none if the run found a circuit
    without   nodes to leave out, separated by commas
    each      also without each of its nodes, which costs a circuit each
    ablation  of everything outside a circuit
    subsets   random parts of the circuit that are taken away from it and from the model
    random    random circuits of the same make-up
    """
    run = runs.named(found, model, SCORED)
    circuit = circuit_of(run, size, Graph.of(model.config))
    if not of_heads(circuit):
        raise UserError(f"{found} found a circuit of latents, which runs with all of the model; try patch-nodes.")
    circuit = without_nodes(circuit, without)
    report = evaluate.report(
        model, batch, store, circuit, ablation=ablation, subsets=subsets, random=random, each=each, seed=seed
    )
    return replace(report, definition=f"{report.definition}; {_apart(run, batch, seed)}")


def ladder(total: int) -> list[int]:
    """1, 2, 5, 10, ... and the total."""
    sizes = [step * 10**power for power in range(len(str(total))) for step in STEPS]
    return [*(n for n in sizes if n < total), total]


def has_circuit(result: object) -> bool:
    """Whether there is something to judge: scores of heads, MLPs or edges, or a circuit of them."""
    return isinstance(result, Circuit | EdgeScores) or plots.node_scores(result) is not None


def of_heads(circuit: Circuit) -> bool:
    """Whether it is of a transformer's heads and MLPs, and can be run without the rest; else it is of latents."""
    return INPUT in circuit.graph.sources


def scores_of(run: Run) -> NodeScores | EdgeScores | None:
    """What a run gives nodes or edges of a transformer's graph, if it does."""
    result = run.result
    return result if isinstance(result, EdgeScores) else plots.node_scores(result)


def graph_of(run: Run) -> Graph | None:
    """The graph that a run's scores are about; for scores of nodes that of its model, if that is on this machine."""
    scores = scores_of(run)
    if isinstance(scores, EdgeScores):
        return scores.graph
    shape = pretrained.shape(run.record["model_name"])
    if scores is None or shape is None:
        return None
    graph = transformer(*shape)
    return graph if set(scores.nodes) <= set(graph.nodes) else None


def circuit_of(run: Run, size: int | None, graph: Graph | None = None) -> Circuit:
    """Of a size, or the one that the run found. Scores of nodes do not tell the graph, which has to be given.

    Raises UserError for a run without any, and a size it has not.
    """
    result = run.result
    if isinstance(result, Circuit):
        if size is not None:
            raise UserError(f"{run.id} found one circuit, of {len(result)} edges; leave size out.")
        return result
    scores = scores_of(run)
    if scores is None:
        raise UserError(f"{run.id} is of {run.record['key']['analysis']}, which finds no circuit; take eap-ig, say.")
    total = len(scores.scores)
    if size is None or not 0 < size <= total:
        raise UserError(f"size={size} of {run.id}; give how many of its {total} nodes or edges, from 1.")
    graph = scores.graph if isinstance(scores, EdgeScores) else graph
    if graph is None:
        raise UserError(f"{run.id} scores nodes, and no graph of its model is given.")
    kept = evaluate.best(graph, scores, size)
    weights = scores.scores if isinstance(scores, EdgeScores) else None
    level = "edges" if isinstance(scores, EdgeScores) else "nodes"
    return Circuit(
        graph, kept, f"the {size} {level} of largest absolute score of {run.id}", model=run.record["model_name"],
        task=run.record["key"].get("task", ""), method=run.record["key"]["analysis"], weights=weights,
    )  # fmt: skip


def neighbours(circuit: Circuit, node: str) -> dict[str, list[tuple[str, float]]]:
    """The edges of a circuit into a node and out of it, strongest first."""
    graph = circuit.graph
    weights = circuit.kept.float() if circuit.weights is None else circuit.weights
    found: dict[str, list[tuple[str, float]]] = {"it reads": [], "it is read by": []}
    for i in circuit.kept.nonzero()[:, 0].tolist():
        source, destination = graph.edges[i].tolist()
        if node_of(graph.destinations[destination]) == node:
            found["it reads"].append((graph.names[i], float(weights[i])))
        if graph.sources[source] == node:
            found["it is read by"].append((graph.names[i], float(weights[i])))
    return {name: sorted(edges, key=lambda edge: -abs(edge[1])) for name, edges in found.items()}


def strongest(circuit: Circuit, scores: EdgeScores | NodeScores | None) -> str:
    """The node of largest absolute score, or through whose edges most goes."""
    if isinstance(scores, NodeScores):
        values = dict(zip(scores.nodes, scores.scores.abs().tolist(), strict=True))
        return max(circuit.nodes, key=lambda name: values.get(name, 0.0))
    weights = circuit.kept.float() if circuit.weights is None else circuit.weights.abs() * circuit.kept
    through = circuit.graph.dense(weights).sum(1).tolist()
    return max(circuit.nodes, key=lambda name: through[circuit.graph.sources.index(name)])


def without_nodes(circuit: Circuit, without: str) -> Circuit:
    """Raises UserError for a node that the circuit does not have."""
    names = [name.strip() for name in without.split(",") if name.strip()]
    for name in names:
        if name not in circuit.nodes:
            raise unknown("node of the circuit", name, circuit.nodes)
    if not names:
        return circuit
    kept = circuit.kept & circuit.graph.between(set(circuit.graph.nodes) - set(names))
    words = f"{circuit.definition}, without {', '.join(names)}"
    return replace(circuit, kept=kept, definition=words)


def _apart(run: Run, batch: Batch, seed: int) -> str:
    """Whether a circuit is judged on what it was found on."""
    key = run.record["key"]
    if key.get("task") != batch.task.name:
        return f"found on another task, {key.get('task')}"
    same = key["seed"] == seed
    return (
        "judged on prompts that it was found on" if same else "judged on prompts of another seed than it was found on"
    )
