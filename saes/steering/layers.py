"""`wb run language-layers`: at which depth a model can be steered to another language, with no SAE.

At every layer the difference of the languages' means (DiffMean, the strongest direction known for this) is added to the
residual stream after the block. Its strength is chosen on validation prompts, for each layer by itself, and what it
does there is told on test prompts, beside a random direction of the same length. In the literature the curve peaks
between the middle and the last third (Chou et al. 2025, figure 2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from saes.steering import baselines, languages
from saes.steering.evaluate import Verdict, judge, prompts
from saes.steering.language_steering import own_tokens
from saes.steering.parallel import OWN, both_in
from saes.steering.play import strengths_of
from saes.steering.steer import Steering
from saes.steering.sweep import Cell, Sweep, Writing, rank
from workbench import parts, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.progress import track
from workbench.registry import analysis


@dataclass(frozen=True)
class AtLayer:
    """One layer: what was tried on validation prompts, the strength that was chosen, and what it and a random direction
    of its length do on test prompts."""

    hook: str
    tried: tuple[Cell, ...]
    strength: float
    verdict: Verdict
    random: Verdict


@dataclass(frozen=True)
class LanguageLayers:
    """layers: all of the model's, in order."""

    target: str
    layers: tuple[AtLayer, ...]
    definition: str

    @property
    def peak(self) -> int:
        """The layer with the largest sum of strict success and score, on test prompts."""
        found = [(one.verdict.strict or 0.0) + (one.verdict.score or 0.0) for one in self.layers]
        return found.index(max(found))

    def summary(self) -> dict[str, Any]:
        def told(one: Verdict) -> list[float]:
            return [round(x or 0.0, 3) for x in (one.plain, one.strict, one.score)]

        return {
            "target": self.target,
            "peak": self.peak,
            "depth": round((self.peak + 1) / len(self.layers), 3),
            "plain_strict_score": {one.hook: told(one.verdict) for one in self.layers},
            "random_direction": {one.hook: told(one.random) for one in self.layers},
            "strengths": {one.hook: one.strength for one in self.layers},
            "definition": self.definition,
        }


@analysis("language-layers", model="gemma-3-270m")
def language_layers(
    model: LanguageModel,
    store: ActivationStore,
    seed: int,
    *,
    target: str = "fr",
    source: str = "en",
    text: str = OWN,
    strengths: str = "0.5,1,1.5,2",
    steps: int = 32,
    temperature: float = 0.5,
    n_validation: int = 20,
    n_test: int = 50,
    encoder: str = "e5",
) -> LanguageLayers:
    """How well each layer steers to another language, by the difference of the languages' means.

    target        language to steer to
    source        language of the prompts
    text          parallel sentences for the means, see `language-latents`
    strengths     that are tried at each layer, in lengths of the difference, separated by commas
    steps         new tokens
    temperature   of sampling
    n_validation  prompts to choose the strength on
    n_test        others to report on
    encoder       of sentences, for similarity: e5, labse (from the model hub), or a folder
    """
    languages.find(encoder)
    tried = strengths_of(strengths)
    if min(tried) <= 0:
        raise UserError(f"strengths={strengths!r} are not all towards {target}; give numbers above 0, such as 0.5,1,2.")
    parallel = both_in(text, target, source)
    chance = Writing(model, prompts("validation")[:n_validation], steps, temperature, seed, encoder)
    test = replace(chance, given=prompts("test")[:n_test])
    sweep = Sweep(chance, target, own_tokens(model, parallel, target), chance.unsteered())
    beside = test.unsteered()

    def at(layer: int) -> AtLayer:
        hook = sites.block(layer, "hook_resid_post")
        difference = baselines.mean_difference(model, store, hook, parallel[target], parallel[source])
        length = float(difference.norm())
        one = Steering(hook, 1.0, direction=difference / length, unit=length)
        found = sweep.texts("DiffMean", [one.at(strength) for strength in tried]).cells
        best = one.at(max(found, key=rank).strength)
        noise = torch.randn(len(difference), generator=torch.Generator().manual_seed(seed + layer))
        texts = test.write([best, replace(best, direction=noise / noise.norm())])
        return AtLayer(hook, found, best.strength, *(judge(some, target, beside) for some in texts))

    layers = [
        parts.once(f"layer {layer}", AtLayer, partial(at, layer))
        for layer in track(range(model.config.n_layers), "layers")
    ]
    return LanguageLayers(
        target, tuple(layers),
        f"{steps} new tokens at temperature {temperature:g} after {len(test.given)} test prompts with the difference "
        f"of the means of {target} and {source} added to the residual stream after a layer, at each the best of "
        f"strengths {strengths} on {len(chance.given)} other prompts; similarity by {encoder}",
    )  # fmt: skip
