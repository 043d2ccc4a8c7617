"""Steering: what is done to the residual stream at one hook point, at which positions, how strongly.

With x the residual stream, d the direction (a latent's decoder row, or any vector), z the latent's value and c the
amount, which is `strength` times `unit`, the difference that was measured between languages:

    add          x + c d
    clamp        x + (c - z) d
    scale        x + (strength - 1) z d                  (it is strength - 1 that decays)
    ablate       x - z d
    project-out  x - strength (x d / |d|^2) d            (Deng et al. 2025: rank-1 ablation)
    replace      decode(z := c)                          what the SAE does not reconstruct is lost
    swap         x - z d + strength z d'                 one latent's value goes to another

All but `replace` keep what the SAE does not reconstruct. At strength 0, `add` is exactly x, as are `project-out`, and
`scale` at 1. A strength that decays is multiplied by `decay` at every new token.

Rows of a batch can be steered each in its own way: many candidates and strengths in one generation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saes.sae import SAE
from workbench.errors import UserError, unknown
from workbench.generation import Generated, generate
from workbench.models import LanguageModel

Kind = Literal["add", "clamp", "scale", "ablate", "project-out", "replace", "swap"]
Scope = Literal["all", "prompt", "generated", "last"]
OF_LATENTS = ("clamp", "scale", "ablate", "replace", "swap")


@dataclass(frozen=True, eq=False)
class Steering:
    """One way to steer.

    direction  d; None: the latent's decoder row
    unit       what strength 1 is: a difference of the latent between languages, or the length of a mean difference
    other      the latent that `swap` gives the value to
    scope      positions: all, those of the prompt, those of new tokens, or only the last of each pass. The very first
               position of the text is never touched: it holds no text, and attention rests on it
    """

    hook: str
    strength: float
    kind: Kind = "add"
    direction: Float[Tensor, " d"] | None = None
    sae: SAE | None = None
    latent: int | None = None
    other: int | None = None
    unit: float = 1.0
    scope: Scope = "all"
    decay: float = 1.0

    def __post_init__(self) -> None:
        for value, what, known in (
            (self.kind, "kind of steering", get_args(Kind)),
            (self.scope, "scope", get_args(Scope)),
        ):
            if value not in known:
                raise unknown(what, value, known)
        if self.kind in OF_LATENTS and (self.sae is None or self.latent is None):
            raise UserError(f"{self.kind} acts on a latent; give sae and latent.")
        if self.kind == "swap" and self.other is None:
            raise UserError("swap gives the value of one latent to another; give other.")
        if self.direction is None and (self.sae is None or self.latent is None):
            raise UserError("there is nothing to steer with; give a direction, or sae and latent.")
        if not 0 < self.decay <= 1:
            raise UserError(
                f"decay={self.decay:g} is no share of the strength that is left; give more than 0, at most 1."
            )
        if self.direction is None:
            assert self.sae is not None and self.latent is not None
            object.__setattr__(self, "direction", self.sae.direction(self.latent))

    def at(self, strength: float) -> Steering:
        return replace(self, strength=strength)

    @property
    def vector(self) -> Float[Tensor, " d"]:
        assert self.direction is not None
        return self.direction

    def change(self, x: Float[Tensor, "*any pos d"], factor: Float[Tensor, "pos 1"]) -> Float[Tensor, "... d"]:
        """What is added to x; factor: what is left of the strength at each position."""
        d = self.vector.to(x)
        strength = self.strength * factor
        if self.kind == "add":
            return strength * self.unit * d
        if self.kind == "project-out":
            return -strength * (x @ d)[..., None] / d.square().sum() * d
        assert self.sae is not None and self.latent is not None
        latents = self.sae.encode(x)
        z = latents[..., self.latent, None]
        if self.kind == "clamp":
            return (strength * self.unit - z) * d
        if self.kind == "scale":
            return (self.strength - 1) * factor * z * d
        if self.kind == "ablate":
            return -z * d
        if self.kind == "swap":
            assert self.other is not None
            return z * (strength * self.sae.direction(self.other).to(x) - d)
        latents[..., self.latent, None] = strength * self.unit
        return self.sae.decode(latents) - x


@dataclass
class Steered:
    """An edit of one hook point for one generation: row i of the batch is steered by what plan[i] has there.

    It follows the positions of a text that is read in one pass and then token by token, or again and again from the
    start; applied: at how many positions each row was changed, each counted once.
    """

    plan: Sequence[tuple[Steering, ...]]
    prompt: int
    applied: Int[Tensor, " row"]
    seen: int = 0

    @classmethod
    def of(cls, plan: Sequence[Plan], prompt: int) -> Steered:
        return cls([_all(one) for one in plan], prompt, torch.zeros(len(plan), dtype=torch.long))

    def __call__(self, x: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        again = self.seen and x.shape[1] > 1  # the whole text once more
        place = torch.arange(x.shape[1]) + (0 if again else self.seen)
        fresh = place >= self.seen
        self.seen = int(place[-1]) + 1
        groups: dict[int, tuple[Steering, list[int]]] = {}
        for i, some in enumerate(self.plan):
            for one in some:
                groups.setdefault(id(one), (one, []))[1].append(i)
        out = x.clone()
        for one, rows in groups.values():
            where = self._where(one, place)
            if bool(where.any()):
                factor = one.decay ** (place[where] - self.prompt + 1).clamp(min=0).to(x)
                part = out[rows][:, where]
                out[torch.tensor(rows)[:, None], where.nonzero()[:, 0]] = part + one.change(part, factor[:, None])
                self.applied[rows] += int((where & fresh).sum())
        return out

    def _where(self, one: Steering, place: Int[Tensor, " pos"]) -> Bool[Tensor, " pos"]:
        inside = {
            "all": place >= 0,
            "prompt": place < self.prompt,
            "generated": place >= self.prompt,
            "last": place == place[-1],
        }[one.scope]
        return inside & (place > 0)


Plan = Steering | tuple[Steering, ...] | None  # of one row; several act one after the other


def _all(plan: Plan) -> tuple[Steering, ...]:
    return () if plan is None else plan if isinstance(plan, tuple) else (plan,)


@dataclass(frozen=True)
class SteeredText:
    """Texts of a steered generation, and at how many positions each row was steered, by all of its plan together.

    steps  forward passes
    """

    generated: Generated
    steps: int
    applied: tuple[int, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return self.generated.texts


def steer(
    model: LanguageModel,
    tokens: Int[Tensor, "row pos"],
    steps: int,
    plan: Sequence[Plan],
    *,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    cache: bool = True,
) -> SteeredText:
    """New text after each prompt, row i steered by plan[i] (None: not at all); rows of one length.

    Raises UserError if a plan does not fit the rows or the model, and RuntimeError if a row was steered at fewer or
    more positions than its scope has.
    """
    if len(plan) != len(tokens):
        raise UserError(f"there are {len(tokens)} rows and {len(plan)} plans; give one for each.")
    hooks = sorted({one.hook for some in plan for one in _all(some)})
    edits = {
        hook: Steered.of([tuple(one for one in _all(some) if one.hook == hook) for some in plan], tokens.shape[1])
        for hook in hooks
    }
    edit: Mapping[Any, Callable[[Tensor], Tensor]] = dict(edits)
    made = generate(model, tokens, steps, edit=edit, temperature=temperature, seeds=seeds, cache=cache)
    applied = sum((each.applied for each in edits.values()), torch.zeros(len(tokens), dtype=torch.long))
    for i, some in enumerate(plan):
        due = sum(positions(one.scope, tokens.shape[1], made.passes) for one in _all(some))
        if int(applied[i]) != due:
            raise RuntimeError(f"row {i} was steered at {int(applied[i])} positions, not at {due}")
    return SteeredText(made, made.passes, tuple(applied.tolist()))


def positions(scope: Scope, prompt: int, passes: int) -> int:
    """How many positions of a text a scope has, with a pass for the prompt and one for each new token but the last."""
    counts = {"all": prompt - 1 + passes - 1, "prompt": prompt - 1, "generated": passes - 1}
    return counts.get(scope, passes - (prompt == 1))
