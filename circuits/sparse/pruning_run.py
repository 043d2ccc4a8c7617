"""`wb run sparse-prune`: the circuit of a task in a weight-sparse model, what each of its channels does, and everything
that speaks against it. `wb run sparse-tasks`: the circuits of many tasks, by the same search, as one table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph import Circuit
from circuits.sparse.ablations import Necessity, necessity
from circuits.sparse.channels import Channels
from circuits.sparse.data import TokenStream
from circuits.sparse.masked import Ablated
from circuits.sparse.prune import SEARCH, Pruned, Question, Settings, ask, circuit_of
from circuits.sparse.reading import Reading, read
from circuits.sparse.training_run import SOLVED, accuracies
from circuits.sparse.validate import Validation, geometric_mean, validate
from workbench import parts, registry
from workbench.activations import ActivationStore
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel
from workbench.progress import track
from workbench.prompts import Batch, Task, sample, split
from workbench.registry import analysis
from workbench.tasks.python_code import TASKS

ROWS = 256  # sequences of the training stream over which means are taken
JUDGES, ENOUGH = 4, 512  # test pairs for each train pair, up to that many: a few prompts that fail make most of a loss


@dataclass(frozen=True)
class SparseCircuit:
    """A circuit of channels, what its channels do, and its validation, if that was asked for."""

    pruned: Pruned
    reading: Reading
    validation: Validation | None

    @property
    def circuit(self) -> Circuit:
        return self.pruned.circuit

    def summary(self) -> dict[str, Any]:
        out = self.pruned.summary()
        out["strongest"] = [[node.name, round(node.loss_without, 3)] for node in self.reading.strongest(8)]
        if self.validation is not None:
            out |= {name: value for name, value in self.validation.summary().items() if name not in out}
        return out


@analysis("sparse-prune", version=2, n=512, model="sparse-tiny", task="single_double_quote")
def sparse_prune(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    seed: int,
    *,
    target: float = 0.15,
    ablation: Ablated = "mean",
    freeze_norms: bool = False,
    sure: float = 3.0,
    settings: int = 3,
    steps: int = Settings.steps,
    controls: bool = True,
    real: float | None = None,
) -> SparseCircuit:
    """The smallest circuit of channels that does a binary task as well as asked, found on train pairs, judged on test.

    On few train pairs too few channels meet the target, and the fewest that just meet it on these often miss it on
    others: so by default the loss must be three of its standard errors below it. Test pairs are four times as
    many, up to 512, and never fewer.

    target        loss in nats per prompt that the circuit must meet, of the two answers alone; chance is ln 2
    ablation      what channels outside of the circuit carry: their mean over training text or over the task, zero, or
                  the value on the other prompt of the pair
    freeze_norms  norms divide by what they divide by in the whole model
    sure          standard errors by which the loss must be below the target; 0: as in the paper, and in sparse-tasks
    settings      how many settings of mask learning are tried
    steps         of mask learning with each
    controls      validate the circuit: necessity, subsets, nonsense labels, shuffled weights, backup, other seeds
    real          share of real source in the text over which means are taken; none: as the model was trained
    """
    train, test = drawn(batch.task, model, len(batch), seed)
    stream = stream_of(model, real) if ablation == "mean" else None
    search = _search(settings, steps)
    question = ask(model, train, test, stream, target=target, ablation=ablation, freeze_norms=freeze_norms, sure=sure)
    found = parts.once("pruned", Pruned, lambda: question.circuit(search, seed))
    checked = None
    if controls:
        checked = validate(model, found, train, test, stream, search=search, seed=seed, part="validation")
    return SparseCircuit(found, read(question, found.kept, found.scale), checked)


def drawn(task: Task, model: LanguageModel, pairs: int, seed: int) -> tuple[Batch, Batch]:
    """Train pairs to find a circuit on, and test pairs to judge it."""
    train, test = (split(task, part) for part in ("train", "test"))
    return sample(train, model, pairs, seed), sample(test, model, judges(pairs), seed)


def judges(pairs: int) -> int:
    """How many test pairs judge a circuit that is found on so many."""
    return max(pairs, min(JUDGES * pairs, ENOUGH))


def _search(settings: int, steps: int) -> tuple[Settings, ...]:
    if not 1 <= settings <= len(SEARCH):
        raise UserError(f"settings={settings} cannot be tried; there are 1 to {len(SEARCH)}.")
    if steps < 1:
        raise UserError(f"steps={steps} learns no mask; give at least 1.")
    return tuple(dataclasses.replace(one, steps=steps) for one in SEARCH[:settings])


def stream_of(model: LanguageModel, real: float | None = None, rows: int = ROWS) -> Int[Tensor, "row pos"]:
    """Text that the model was trained on, in rows of its training's length.

    Raises UserError if the model does not say what that was and `real` is not given.
    """
    Channels(model)  # refuses what is not weight-sparse
    recipe = model._module.about.get("recipe", {})
    share, length = recipe.get("real") if real is None else real, min(128, model.config.n_ctx)
    if share is None:
        raise UserError(f"{model.name} does not say what it was trained on; give the share of real source, --real 0.5.")
    stream = TokenStream(model.tokenizer.backend_tokenizer, seed=int(recipe.get("seed", 0)), real=float(share))
    return stream.read(0, rows * length).view(rows, length)


# ---- many tasks ----


@dataclass(frozen=True)
class Row:
    """One task: held-out accuracy and loss of the whole model, and of the smallest circuit; None where none was found.

    without, random  change of the loss without the circuit's channels, and largest of those without as many others
    kept, scale      the circuit's channels, and scale and shift of the answers' difference
    """

    accuracy: float
    whole: float
    loss: float
    nodes: int | None = None
    edges: int | None = None
    held_out: float | None = None
    without: float | None = None
    random: float | None = None
    kept: Bool[Tensor, " channel"] | None = None
    scale: tuple[float, float] | None = None


@dataclass(frozen=True)
class TaskCircuits:
    """Circuits of many tasks in one model, by one search.

    edges  geometric mean over the tasks that have a circuit
    """

    model: str
    rows: dict[str, Row]
    definition: str

    @property
    def reached(self) -> dict[str, int]:
        """Edges by task, where a circuit was found."""
        return {name: row.edges for name, row in self.rows.items() if row.edges is not None}

    def circuit(self, task: str, model: LanguageModel) -> Circuit:
        """The circuit of a task, in the model it was found in. Raises UserError if there is none."""
        row = self.rows.get(task)
        if row is None or row.kept is None:
            raise unknown("circuit of the task", task, self.reached)
        channels = Channels(model)
        if len(channels) != len(row.kept):
            raise UserError(f"{model.name} has {len(channels)} channels, not {len(row.kept)}; load {self.model}.")
        return circuit_of(channels, row.kept, task, self.definition)

    def summary(self) -> dict[str, Any]:
        return {
            "tasks": len(self.rows),
            "solved": sum(row.accuracy >= SOLVED for row in self.rows.values()),
            "circuits": len(self.reached),
            "geometric_mean_edges": round(geometric_mean(list(self.reached.values())), 1) if self.reached else None,
            "edges": [[name, count] for name, count in sorted(self.reached.items(), key=lambda item: item[1])],
            "definition": self.definition,
        }


@analysis("sparse-tasks", version=2, model="sparse-tiny")
def sparse_tasks(
    model: LanguageModel,
    store: ActivationStore,
    seed: int,
    *,
    tasks: str = "solved",
    pairs: int = 128,
    target: float = 0.15,
    ablation: Ablated = "mean",
    settings: int = 3,
    steps: int = Settings.steps,
    real: float | None = None,
) -> TaskCircuits:
    """The smallest circuits of many binary tasks, with how necessary each is, and the geometric mean of their edges.

    tasks     names, separated by commas; all: the twenty on Python; solved: those of them that the model solves
    pairs     of each task to find the circuit on; four times as many others judge it, up to 512, and never fewer
    target    loss in nats per prompt that each circuit must meet
    ablation  what channels outside of a circuit carry
    settings  how many settings of mask learning are tried for each task
    steps     of mask learning with each
    real      share of real source in the text over which means are taken; none: as the model was trained
    """
    names = TASKS if tasks in ("all", "solved") else tuple(name.strip() for name in tasks.split(","))
    chosen = [registry.get_task(name) for name in names]
    stream = stream_of(model, real) if ablation == "mean" else None
    search = _search(settings, steps)
    shares = accuracies(model, names)
    if tasks == "solved":
        chosen = [task for task in chosen if shares[task.name] >= SOLVED]
        if not chosen:
            raise UserError(f"{model.name} solves none of the {len(names)} tasks; name some, --tasks with_as,not_in.")

    def row(task: Task) -> Row:
        train, test = drawn(task, model, pairs, seed)
        question = ask(model, train, test, stream, target=target, ablation=ablation)
        return row_of(question, shares[task.name], search, seed)

    rows = {task.name: parts.once(task.name, Row, lambda task=task: row(task)) for task in track(chosen, "tasks")}  # type: ignore[misc]
    return TaskCircuits(
        model.name, rows,
        f"edges: nonzero weights between the fewest channels with at most {target:g} nats on {pairs} pairs, ablation "
        f"{ablation}, best of {len(search)} settings of {steps} steps; losses on {judges(pairs)} other pairs",
    )  # fmt: skip


def row_of(question: Question, accuracy: float, search: Sequence[Settings], seed: int) -> Row:
    """Prune, and ablate what was found."""
    found = question.search(search, seed)
    if found.best is None:
        return Row(accuracy, question.whole, found.least)
    best = found.best
    needed: Necessity = necessity(question, best.kept, draws=10, seed=seed)
    return Row(
        accuracy, question.whole, best.loss, len(best.nodes), len(best.circuit), best.held_out,
        needed.without - needed.whole, float((needed.random - needed.whole).max()), best.kept, best.scale,
    )  # fmt: skip
