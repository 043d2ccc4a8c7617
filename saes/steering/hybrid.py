"""`wb run language-hybrid`: the difference of means turns the prompt, the latent holds what is written after it.

The two fail in different ways. The difference of the languages' means turns a text at once, and what goes on pushing it
makes it repeat itself and forget its subject; one latent keeps a text in its language, and often leaves it in English
at the start. So the first acts on the prompt alone and the second on new tokens alone. Everything else is that of a run
of `language-steering`: latent, layers, prompts, chance and what counts as success. How long the push on the prompt is,
how strong the latent and how fast it decays is chosen on its validation prompts, and told on its test prompts, beside
what the two do by themselves, and beside the same push on the prompt before

    then DiffMean          the difference of means itself, as many times its chosen strength, with the same decay: the
                           way is the one that was chosen for the latent
    then random direction  as long as what the latent adds
    then nothing
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from saes.steering import baselines, languages
from saes.steering.evaluate import Verdict, judge, prompts
from saes.steering.language_steering import Recipe, searched
from saes.steering.parallel import both_in
from saes.steering.steer import Plan, Steering
from saes.steering.sweep import Writing, rank
from workbench import parts, runs
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.registry import analysis

TURNS = (1.0, 1.5, 2.0)  # of the prompt, in lengths of the mean difference
HOLDS = (0.75, 1.0, 1.5)  # of new tokens, times the strength of the search's recipe
DECAYS = (1.0, 0.9)
NAME = "DiffMean, then latent"


@dataclass(frozen=True)
class Way:
    """Turned so far, held so much; and what came of it on validation prompts."""

    turn: float
    hold: float
    decay: float
    verdict: Verdict


@dataclass(frozen=True)
class Tried:
    """All ways, in their order."""

    ways: tuple[Way, ...]


@dataclass(frozen=True)
class LanguageHybrid:
    """
    search   the run of language-steering whose latent it is, recipe: what was chosen there
    tried    on validation prompts
    chosen   of these
    table    test: verdicts by method
    examples by method: prompt, text
    """

    search: str
    recipe: Recipe
    tried: tuple[Way, ...]
    chosen: Way
    table: dict[str, Verdict]
    examples: dict[str, tuple[tuple[str, str], ...]]
    definition: str

    def summary(self) -> dict[str, Any]:
        return {
            "search": self.search,
            "recipe": vars(self.recipe),
            "chosen": {name: getattr(self.chosen, name) for name in ("turn", "hold", "decay")},
            "table": {name: verdict.summary() for name, verdict in self.table.items()},
            "definition": self.definition,
        }


@analysis("language-hybrid", model="gemma-3-270m")
def language_hybrid(model: LanguageModel, store: ActivationStore, seed: int, *, found: str = "") -> LanguageHybrid:
    """Turn the prompt by the difference of the languages' means, and hold what is written by a latent.

    found  run of language-steering: its latent, prompts, number of new tokens and everything else. With its seed the
           latent and the difference of means alone do what they did there, but for rounding on another processor
    """
    run = runs.named(found, model, "of language-steering", "language-steering")
    key, search = run.record["key"], run.result
    known = key["parameters"]
    if key.get("contents", {}).get(known["text"]) != runs.content(known["text"]):
        raise UserError(f"{known['text']} is not what it was when run {found} searched it; search again.")
    languages.find(known["encoder"])
    chance = Writing(
        model, prompts("validation")[: known["n_validation"]], known["steps"], known["temperature"], seed,
        known["encoder"],
    )  # fmt: skip
    recipe, alone = search.recipe, max((cell for cell in search.cells if cell.method == "DiffMean"), key=rank)
    latent = recipe.steering(searched(recipe, run))
    both = both_in(known["text"], recipe.target, recipe.source)
    difference = baselines.mean_difference(model, store, alone.hook, both[recipe.target], both[recipe.source])
    length = float(difference.norm())
    turned = Steering(alone.hook, 1.0, direction=difference / length, unit=length)

    def held(way: tuple[float, float, float], by: Steering = latent) -> Plan:
        turn, hold, decay = way
        return (
            replace(turned, strength=turn, scope="prompt"),
            replace(by, strength=by.strength * hold, scope="generated", decay=decay),
        )

    def all_ways() -> Tried:
        beside, ways = chance.unsteered(), list(product(TURNS, HOLDS, DECAYS))
        texts = chance.write([held(way) for way in ways])
        return Tried(tuple(Way(*w, judge(one, recipe.target, beside)) for w, one in zip(ways, texts, strict=True)))

    tried = parts.once("hybrid", Tried, all_ways).ways
    best = max(tried, key=lambda way: (way.verdict.strict or 0.0) + (way.verdict.score or 0.0))
    way = (best.turn, best.hold, best.decay)
    noise = torch.randn(len(latent.vector), generator=torch.Generator().manual_seed(seed))
    size = abs(latent.strength * latent.unit) * float(latent.vector.norm())
    random = Steering(latent.hook, 1.0, direction=noise / noise.norm(), unit=size)
    mean = replace(turned, strength=alone.strength, decay=alone.decay)
    plans: dict[str, Plan] = {
        NAME: held(way), "latent": latent, "DiffMean": mean, "then DiffMean": held(way, mean),
        "then random direction": held(way, random), "then nothing": replace(turned, strength=best.turn, scope="prompt"),
    }  # fmt: skip
    test = replace(chance, given=prompts("test")[: known["n_test"]])
    beside = test.unsteered()
    texts = dict(zip(plans, test.write(list(plans.values())), strict=True))
    return LanguageHybrid(
        found, recipe, tried, best,
        {name: judge(one, recipe.target, beside, model) for name, one in texts.items()},
        {name: tuple(zip(one.prompts[:5], one.texts[:5], strict=True)) for name, one in texts.items()},
        f"prompts turned to {recipe.target} by the difference of means, new tokens steered by latent {recipe.latent} of"
        f" {found}; {len(tried)} ways tried on its validation prompts, told on its {len(test.given)} test prompts",
    )  # fmt: skip
