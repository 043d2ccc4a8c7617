"""A planted model from its options: prompts, wiring, weights, and the module they make."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits import handmade
from circuits.planted import prompts, weights, wiring
from circuits.planted.prompts import BOS, COLOURS, ID, UNKNOWN
from circuits.planted.weights import Plan
from circuits.planted.wiring import Draft
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel
from workbench.prompts import Batch, Task, sample

SOURCES = ("copy", "induction", "pointer", "inhibition")
CHOICES = {
    "gate": ("xor", "and"),
    "lookup": ("none", "before", "after"),
    "fillers": ("same", "fresh", "constant"),
}
EXAMPLES = 48  # prompts on which the weights are scaled


@dataclass(frozen=True)
class Planted:
    """A model and what was planted in it.

    nodes       heads and MLPs of the circuit
    edges       its edges, in the names of `Graph.of(model.config)`
    scaffold    edges that the circuit needs, but that carry the same in both prompts
    redundant   nodes of the circuit that matter only together
    roles       what each node of the circuit does, in words
    recipe      the arguments of `plant`
    task        draws prompts; not registered
    """

    model: LanguageModel
    nodes: frozenset[str]
    edges: frozenset[str]
    scaffold: frozenset[str]
    redundant: frozenset[str]
    roles: Mapping[str, str]
    recipe: Mapping[str, Any]
    task: Task

    def batch(self, n: int, seed: int = 0) -> Batch:
        """n different prompts, all of one length; the same for the same seed."""
        return sample(self.task, self.model, n, seed)


def plant(
    seed: int,
    *,
    n_layers: int = 4,
    n_heads: int = 6,
    d_head: int = 32,
    circuit: str = "induction",
    gate: str = "xor",
    lookup: str = "none",
    hops: int = 0,
    width: int = 1,
    movers: int = 1,
    negative: int = 0,
    redundant: bool = False,
    saturated: bool = False,
    loud: float = 1.0,
    fillers: str = "same",
    n_values: int = 4,
    rotate: bool = True,
) -> Planted:
    """A model with a planted circuit; the module's docstring says what the options plant.

    rotate   False leaves out the random rotation of the residual stream: the same logits, up to rounding

    Raises UserError for options that do not exist, contradict each other, or do not fit into the model.
    """
    recipe = dict(locals())
    kinds = circuit.split("+")
    _check(recipe, kinds)
    rng = random.Random(f"planted/{seed}")
    generator = torch.Generator().manual_seed(rng.randrange(2**62))
    words = prompts.layout(kinds, gate, lookup != "none", hops, n_values, fillers, rng)
    draft = Draft(n_layers, n_heads, rng)
    design = wiring.design(
        draft, words, d_head, lookup=lookup, hops=hops, width=width, movers=3 if redundant else movers,
        negative=negative, redundant=redundant, saturated=saturated, loud=loud, generator=generator,
    )  # fmt: skip
    examples = [words.draw(rng).clean for _ in range(EXAMPLES)]
    tokens = torch.tensor([[ID[word] for word in (BOS, *text.split())] for text in examples])
    grown = weights.grow(design.plan, design.embed, design.codes, tokens, generator)
    state = weights.gpt2(grown, weights.basis(design.plan.d_model, rotate, generator))
    model = _model(state, design.plan, f"planted-{circuit}-{seed}")
    return Planted(
        model=model,
        nodes=frozenset(draft.roles),
        edges=frozenset(draft.edges),
        scaffold=frozenset(draft.scaffold - draft.edges),
        redundant=design.movers if redundant else frozenset(),
        roles=dict(draft.roles),
        recipe=recipe,
        task=Task(model.name, 1, "logit_diff", words.draw, f"planted: the answer is decided by {circuit}"),
    )


def _check(recipe: Mapping[str, Any], kinds: Sequence[str]) -> None:
    for kind in kinds:
        if kind not in SOURCES:
            raise unknown("source", kind, SOURCES)
    if len(kinds) > 2:
        raise UserError(f"circuit={recipe['circuit']!r} has {len(kinds)} sources; one or two can be planted.")
    for name, options in CHOICES.items():
        if recipe[name] not in options:
            raise unknown(name, recipe[name], options)
    bounds = {"n_layers": 1, "n_heads": 1, "d_head": 8, "hops": 0, "width": 1, "movers": 1, "negative": 0}
    for name, least in bounds.items():
        if recipe[name] < least:
            raise UserError(f"{name}={recipe[name]} is too small; take at least {least}.")
    if not 2 <= recipe["n_values"] <= len(COLOURS):
        raise UserError(f"n_values={recipe['n_values']} is not possible; take 2 to {len(COLOURS)}.")
    if not 0 < recipe["loud"] <= 10:
        raise UserError(f"loud={recipe['loud']} is not possible; take more than 0, and at most 10.")
    if recipe["redundant"] and recipe["movers"] != 1:
        raise UserError(f"redundant movers are three; leave movers={recipe['movers']} out.")
    hides = recipe["redundant"] or (recipe["lookup"] == "after" and recipe["saturated"])
    if hides and recipe["negative"]:
        raise UserError(
            f"negative={recipe['negative']} has no effect before an MLP that clips; take 0, or neither redundant=True "
            "nor a saturated lookup after the movers."
        )


def _model(state: Mapping[str, Tensor], plan: Plan, name: str) -> LanguageModel:
    config = {
        "n_embd": plan.d_model,
        "n_layer": plan.n_layers,
        "n_head": plan.n_heads,
        "n_positions": len(plan.codes),
        "layer_norm_epsilon": weights.EPSILON,
    }
    module, words, digest = handmade.gpt2(config, state, ID, UNKNOWN, bos=BOS)
    return LanguageModel(module, words, name=name, fingerprint=digest)
