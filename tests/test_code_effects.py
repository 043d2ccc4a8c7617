"""Codes with a price: between nothing (all prompts one code) and attribution patching (a code for every prompt)."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from circuits.attribution import gradients
from saes import code_effects as priced
from workbench import registry
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel, Resume
from workbench.prompts import Batch, sample
from workbench.sites import block

FAST: dict[str, Any] = {"latents": 12, "examples": 2, "steps": 5, "trials": 2}


@pytest.fixture
def batch(tiny: LanguageModel) -> Batch:
    return sample(registry.get_task("ioi"), tiny, 6, seed=0)


def test_a_code_stands_for_the_mean_of_what_has_it() -> None:
    table = torch.tensor([[3, 0], [3, 1], [-1, 0]])
    value = torch.tensor([[[1.0], [10.0]], [[3.0], [20.0]], [[5.0], [30.0]]])
    assert priced.meanings(table, value)[..., 0].tolist() == [[2, 20], [2, 20], [5, 20]]


@pytest.mark.parametrize("position", ["mean", "last"])
def test_a_code_for_every_prompt_gives_attribution_of_the_pooled_difference(
    position: Literal["mean", "last"],
    tiny: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(priced, "assign", lambda x, *_: (torch.arange(len(x))[:, None].expand(x.shape[:2]), {}))
    found = priced.code_effects(tiny, batch, store, position=position, **FAST)
    c = tiny.config
    hooks = [block(layer, "attn.hook_z") for layer in range(c.n_layers)]
    assert found.per_prompt is not None
    assert found.per_prompt.shape[1] == found.headline["prompts"] == len(batch)
    torch.testing.assert_close(found.scores, found.per_prompt.mean(1))
    for i in range(len(batch)):
        one = batch.select([i])
        runs = [tiny.run(tokens[0][None], capture=[*hooks, block(0, "hook_resid_pre")]) for tokens in
                (one.clean, one.corrupted)]  # fmt: skip
        start = Resume(0, runs[0][block(0, "hook_resid_pre")])
        slopes = gradients(tiny, one.clean[0][None], start, lambda logits, o=one: o.score(logits).sum(), hooks).grads
        want = []
        for hook in hooks:
            clean, corrupted = (run[hook][0].mean(0) if position == "mean" else run[hook][0, -1] for run in runs)
            slope = slopes[hook][0].sum(0) if position == "mean" else slopes[hook][0, -1]
            want.append(((clean - corrupted) * slope).sum(-1))
        torch.testing.assert_close(found.per_prompt[:, i], torch.cat(want), atol=1e-6, rtol=1e-4)


def test_a_pair_that_trained_the_only_sae_is_left_out(
    tiny: LanguageModel, batch: Batch, store: ActivationStore
) -> None:
    found = priced.code_effects(tiny, batch, store, **(FAST | {"trials": 1}))
    assert found.per_prompt is not None and found.per_prompt.shape[1] == found.headline["prompts"] == len(batch) - 1


def test_one_code_for_all_costs_nothing(
    tiny: LanguageModel, batch: Batch, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(priced, "assign", lambda x, *_: (torch.zeros(x.shape[:2], dtype=torch.long), {}))
    assert priced.code_effects(tiny, batch, store, **FAST).scores.abs().max() == 0


@pytest.mark.parametrize("encoder", ["sae", "kmeans", "probe"])
def test_the_seed_decides_and_chunks_do_not(
    encoder: Any, tiny: LanguageModel, batch: Batch, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(seed: int = 0) -> Tensor:
        return priced.code_effects(tiny, batch, store, encoder=encoder, sae_seed=seed, **FAST).scores

    first = scores()
    assert torch.equal(first, scores()) and not torch.equal(first, scores(1))
    monkeypatch.setattr(priced, "TOKENS_PER_PASS", 1)
    torch.testing.assert_close(scores(), first, atol=1e-6, rtol=1e-4)


def test_bad_sizes_are_refused(tiny: LanguageModel, batch: Batch, store: ActivationStore) -> None:
    with pytest.raises(UserError, match="raise --n"):
        priced.code_effects(tiny, batch, store, examples=12)
    with pytest.raises(UserError, match="at least 1"):
        priced.code_effects(tiny, batch, store, trials=0)
