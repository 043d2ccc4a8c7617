"""`wb run language-hybrid`: two ways to mend a latent by the difference of the languages' means, or that by latents.

    DiffMean, then latent  The two fail in different ways. The difference of means turns a text at once, and what goes
                           on pushing it makes it repeat itself and forget its subject; one latent keeps a text in its
                           language, and may leave it in English at the start. So the first acts on the prompt alone
                           and the second on new tokens alone. How long the push on the prompt is, how strong the latent
                           and how fast it decays is chosen on validation prompts
    own latents            What the difference of means is made of, less what is no language's: of its parts that single
                           latents of the search's SAE write (`language-latents`, score `diffmean`) those of latents
                           that are larger in the target or the source language than in any other. LangFIR (2026) steers
                           by latents of the target alone. Strength and decay are chosen as the search chooses them for
                           the difference of means

Everything else is that of a run of `language-steering`: latent, layers, prompts, chance and what counts as success.
What is chosen on its validation prompts is told on its test prompts, beside what latent and difference of means do by
themselves, and beside

    then DiffMean          the same push on the prompt before, and then the difference of means itself, as many times
                           its chosen strength, with the same decay: the way is the one that was chosen for the latent
    then random direction  then one as long as what the latent adds
    then nothing
    rest of DiffMean       instead of own latents, and as long: what is left of the difference of means at that layer
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saes.steering import baselines, languages
from saes.steering.evaluate import Verdict, judge, prompts
from saes.steering.language_steering import Recipe, own_tokens, searched
from saes.steering.parallel import both_in
from saes.steering.search import by_own_latents, owned, prepare, statistics
from saes.steering.steer import Plan, Steering
from saes.steering.sweep import Cell, Sweep, Writing, rank
from workbench import parts, runs
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.registry import analysis

TURNS = (1.0, 1.5, 2.0)  # of the prompt, in lengths of the mean difference
HOLDS = (0.75, 1.0, 1.5)  # of new tokens, times the strength of the search's recipe
DECAYS = (1.0, 0.9)
STRENGTHS = (0.5, 1.0, 1.5, 2.0)  # of own latents, in lengths of the mean difference, as the search tries that
TURNED, OWN = "DiffMean, then latent", "own latents"


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
    tried    the first hybrid on validation prompts, chosen: of these
    cells    own latents on validation prompts, together: chosen of these
    own      how many latents are a language's own, by language
    part     of what they write together: how long it is along the difference of means, 1: as long as that. They
             write other things too: the rest is 0 only if they write the difference and nothing else
    table    test: verdicts by method
    examples by method: prompt, text
    """

    search: str
    recipe: Recipe
    tried: tuple[Way, ...]
    chosen: Way
    cells: tuple[Cell, ...]
    together: Cell
    own: dict[str, int]
    part: float
    table: dict[str, Verdict]
    examples: dict[str, tuple[tuple[str, str], ...]]
    definition: str

    def summary(self) -> dict[str, Any]:
        return {
            "search": self.search,
            "recipe": vars(self.recipe),
            "chosen": {
                TURNED: {name: getattr(self.chosen, name) for name in ("turn", "hold", "decay")},
                OWN: {name: getattr(self.together, name) for name in ("strength", "decay")},
            },
            "validation": {
                name: verdict.summary()
                for name, verdict in ((TURNED, self.chosen.verdict), (OWN, self.together.verdict))
                if verdict is not None
            },
            "own_latents": self.own,
            "their_part_of_the_mean_difference": round(self.part, 3),
            "table": {name: verdict.summary() for name, verdict in self.table.items()},
            "definition": self.definition,
        }


@analysis("language-hybrid", version=2, model="gemma-3-270m")
def language_hybrid(model: LanguageModel, store: ActivationStore, seed: int, *, found: str = "") -> LanguageHybrid:
    """Mend a latent that was found by the difference of the languages' means, and that by latents, in two ways.

    found  run of language-steering: its latent, prompts, number of new tokens and everything else. With its seed the
           latent and the difference of means alone do what they did there, but for rounding on another processor

    Raises UserError for another run, a text or an SAE that is another by now, and an SAE none of whose latents is
    larger in one of the two languages than in any other.
    """
    run = runs.named(found, model, "of language-steering", "language-steering")
    known, search, recipe = run.record["key"]["parameters"], run.result, run.result.recipe
    if run.record["key"].get("contents", {}).get(known["text"]) != runs.content(known["text"]):
        raise UserError(f"{known['text']} is not what it was when run {found} searched it; search again.")
    languages.find(known["encoder"])
    latent = recipe.steering(searched(recipe, run))
    assert latent.sae is not None
    both = both_in(known["text"], recipe.target, recipe.source)
    prepare(model, store, [recipe.hook], both, seed)
    stats = statistics(model, store, latent.sae, both, seed)
    own = {name: int(owned(stats, name).sum()) for name in (recipe.target, recipe.source)}
    if not any(own.values()):
        raise UserError(
            f"no latent of {recipe.sae} at {recipe.hook} is larger in {recipe.target} or {recipe.source} than in any "
            "other language; search another SAE."
        )
    alone = max((cell for cell in search.cells if cell.method == "DiffMean"), key=rank)
    mean = _by(baselines.mean_difference(model, store, alone.hook, both[recipe.target], both[recipe.source]), alone)
    chance = Writing(
        model, prompts("validation")[: known["n_validation"]], known["steps"], known["temperature"], seed,
        known["encoder"],
    )  # fmt: skip
    sweep = Sweep(chance, recipe.target, own_tokens(model, both, recipe.target), chance.unsteered())

    tried = parts.once("hybrid", Tried, lambda: _turned(sweep, mean, latent)).ways
    best = max(tried, key=lambda way: (way.verdict.strict or 0.0) + (way.verdict.score or 0.0))
    written, rest = by_own_latents(stats, recipe.target, recipe.source)
    whole = written + rest
    together = Steering(recipe.hook, 1.0, direction=written / written.norm(), unit=float(whole.norm()))
    cells, way = sweep.choose(OWN, [together.at(x) for x in STRENGTHS], known["written"] // 2, 1)
    plans = _plans(mean, latent, best, seed) | {
        OWN: way, "rest of DiffMean": replace(way, direction=rest / rest.norm())
    }  # fmt: skip
    test = replace(chance, given=prompts("test")[: known["n_test"]])
    beside = test.unsteered()
    texts = dict(zip(plans, test.write(list(plans.values())), strict=True))
    return LanguageHybrid(
        found, recipe, tried, best, cells.cells, max(cells.cells, key=rank), own,
        float(written @ whole / whole.square().sum()),
        {name: judge(one, recipe.target, beside, model) for name, one in texts.items()},
        {name: tuple(zip(one.prompts[:5], one.texts[:5], strict=True)) for name, one in texts.items()},
        f"by latent {recipe.latent} of {found} and the difference of means, or by all latents that are either"
        f" language's own; {len(tried)} and {sum(cell.verdict is not None for cell in cells.cells)} ways tried on its"
        f" validation prompts, told on its {len(test.given)} test prompts",
    )  # fmt: skip


def _by(difference: Float[Tensor, " d"], cell: Cell) -> Steering:
    """By the difference of means as a cell of the search says."""
    length = float(difference.norm())
    return Steering(cell.hook, cell.strength, direction=difference / length, unit=length, decay=cell.decay)


def _held(mean: Steering, latent: Steering, turn: float, hold: float, decay: float) -> Plan:
    return (
        replace(mean, strength=turn, scope="prompt", decay=1.0),
        replace(latent, strength=latent.strength * hold, scope="generated", decay=decay),
    )


def _turned(sweep: Sweep, mean: Steering, latent: Steering) -> Tried:
    """All ways of the first hybrid, with texts."""
    ways = list(product(TURNS, HOLDS, DECAYS))
    texts = sweep.writing.write([_held(mean, latent, *way) for way in ways])
    return Tried(tuple(Way(*way, judge(one, sweep.target, sweep.beside)) for way, one in zip(ways, texts, strict=True)))


def _plans(mean: Steering, latent: Steering, best: Way, seed: int) -> dict[str, Plan]:
    """The first hybrid and what stands in its latent's place, and each of the two alone."""
    way = (best.turn, best.hold, best.decay)
    noise = torch.randn(len(latent.vector), generator=torch.Generator().manual_seed(seed))
    size = abs(latent.strength * latent.unit) * float(latent.vector.norm())
    random = Steering(latent.hook, 1.0, direction=noise / noise.norm(), unit=size)
    return {
        TURNED: _held(mean, latent, *way), "latent": latent, "DiffMean": mean, "then DiffMean": _held(mean, mean, *way),
        "then random direction": _held(mean, random, *way),
        "then nothing": replace(mean, strength=best.turn, scope="prompt", decay=1.0),
    }  # fmt: skip
