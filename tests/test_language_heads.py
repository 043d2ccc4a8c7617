"""Parts of a latent's pre-activation sum to it on every family; a reader carries what patching it by hand says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saes.sae import SAE
from saes.steering.evaluate import prompts
from saes.steering.heads import parts, readers
from saes.steering.language_steering import own_tokens
from saes.steering.parallel import corpus
from saes.steering.steer import Steering
from tests.conftest import CONFIGS
from workbench import runs
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.sites import Site

HOOK = "blocks.1.hook_resid_post"


@pytest.mark.parametrize("kind", CONFIGS)
def test_parts_sum_to_the_pre_activation(
    kind: str, make_tiny: Callable[..., LanguageModel], store: ActivationStore, tiny_sae: Path
) -> None:
    model, sae = make_tiny(kind), SAE.load(tiny_sae)
    sentences = ["One day in May.", "Why not?", "When Mary and John went"]
    found = parts(model, store, sae.W_enc[:, [3, 9]].T, 1, sentences)
    assert found["heads"].shape == (3, 2, 4, 2)
    total = found["heads"].sum((1, 2)) + found["mlps"].sum(1) + found["embedding"] + found["biases"]
    for i, text in enumerate(sentences):
        x = model.run(model.tokenize(text)[None], capture=[HOOK], logits="none")[HOOK][0, -1]
        here = total[i] - sae.b_dec @ sae.W_enc[:, [3, 9]] + sae.b_enc[[3, 9]]
        assert torch.allclose(here, sae.pre(x)[[3, 9]], atol=2e-3, rtol=1e-3)


def test_a_reader_carries_what_is_lost_without_it(tiny: LanguageModel) -> None:
    given = prompts("validation")[:2]
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    steering = Steering(HOOK, 8.0, direction=direction)
    lost, (steered, plain) = readers(tiny, steering, "fr", given)
    ids = own_tokens(tiny, corpus("search"), "fr")
    assert lost.shape == (1, 4) and steered != plain
    expected, both = 0.0, [0.0, 0.0]
    for text in given:
        tokens = tiny.tokenize(text)[None]
        clean = tiny.run(tokens, capture=["blocks.2.attn.hook_z"])

        def add(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[:, 1:] += 8 * direction
            return x

        held = {Site("blocks.2.attn.hook_z", head=3): lambda z, clean=clean: clean["blocks.2.attn.hook_z"][:, :, 3]}
        for i, edit in enumerate(({HOOK: add}, {HOOK: add, **held})):
            logits = tiny.run(tokens, edit=edit).logits
            assert logits is not None
            both[i] += float(logits[0, -1].softmax(-1)[ids].sum()) / 2
        assert clean.logits is not None
        expected += float(clean.logits[0, -1].softmax(-1)[ids].sum()) / 2
    assert (steered, plain) == (pytest.approx(both[0], rel=1e-4), pytest.approx(expected, rel=1e-4))
    assert float(lost[0, 3]) == pytest.approx(both[0] - both[1], abs=1e-6)


def test_a_run(tiny: LanguageModel, tiny_sae: Path) -> None:
    found = runs.run("language-heads", model=tiny, sae=str(tiny_sae), target="ru", n_prompts=2).result
    assert found.writers.shape == found.beaten.shape == (2, 4) and found.readers.shape == (1, 4)
    assert found.error < 1e-3
    total = float(found.writers.sum() + found.mlps.sum()) + sum(found.rest.values())
    assert total == pytest.approx(found.whole, abs=1e-3)
    # Steered by as much as the languages' means differ there.
    sae, both = SAE.load(tiny_sae), corpus("search", ["ru", "en"])
    means = [
        torch.cat([tiny.run(tiny.tokenize(t)[None], capture=[sae.hook], logits="none")[sae.hook][0, 1:] for t in some])
        for some in both.values()
    ]
    length = float((means[0].mean(0) - means[1].mean(0)).norm())
    by_hand = Steering(sae.hook, 1.0, direction=sae.W_dec[found.latent] / sae.norms[found.latent], unit=length)
    assert found.steered == pytest.approx(readers(tiny, by_hand, "ru", prompts("validation")[:2])[1], rel=1e-3)
    for given, message in (
        ({"target": "en"}, "both en"),
        ({"latent": 64}, "no latent 64"),
        ({"hook": "x"}, "hook point"),
    ):
        with pytest.raises(UserError, match=message):
            runs.run("language-heads", model=tiny, sae=str(tiny_sae), **given)
