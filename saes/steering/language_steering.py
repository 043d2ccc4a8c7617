"""`wb run language-steering`: find the latent that makes a model go on in another language, choose how to steer with it
on validation prompts, and say on test prompts what it and every alternative do.

1. Latents are scored on parallel sentences (`search`), and the best of each SAE are tried as long as the difference of
   the languages' means is at that layer, and twice as long: how much of the next token's probability then lies on
   tokens of the target language tells which of them write it at all. Those with most, a few of each SAE, are tried at
   several lengths.
2. On validation prompts the most promising write texts, with a strength that stays and with one that decays from token
   to token: once a text is in another language it goes on in it, and what goes on pushing makes it repeat itself
   (Xie 2025). Around the best of them, other strengths and decays are written too. The recipe is the one with the
   largest sum of strict success and score, the harmonic mean of plain success and fidelity.
3. The baselines get the same: every layer, their own strengths, those around the best, chosen on validation prompts.
   Controls are as long as what the recipe adds.
4. Test prompts, which nothing was chosen on, are written to once by each.
5. What the latent does to text in each language, steered and taken away, tells whether it is that language's alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saes.pretrained import fit, load
from saes.sae import SAE
from saes.steering import baselines, languages
from saes.steering.evaluate import Verdict, prompts
from saes.steering.languages import identify
from saes.steering.parallel import OWN, both_in, corpus
from saes.steering.search import LanguageStats, best, prepare, scores, statistics
from saes.steering.side_effects import Bits, side_effects
from saes.steering.steer import Plan, Steering
from saes.steering.sweep import LENGTHS, Cell, Cells, Sweep, Writing, rank
from workbench import parts, runs
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.registry import analysis
from workbench.runs import Run

LOOK = (1.0, 2.0)  # at these, which latents of many; they point less straight there than the mean difference does
RANKINGS = ("difference", "monolinguality", "langfir")
OWNED = 0.9  # share of a token's occurrences in one language from which it counts as that language's


@dataclass(frozen=True)
class Recipe:
    """How to steer, locked before the test: one latent at one layer with one strength."""

    model: str
    sae: str
    hook: str
    latent: int
    strength: float
    unit: float
    kind: str
    scope: str
    decay: float
    target: str
    source: str

    def steering(self, sae: SAE) -> Steering:
        """With the SAE that it names."""
        return Steering(
            self.hook, self.strength, self.kind, sae=sae, latent=self.latent, unit=self.unit, scope=self.scope,  # type: ignore[arg-type]
            decay=self.decay,
        )  # fmt: skip


@dataclass(frozen=True)
class LanguageSteering:
    """
    recipe     what was chosen
    cells      what was tried on validation prompts: the mass on tokens of the target, and texts for the most promising
    table      test: verdicts by method, the recipe as "latent"
    examples   by method: prompt, text
    effects    bits per byte of test sentences in each language: plain, steered, without the latent
    detector   how often identification is right on held-out sentences in the target language
    vocabulary how many tokens count as the target language's
    """

    recipe: Recipe
    cells: tuple[Cell, ...]
    table: dict[str, Verdict]
    examples: dict[str, tuple[tuple[str, str], ...]]
    effects: dict[str, Bits]
    detector: float
    vocabulary: int
    definition: str

    @property
    def front(self) -> list[Cell]:
        """Of the cells with texts those that no other one beats in both plain success and little repetition."""
        seen = [cell for cell in self.cells if cell.verdict is not None]

        def beaten(a: Verdict, b: Verdict) -> bool:
            both = ((b.plain, -b.repetition), (a.plain, -a.repetition))
            return both[0] != both[1] and all(x >= y for x, y in zip(*both, strict=True))

        return [
            one for one in seen
            if not any(beaten(one.verdict, other.verdict) for other in seen)  # type: ignore[arg-type]
        ]  # fmt: skip

    @property
    def layers(self) -> dict[str, dict[str, Cell]]:
        """By method and hook point the best cell with texts; chosen and told on the same prompts: a little too good."""
        found: dict[str, dict[str, Cell]] = {cell.method: {} for cell in self.cells}
        for cell in sorted((cell for cell in self.cells if cell.verdict is not None), key=rank):
            found[cell.method][cell.hook] = cell
        return found

    def summary(self) -> dict[str, Any]:
        return {
            "recipe": vars(self.recipe),
            "table": {name: verdict.summary() for name, verdict in self.table.items()},
            "layers": {
                name: {
                    hook: [
                        cell.strength,
                        cell.decay,
                        *(round(x or 0.0, 3) for x in (cell.verdict.plain, cell.verdict.strict)),
                    ]
                    for hook, cell in some.items()
                    if cell.verdict is not None
                }
                for name, some in self.layers.items()
            },
            "effects": {
                language: [round(x, 4) for x in vars(bits).values()] for language, bits in self.effects.items()
            },
            "detector_on_held_out_text": round(self.detector, 3),
            "definition": self.definition,
        }


@analysis("language-steering", version=3, model="gemma-3-270m")
def language_steering(
    model: LanguageModel,
    store: ActivationStore,
    seed: int,
    *,
    sae: str = "gemma-3-270m-narrow",
    target: str = "fr",
    source: str = "en",
    text: str = OWN,
    top: int = 8,
    kept: int = 3,
    written: int = 12,
    steps: int = 40,
    temperature: float = 0.5,
    n_validation: int = 50,
    n_test: int = 110,
    n_effects: int = 60,
    encoder: str = "e5",
) -> LanguageSteering:
    """Find, choose and prove the latent that makes a model go on in another language.

    sae           a name, a run or a folder; all its SAEs are searched
    target        language to steer to
    source        language of the prompts
    text          parallel sentences for the search, see `language-latents`
    top           latents of each ranking and SAE that are tried at two lengths
    kept          latents of each SAE that are tried at every length; around so many in all finer ones are tried
    written       cells of the sweep whose texts are written and judged, with each decay
    steps         new tokens
    temperature   of sampling
    n_validation  prompts to choose on
    n_test        others to report on
    n_effects     sentences in each language for the side effects
    encoder       of sentences, for similarity: e5, labse (from the model hub), or a folder
    """
    languages.find(encoder)  # before the hours that it would come after
    parallel = both_in(text, target, source)
    bases = _bases(model, store, sae)
    prepare(model, store, list(bases), parallel, seed)
    stats = {hook: statistics(model, store, one, parallel, seed) for hook, one in bases.items()}
    ids = own_tokens(model, parallel, target)
    chance = Writing(model, prompts("validation")[:n_validation], steps, temperature, seed, encoder)
    sweep = Sweep(chance, target, ids, chance.unsteered())

    directions = _baselines(model, store, bases, stats, parallel[target], parallel[source], (target, source))
    lengths = {one.hook: one.unit for one in directions["DiffMean"]}
    found = {hook: candidates(one, stats[hook], target, source, top) for hook, one in bases.items()}
    latents = [as_long(one, x * lengths[hook]) for hook in bases for one in found[hook] for x in LOOK]
    first = parts.once("search", Cells, lambda: sweep.look("latent", latents))
    tried = [as_long(one, x * lengths[one.hook]) for one in first.most(latents, kept) for x in LENGTHS]
    cells, chosen = sweep.choose("latent", tried, written, kept)
    plans: dict[str, Plan] = {"latent": chosen}
    for name, some in directions.items():
        plain = [one.at(s) for one in some for s in (0.5, 1.0, 1.5, 2.0)]
        more, plans[name] = sweep.choose(name, plain, written // 2, 1)
        cells = Cells(cells.cells + more.cells)
    neurons = baselines.lape(model, parallel, target, source)
    plans |= {"LAPE": neurons} if neurons else {}
    others = [name for name in parallel if name not in (target, source)]
    wrong = [candidates(bases[chosen.hook], stats[chosen.hook], name, source, 1)[0] for name in others[:1]]
    plans |= baselines.controls(chosen, stats[chosen.hook], wrong[0] if wrong else None, seed)
    test = replace(chance, given=prompts("test")[:n_test])
    table, examples = test.report(plans, target)
    assert chosen.latent is not None
    read = {language: some[:n_effects] for language, some in corpus("test").items()}
    return LanguageSteering(
        Recipe(
            model.name, sae, chosen.hook, chosen.latent, chosen.strength, chosen.unit, chosen.kind, chosen.scope,
            chosen.decay, target, source,
        ),
        first.cells + cells.cells,
        table, examples, side_effects(model, chosen, read), detector(target), len(ids),
        f"{steps} new tokens at temperature {temperature:g} after {len(test.given)} test prompts, chosen on "
        f"{len(chance.given)} others; similarity by {encoder}",
    )  # fmt: skip


def _bases(model: LanguageModel, store: ActivationStore, sae: str) -> dict[str, SAE]:
    found = load(sae)
    for hook, one in found.items():
        if one.transcoder:
            raise UserError(f"{sae} at {hook} is a transcoder, which does not write where it reads; give an SAE.")
        fit(model, store, one)
    return found


def searched(recipe: Recipe, run: Run) -> SAE:
    """That of a run's recipe. Raises UserError where its name stands for another by now than the searched one."""
    if run.record["key"].get("contents", {}).get(recipe.sae) != runs.content(recipe.sae):
        raise UserError(f"{recipe.sae} is another SAE here than the one that run {run.id} searched; search this one.")
    return load(recipe.sae)[recipe.hook]


# ---- choosing ----


def candidates(sae: SAE, stats: LanguageStats, target: str, source: str, top: int) -> list[Steering]:
    """The best latents of an SAE by several rankings, as ways to steer: unit is the difference of their means over
    tokens between the two languages. Those that have none there, but only at last tokens, are left out."""
    found = scores(stats, target, source)
    numbers = dict.fromkeys(latent for name in RANKINGS for latent, _ in best(found[name], name, top))
    some = [one for latent in numbers if (one := way(sae, stats, target, source, latent)).unit]
    if not some:
        raise UserError(f"no latent of the SAE at {sae.hook} differs between {target} and {source}; train it on both.")
    return some


def as_long(one: Steering, length: float) -> Steering:
    """With the strength at which so much is added. Raises UserError for a latent that does not differ."""
    if not one.unit:
        raise UserError(f"latent {one.latent} at {one.hook} has the same mean in both languages; name another.")
    return one.at(length / (abs(one.unit) * float(one.vector.norm())))


def way(sae: SAE, stats: LanguageStats, target: str, source: str, latent: int | None = None) -> Steering:
    """A latent as a way to steer, with strength 1; None: the one of largest monolinguality."""
    if latent is None:
        latent = int(scores(stats, target, source)["monolinguality"].argmax())
    means = stats.sentences.mean(1)
    difference = means[stats.languages.index(target)] - means[stats.languages.index(source)]
    sae.direction(latent)
    return Steering(stats.hook, 1.0, sae=sae, latent=latent, unit=float(difference[latent]))


def own_tokens(model: LanguageModel, parallel: Mapping[str, Sequence[str]], target: str) -> Int[Tensor, " token"]:
    """Token ids that occur in the target language almost alone, in our parallel sentences."""
    counts = {name: Counter(i for text in some for i in model.token_ids(text)) for name, some in parallel.items()}
    total: Counter[int] = Counter()
    for some in counts.values():
        total.update(some)
    ids = [i for i, n in counts[target].items() if n / total[i] >= OWNED]
    if not ids:
        raise UserError(f"no token of {model.name} is {target}'s own in the sentences; it cannot write the language.")
    return torch.tensor(sorted(ids))


def _baselines(
    model: LanguageModel, store: ActivationStore, bases: Mapping[str, SAE], stats: Mapping[str, LanguageStats],
    ours: Sequence[str], theirs: Sequence[str], pair: tuple[str, str],
) -> dict[str, list[Steering]]:  # fmt: skip
    """By name, one for each hook point."""
    found: dict[str, list[Steering]] = {}
    for hook, sae in bases.items():
        some = baselines.directions(model, store, hook, ours, theirs)
        some["three latents"] = baselines.several(sae, stats[hook], *pair, length=some["DiffMean"].unit)
        for name, one in some.items():
            found.setdefault(name, []).append(one)
    return found


def detector(target: str) -> float:
    """How often the language identification is right on held-out sentences of ours, two at a time: what `plain` can be
    trusted for."""
    rows = corpus("test", [target])[target]
    pairs = [f"{a} {b}" for a, b in zip(rows[::2], rows[1::2], strict=False)]
    return sum(identify(text)[0] == target for text in pairs) / len(pairs)
