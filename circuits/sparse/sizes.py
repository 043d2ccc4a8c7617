"""`wb run sparse-circuit`: one circuit of a run of `sparse-tasks`, channel by channel, and how well fewer of its
channels do.

Of the circuit are kept the channels that it can spare least, each judged alone (`Node.loss_without`). That is one order
of many: a smaller circuit with the same loss may exist, and pruning with a higher target looks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.graph import Circuit, Graph
from circuits.judging import ladder
from circuits.sparse.channels import Channels
from circuits.sparse.masked import calibrated
from circuits.sparse.prune import ask, circuit_of
from circuits.sparse.pruning_run import drawn, stream_of
from circuits.sparse.reading import Reading, read
from workbench import runs
from workbench.activations import ActivationStore
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis


@dataclass(frozen=True)
class SizedCircuit:
    """
    circuit   on the graph of its own channels and of all nonzero weights between them
    reading   what each of its channels does, in order of computation
    sizes     numbers of channels, and with so many of them `loss`, in nats per prompt on held-out pairs (scale and
              shift are fitted anew on the pairs that the circuit was found on), and `edges`
    whole     loss of the whole model, and `none` without any channel
    """

    circuit: Circuit
    reading: Reading
    sizes: Int[Tensor, " size"]
    loss: Float[Tensor, " size"]
    edges: Int[Tensor, " size"]
    whole: float
    none: float
    definition: str

    def at(self, size: int) -> SizedCircuit:
        """The same with so many of its channels. Raises UserError for a size it has not."""
        if not 0 < size <= len(self.reading.nodes):
            raise UserError(f"size={size} of a circuit of {len(self.reading.nodes)} channels; give 1 to all.")
        chosen = {node.name for node in self.reading.strongest(size)}
        nodes = [node for node in self.reading.nodes if node.name in chosen]
        return replace(
            self, circuit=compact(self.circuit, [node.name for node in nodes]),
            reading=replace(self.reading, nodes=nodes),
        )  # fmt: skip

    def summary(self) -> dict[str, Any]:
        rows = zip(self.sizes.tolist(), self.edges.tolist(), self.loss.tolist(), strict=True)
        return {
            "n_nodes": len(self.reading.nodes),
            "n_edges": len(self.circuit),
            "held_out_loss": round(float(self.loss[-1]), 4),
            "whole_model_loss": round(self.whole, 4),
            "loss_without_any": round(self.none, 4),
            "sizes": [[n, edges, round(loss, 4)] for n, edges, loss in rows],
            "strongest": [[node.name, round(node.loss_without, 3)] for node in self.reading.strongest(8)],
            "definition": self.definition,
        }


def compact(circuit: Circuit, names: list[str]) -> Circuit:
    """A circuit on the graph of some of its channels and the edges that it keeps between them."""
    graph, own = circuit.graph, set(names)
    rows = [
        i for i in circuit.kept.nonzero()[:, 0].tolist()
        if graph.sources[graph.edges[i, 0]] in own and graph.destinations[graph.edges[i, 1]] in own
    ]  # fmt: skip
    place = {name: i for i, name in enumerate(names)}
    ends = [
        (place[graph.sources[s]], place[graph.destinations[d]]) for s, d in graph.edges[rows].tolist()
    ]  # fmt: skip
    small = Graph(tuple(names), tuple(names), torch.tensor(ends, dtype=torch.long).reshape(-1, 2))
    weights = None if circuit.weights is None else circuit.weights[rows]
    return replace(circuit, graph=small, kept=torch.ones(len(rows), dtype=torch.bool), weights=weights)


@analysis("sparse-circuit", n=32, model="pycode-small", task="with_as")
def sparse_circuit(
    model: LanguageModel, batch: Batch, store: ActivationStore, seed: int, *, found: str = ""
) -> SizedCircuit:
    """One circuit of a run of sparse-tasks, channel by channel, and how well fewer of its channels do.

    found  id of the run; with its seed and as many pairs as it had, what is judged on is what it was judged on
    """
    run = runs.named(found, model, "of sparse-tasks", "sparse-tasks")
    parameters, result = run.record["key"]["parameters"], run.result
    task = batch.task.name
    row = result.rows.get(task)
    if row is None or row.kept is None or row.scale is None:
        raise unknown("circuit of the task", task, result.reached)
    channels = Channels(model)
    train, test = drawn(batch.task, model, len(batch), seed)
    stream = stream_of(model, parameters["real"]) if parameters["ablation"] == "mean" else None
    question = ask(model, train, test, stream, target=parameters["target"], ablation=parameters["ablation"])
    reading = read(question, row.kept, row.scale)
    loss = []
    sizes = ladder(len(reading.nodes))
    for size in track(sizes, "sizes"):
        chosen = {node.name for node in reading.strongest(size)}
        mask = torch.tensor([float(name in chosen) for name in channels.names])
        scale = row.scale if size == sizes[-1] else calibrated(question.find.odds(mask), question.find.pairs)
        loss.append(question.judge.loss(mask, scale))
    circuit = compact(circuit_of(channels, row.kept, task, result.definition), [node.name for node in reading.nodes])
    none = torch.zeros(len(channels))
    sized = SizedCircuit(
        circuit, reading, torch.tensor(sizes), torch.tensor(loss), torch.tensor(sizes), question.whole,
        question.judge.loss(none, calibrated(question.find.odds(none), question.find.pairs)),
        f"channels that the circuit can spare least, each judged alone; nats per prompt on {len(test)} held-out pairs, "
        f"ablation {parameters['ablation']}; the circuit: {result.definition}",
    )  # fmt: skip
    return replace(sized, edges=torch.tensor([len(sized.at(size).circuit) for size in sizes]))
