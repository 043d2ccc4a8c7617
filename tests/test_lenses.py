"""Laws of the lenses: parts sum to wholes, and the last layer of the lens is the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.conftest import CONFIGS
from workbench import norms, registry, sites
from workbench.activations import ActivationStore
from workbench.lenses import attention_patterns, direct_logit_attribution, key_classes, logit_lens
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample
from workbench.sites import block


def draw(model: LanguageModel, task: str = "ioi") -> Batch:
    return sample(registry.get_task(task), model, 5, seed=0)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_direct_attributions_sum_to_the_logit_difference(
    kind: str, make_tiny: Callable[..., LanguageModel], store: ActivationStore
) -> None:
    model = make_tiny(kind)
    batch = draw(model)
    found = direct_logit_attribution(model, batch, store)
    cap = model.config.final_softcap
    rows = []
    for i, tokens in enumerate(batch.clean):
        logits = model.run(tokens[None]).logits[:, -1]  # type: ignore[index]
        rows.append(batch.select([i]).score(cap * torch.atanh(logits / cap) if cap else logits)[0])
    truth = torch.stack(rows)
    head = found.headline
    assert found.per_prompt is not None
    assert float(found.scores.sum()) + head["embedding"] + head["biases"] == pytest.approx(
        float(truth.mean()), abs=1e-4
    )
    assert head["sum_error"] < 1e-4
    assert head["logit_difference"] == pytest.approx(float(truth.mean()), abs=1e-4)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_frozen_norm_is_the_norm_at_its_own_point_and_linear_elsewhere(
    kind: str, make_tiny: Callable[..., LanguageModel]
) -> None:
    model = make_tiny(kind)
    generator = torch.Generator().manual_seed(0)
    x, y = 3 * torch.randn(2, 4, model.config.d_model, generator=generator)
    linear, bias = norms.frozen(model.final_norm, x)
    torch.testing.assert_close(linear(x) + bias, model.final_norm(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear(x + 2 * y), linear(x) + 2 * linear(y), rtol=1e-4, atol=1e-4)


def test_the_last_entry_of_the_lens_is_the_models_own_output(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny)
    found = logit_lens(tiny, batch, store)
    own = [batch.select([i]).score(tiny.run(t[None]).logits[:, -1])[0] for i, t in enumerate(batch.clean)]  # type: ignore[index]
    assert len(found.metric) == tiny.config.n_layers + 1
    assert float(found.metric[-1]) == pytest.approx(float(torch.stack(own).mean()), abs=1e-4)
    logits = tiny.run(batch.clean[0][None]).logits
    assert logits is not None
    assert found.top_tokens[-1] == tiny.token_strings(logits[0].argmax(-1).tolist())


def test_key_classes_by_hand() -> None:
    classes = key_classes(torch.tensor([7, 8, 7, 9, 7]))
    pairs = {name: mask.nonzero().tolist() for name, mask in classes.items()}
    assert pairs["previous"] == [[1, 0], [2, 1], [3, 2], [4, 3]]
    assert pairs["first"] == [[1, 0], [2, 0], [3, 0], [4, 0]]
    assert pairs["duplicate"] == [[2, 0], [4, 0], [4, 2]]
    assert pairs["induction"] == [[2, 1], [4, 1], [4, 3]]


def test_attention_to_a_class_is_read_from_the_patterns(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, "induction")
    found = attention_patterns(tiny, batch, store)
    total, count = torch.zeros(3, 4), 0
    for tokens in batch.clean:  # by hand, position by position
        patterns = tiny.run(tokens[None], capture=[block(layer, "attn.hook_pattern") for layer in range(3)])
        for query in range(1, len(tokens)):
            count += 1
            for layer in range(3):
                total[layer] += patterns[block(layer, "attn.hook_pattern")][0, :, query, query - 1]
    torch.testing.assert_close(found.classes["previous"], total / count, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.patterns.sum(-1), torch.ones(found.patterns.shape[:-1]))


def test_patterns_are_causal_and_within_the_window(make_tiny: Callable[..., LanguageModel]) -> None:
    model = make_tiny("gemma3_text")
    tokens = torch.arange(20)[None]
    windowed, full = block(0, "attn.hook_pattern"), block(1, "attn.hook_pattern")
    found = model.run(tokens, capture=[windowed, full])
    distance = torch.arange(20)[:, None] - torch.arange(20)[None]
    assert float(found[full][..., distance < 0].abs().max()) == 0
    assert float(found[windowed][..., (distance < 0) | (distance >= 8)].abs().max()) == 0
    assert sites.split(windowed) == (0, "attn.hook_pattern")
