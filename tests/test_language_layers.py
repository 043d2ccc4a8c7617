"""Steering at every layer: against texts written by hand, and what is made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from saes.steering.evaluate import Unsteered, Verdict, judge, prompts, write
from saes.steering.figures import language_layers_figure
from saes.steering.layers import AtLayer, LanguageLayers, language_layers
from saes.steering.parallel import corpus
from saes.steering.steer import Steering
from saes.steering.sweep import rank
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel

SMALL: dict[str, Any] = {"strengths": "1,4", "steps": 5, "n_validation": 3, "n_test": 4}


def test_a_layer_is_steered_by_the_difference_of_the_means(tiny: LanguageModel, store: ActivationStore) -> None:
    found = language_layers(tiny, store, 5, **SMALL)
    assert [one.hook for one in found.layers] == [f"blocks.{i}.hook_resid_post" for i in range(3)]
    layer = found.layers[1]
    both = corpus("search", ["fr", "en"])
    means = []
    for language in ("fr", "en"):
        rows = [tiny.run(tiny.tokenize(x)[None], capture=[layer.hook])[layer.hook][0, 1:] for x in both[language]]
        means.append(torch.cat(rows).mean(0))
    given = prompts("test")[:4]
    one = Steering(layer.hook, layer.strength, direction=means[0] - means[1])
    (written,) = write(tiny, given, [one], 5, temperature=0.5, seed=5)
    beside = Unsteered.of(tiny, given, 5, temperature=0.5, seed=5)
    assert judge(written, "fr", beside).summary() == layer.verdict.summary()
    assert [cell.strength for cell in layer.tried] == [1.0, 4.0]
    assert [one.strength for one in found.layers] == [max(one.tried, key=rank).strength for one in found.layers]
    assert layer.random.n == 4 and found.summary()["strengths"][layer.hook] == layer.strength


def of(plain: float, strict: float, score: float) -> Verdict:
    return Verdict(10, plain, (plain / 2, 1.0), 1.0, 0.0, {}, strict=strict, strict_interval=(0.0, 1.0), score=score)


def test_the_peak_and_its_picture_by_hand() -> None:
    none = of(0.0, 0.0, 0.0)
    layers = tuple(
        AtLayer(f"blocks.{i}.hook_resid_post", (), 1.0, one, none)
        for i, one in enumerate([of(0.9, 0.1, 0.3), of(0.8, 0.5, 0.6), of(1.0, 0.4, 0.2)])
    )
    found = LanguageLayers("fr", layers, "by hand")
    told = found.summary()
    assert (found.peak, told["peak"], told["depth"]) == (1, 1, 0.667)
    assert told["plain_strict_score"]["blocks.2.hook_resid_post"] == [1.0, 0.4, 0.2]
    assert set(map(tuple, told["random_direction"].values())) == {(0.0, 0.0, 0.0)}
    drawn = {trace.name: trace for trace in language_layers_figure(found).data}
    assert list(drawn["plain success"].y) == [0.9, 0.8, 1.0] and list(drawn["strict success"].y) == [0.1, 0.5, 0.4]
    assert drawn["plain success"].error_y.arrayminus[0] == pytest.approx(0.45)
    assert list(drawn["plain, random direction"].y) == [0, 0, 0]
    assert replace(found, layers=layers[::-1]).peak == 1


@pytest.mark.parametrize("strengths", ["", "x", "1,-1", "0", "nan", "inf"])
def test_strengths_are_numbers_above_zero(tiny: LanguageModel, store: ActivationStore, strengths: str) -> None:
    with pytest.raises(UserError, match="give numbers"):
        language_layers(tiny, store, 0, **SMALL | {"strengths": strengths})
