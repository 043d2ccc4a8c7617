"""What is reported with every circuit of a weight-sparse model: that it suffices is the weakest thing to say of it.

Mask learning is an optimiser, and can make a circuit where there is none. Beside the loss of the circuit alone stand
what ablations say (`circuits.sparse.ablations`: necessity, and subsets of the rest), and what the same pruning finds

    nonsense        with labels that mean nothing (Drori 2026)
    random weights  in a model with the same weights in other places
    backup          without the circuit's channels: whether it is the only one
    stability       with other seeds

Losses are in nats per prompt on pairs that no circuit was found on; chance is ln 2. Scale and shift of the answers'
difference were fitted to the circuit alone, and are used where everything else is ablated. The whole model, and what is
left of it without the circuit, are as they are. In between neither is right: see `Subsets`.

A circuit that has learned its pairs by heart can reach any target on them: a control that meets the target says little
before its loss on other pairs is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.sparse.ablations import ADVERSARY, Necessity, Subsets, Sufficiency, necessity, subsets, sufficiency
from circuits.sparse.prune import SEARCH, Pruned, Question, Searched, Settings, ask
from circuits.sparse.variants import shuffled
from workbench import parts
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch

__all__ = [
    "Control", "Necessity", "Stability", "Subsets", "Sufficiency", "Validation", "backup", "geometric_mean",
    "necessity", "nonsense", "random_weights", "stability", "subsets", "sufficiency", "validate",
]  # fmt: skip
T = TypeVar("T")
SAME = 1e-2  # nats: more than other numerics change a loss by


# ---- results ----


@dataclass(frozen=True)
class Control:
    """What the same pruning finds where the circuit cannot be.

    reached    whether any setting met the target on the pairs it was pruned on
    loss       the least there, of circuits that are made as small as the target allows, with its standard errors
    whole      loss of the whole model on the other pairs
    kept       the smallest circuit, how many nodes and edges it has, and its loss on the other pairs; None where no
               setting met the target
    necessity  of this circuit, for random weights
    """

    reached: bool
    loss: float
    whole: float
    kept: Bool[Tensor, " channel"] | None = None
    nodes: int | None = None
    edges: int | None = None
    held_out: float | None = None
    necessity: Necessity | None = None

    @classmethod
    def of(cls, question: Question, found: Searched) -> Control:
        best = found.best
        if best is None:
            return cls(False, found.least, question.whole)
        return cls(
            True, found.least, question.whole, best.kept, len(best.nodes), len(best.circuit), best.held_out
        )  # fmt: skip

    def summary(self) -> dict[str, Any]:
        out: dict[str, Any] = {"reached": self.reached, "loss": round(self.loss, 4)}
        if self.held_out is not None:
            out |= {"nodes": self.nodes, "edges": self.edges, "held_out_loss": round(self.held_out, 4)}
        return out if self.necessity is None else out | {"ablated": self.necessity.summary()}


@dataclass(frozen=True)
class Stability:
    """Circuits that several seeds of the gates find, with the settings that found the circuit.

    seeds          the circuit's own first; reached: those of them with which the target was met
    nodes, edges   how many each circuit has, in the order of `reached`
    same_nodes     mean over pairs of circuits of shared nodes / nodes of either (Jaccard); same_edges: of edges, 1
                   where neither has any; None with fewer than two circuits
    """

    seeds: tuple[int, ...]
    reached: tuple[int, ...]
    nodes: tuple[int, ...]
    edges: tuple[int, ...]
    same_nodes: float | None
    same_edges: float | None

    def summary(self) -> dict[str, Any]:
        return {
            "seeds": len(self.seeds),
            "reached": len(self.reached),
            "edges": [min(self.edges), max(self.edges)],
            "same_nodes": None if self.same_nodes is None else round(self.same_nodes, 3),
            "same_edges": None if self.same_edges is None else round(self.same_edges, 3),
        }


@dataclass(frozen=True)
class Validation:
    """All of it."""

    model: str
    task: str
    sufficiency: Sufficiency
    necessity: Necessity
    subsets: Subsets
    nonsense: Control
    random_weights: Control
    backup: Control
    stability: Stability
    definition: str

    def summary(self) -> dict[str, Any]:
        return {
            **self.sufficiency.summary(),
            "loss_more_without": self.necessity.summary(),
            "subsets_ablated": self.subsets.summary(),
            "nonsense": self.nonsense.summary(),
            "random_weights": self.random_weights.summary(),
            "backup": self.backup.summary(),
            "stability": self.stability.summary(),
            "definition": self.definition,
        }


# ---- the same pruning, where the circuit cannot be ----


def nonsense(question: Question, search: Sequence[Settings] = SEARCH, seed: int = 0) -> Control:
    """The same pairs with right and wrong exchanged in a random half of them, which no prompt tells.

    A circuit that meets the target on some pairs has learned them by heart, and fails on others.
    """
    generator = torch.Generator().manual_seed(seed)
    find, judge = (masked.mislabelled(generator) for masked in (question.find, question.judge))
    question = replace(question, find=find, judge=judge)
    return Control.of(question, question.search(search, seed))


def random_weights(question: Question, search: Sequence[Settings] = SEARCH, seed: int = 0, draws: int = 20) -> Control:
    """The same model with each matrix's weights in random places.

    A circuit found here was made by pruning: how small it gets is what the real one must be compared with. It is not
    necessary, as the whole model does not do the task.
    """
    question = question.varied(shuffled(question.find.channels.model, seed))
    found = question.search(search, seed)
    out = Control.of(question, found)
    return out if out.kept is None else replace(out, necessity=necessity(question, out.kept, draws=draws, seed=seed))


def backup(question: Question, found: Pruned, search: Sequence[Settings] = SEARCH, seed: int = 0) -> Control:
    """Whether the model has another circuit, with none of this one's channels, which are held at their fill.

    The settings that found the circuit are tried first, and the others only if these find nothing.
    """
    another = question.search((found.settings,), seed, without=found.kept)
    rest = [settings for settings in search if settings != found.settings]
    if another.best is None and rest:
        more = question.search(rest, seed, without=found.kept)
        another = Searched([*another.tried, *more.tried], more.best)
    return Control.of(question, another)


def stability(question: Question, found: Pruned, seeds: Sequence[int] | None = None) -> Stability:
    """Circuits that other seeds of the gates find; None: the two seeds that follow the circuit's own."""
    own = int(found.headline["seed"])
    seeds = (own + 1, own + 2) if seeds is None else seeds
    if own in seeds:
        raise UserError(f"seed {own} is the circuit's own, and finds it again; give others.")
    others = {seed: question.search((found.settings,), seed).best for seed in seeds}
    circuits = [found, *(best for best in others.values() if best is not None)]
    reached = (own, *(seed for seed, best in others.items() if best is not None))
    return Stability(
        (own, *seeds), reached, tuple(len(one.nodes) for one in circuits), tuple(len(one.circuit) for one in circuits),
        _overlap([one.kept for one in circuits]), _overlap([one.circuit.kept for one in circuits]),
    )  # fmt: skip


# ---- the whole of it ----


def validate(
    model: LanguageModel,
    found: Pruned,
    train: Batch,
    test: Batch,
    stream: Int[Tensor, "batch pos"] | None = None,
    *,
    search: Sequence[Settings] = SEARCH,
    adversary: Settings = ADVERSARY,
    seed: int = 0,
    draws: int = 20,
    part: str | None = None,
) -> Validation:
    """Everything that is reported with a circuit that `prune` found on these pairs.

    stream     as given to `prune`; target, its certainty, ablation and frozen norms are the circuit's
    search     settings that the controls are pruned with: those that the circuit was chosen from
    adversary  settings that the worst subset is searched with
    seed       of gates, labels, places of weights and subsets
    draws      random sets of channels, of each kind
    part       begins the names by which a run that is killed finds again what it had (`workbench.parts`)

    Takes about three times as long as the pruning did.

    Raises UserError if the circuit was not found by `prune`, or with another model, other pairs or another stream.
    """
    words = {name: found.headline.get(name) for name in ("target", "ablation", "freeze_norms", "sure")}
    if None in words.values():
        raise UserError("the circuit does not say how it was found; give what prune returned.")
    question = ask(model, train, test, stream, **words)  # type: ignore[arg-type]
    if len(question.find.channels) != len(found.kept):
        raise UserError(
            f"the circuit is of a model with {len(found.kept)} channels, and {model.name} has "
            f"{len(question.find.channels)}; give the model it was found in."
        )
    alone = sufficiency(question, found)
    if abs(alone.loss - found.held_out) > SAME:
        raise UserError(
            f"the circuit's loss was {found.held_out:.4f} when it was found, and is {alone.loss:.4f} here; give the "
            "model, the pairs and the stream that it was found with."
        )

    def kept(name: str, kind: type[T], compute: Callable[[], T]) -> T:
        return compute() if part is None else parts.once(f"{part}-{name}", kind, compute)

    return Validation(
        model.name,
        train.task.name,
        alone,
        kept("necessity", Necessity, lambda: necessity(question, found.kept, draws=draws, seed=seed)),
        kept("subsets", Subsets, lambda: subsets(question, found, draws=draws, settings=adversary, seed=seed)),
        kept("nonsense", Control, lambda: nonsense(question, search, seed)),
        kept("random-weights", Control, lambda: random_weights(question, search, seed, draws)),
        kept("backup", Control, lambda: backup(question, found, search, seed)),
        kept("stability", Stability, lambda: stability(question, found)),
        f"losses in nats per prompt on {len(test)} other pairs, chance {math.log(2):.4f}; {found.circuit.definition}",
    )


def geometric_mean(counts: Sequence[int]) -> float:
    """Of edges over tasks; a circuit without edges counts as one of one edge, or the mean would be 0.

    Raises UserError if there are none.
    """
    if not counts:
        raise UserError("there are no circuits whose edges could be averaged; find one at least.")
    return math.exp(sum(math.log(max(1, count)) for count in counts) / len(counts))


def _overlap(sets: Sequence[Bool[Tensor, " _"]]) -> float | None:
    """Mean Jaccard index over pairs."""
    found = []
    for one, other in combinations(sets, 2):
        either = int((one | other).sum())
        found.append(int((one & other).sum()) / either if either else 1.0)
    return sum(found) / len(found) if found else None
