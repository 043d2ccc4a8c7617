"""Laws of rows of attention: with the sink they are the model's own distributions, whatever is read at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.conftest import CONFIGS
from workbench import attention_rows, registry
from workbench.activations import ActivationStore
from workbench.attention_rows import PATTERN, SCORES, by_layer, with_sink
from workbench.models import LanguageModel
from workbench.prompts import sample

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_rows_are_whole_distributions_and_the_models_own_patterns(
    kind: str, make_tiny: Callable[..., LanguageModel], store: ActivationStore
) -> None:
    model = make_tiny(kind)
    prompts = sample(registry.get_task("ioi"), model, 3, 0).clean
    places = []
    for prompt, layer, (scores, pattern) in by_layer(model, store, prompts, (SCORES, PATTERN)):
        places.append((prompt, layer))
        rows = with_sink(scores, pattern, EPS).softmax(-1)
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1], dtype=torch.float64))
        torch.testing.assert_close(rows[..., :-1].float(), pattern, rtol=1e-4, atol=1e-6)
        own = model.run(prompts[prompt][None], capture=[f"blocks.{layer}.{PATTERN}"])[f"blocks.{layer}.{PATTERN}"]
        torch.testing.assert_close(own[0], pattern, rtol=1e-4, atol=1e-5)
    assert places == [(prompt, layer) for prompt in range(3) for layer in range(3)]


def test_the_logit_of_a_sink_is_the_models_parameter(
    make_tiny: Callable[..., LanguageModel], store: ActivationStore
) -> None:
    model = make_tiny("weight_sparse")
    logits = torch.tensor([0.0, 5.0, -4.0, 1.0])
    for block in model._module.transformer.h:
        block.attn.attn_imp.sink_logit.data.copy_(logits)
    for _, _, (scores, pattern) in by_layer(
        model, store, sample(registry.get_task("ioi"), model, 3, 0).clean, (SCORES, PATTERN)
    ):
        found = with_sink(scores, pattern, EPS)[..., -1]
        assert found.shape == scores.shape[:2]
        torch.testing.assert_close(found, logits.double()[:, None].expand_as(found), rtol=0, atol=1e-3)


def test_no_sink_is_read_off_rounding_and_a_lone_key_tells_a_sink() -> None:
    scores = torch.tensor([[[2.0, -torch.inf], [1.0, 3.0]]])
    pattern = scores.softmax(-1)
    assert with_sink(scores, pattern * (1 - 3e-7), EPS)[..., -1].eq(-torch.inf).all()
    halved = pattern.clone()
    halved[0, 0, 0] = 0.5  # one key and the sink draw alike
    assert float(with_sink(scores, halved, EPS)[0, 0, -1]) == pytest.approx(2.0)
    assert with_sink(scores, pattern * 0.995, 2.0**-7)[..., -1].eq(-torch.inf).all()  # bfloat16 sums to no more
    assert math.isfinite(float(with_sink(scores, pattern * 0, EPS)[0, 0, -1]))


def test_what_is_held_at_once_changes_nothing(
    tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = sample(registry.get_task("ioi"), tiny, 5, 0).clean
    names = (PATTERN, "hook_resid_post")
    whole = list(by_layer(tiny, store, prompts, names))
    asked: list[int] = []
    get = store.get

    def counted(model: LanguageModel, sequences: list[torch.Tensor], hooks: list[str]) -> dict[str, list[torch.Tensor]]:
        asked.append(len(sequences))
        return get(model, sequences, hooks)

    monkeypatch.setattr(store, "get", counted)
    longest = max(map(len, prompts))
    for numbers, sizes in ((1, [1] * 5), (2 * 2 * 3 * 4 * longest**2, [2, 2, 1])):
        asked.clear()
        monkeypatch.setattr(attention_rows, "NUMBERS", numbers)
        parts = list(by_layer(tiny, store, prompts, names))
        assert asked == sizes and [part[:2] for part in parts] == [part[:2] for part in whole]
        for one, other in zip(whole, parts, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))
