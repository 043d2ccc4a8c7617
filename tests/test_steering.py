"""Steering: each kind against its formula, scopes, caches and batches; and that nothing at strength 0 is nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from saes.sae import SAE
from saes.steering.steer import Kind, Steered, Steering, positions, steer
from workbench.errors import UserError
from workbench.models import LanguageModel

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def sae(tiny_sae: Path) -> SAE:
    return SAE.load(tiny_sae)


def prompts(model: LanguageModel, rows: int = 4, pos: int = 6) -> Tensor:
    return torch.randint(5, model.config.d_vocab - 5, (rows, pos), generator=torch.Generator().manual_seed(0))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steering(sae: SAE, kind: Kind = "add", strength: float = 2.0, **options: Any) -> Steering:
    given = {"sae": sae, "latent": 7, "other": 9, "unit": 1.5, **options}
    return Steering(HOOK, strength, kind, **given)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_each_kind_is_its_formula(kind: Kind, sae: SAE) -> None:
    """Written out with loops over positions, in terms of encode and decode alone."""
    x = 3 * random(2, 5, 32)
    one = steering(sae, kind)
    found = Steered.of([one, one], 5)(x)
    assert torch.equal(found[:, 0], x[:, 0])
    d, other = sae.W_dec[7], sae.W_dec[9]
    for row in range(2):
        for pos in range(1, 5):
            here = x[row, pos]
            z = sae.encode(here)
            changed = z.clone()
            changed[7] = 3.0
            expected = {
                "add": here + 3.0 * d,
                "clamp": here - sae.decode(z) + sae.decode(changed),
                "scale": here + z[7] * d,
                "ablate": here - z[7] * d,
                "project-out": here - 2 * (here @ d) / (d @ d) * d,
                "replace": sae.decode(changed),
                "swap": here - z[7] * d + 2 * z[7] * other,
            }[kind]
            assert torch.allclose(found[row, pos], expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "strength"), [("add", 0.0), ("project-out", 0.0), ("scale", 1.0)])
def test_a_strength_that_asks_for_nothing_changes_nothing(
    kind: Kind, strength: float, sae: SAE, tiny: LanguageModel
) -> None:
    x = random(2, 5, 32)
    one = steering(sae, kind, strength)
    assert torch.equal(Steered.of([one, None], 5)(x), x)
    tokens = prompts(tiny)
    plain, same = (steer(tiny, tokens, 8, [plan] * 4, temperature=0.7) for plan in (None, one))
    assert torch.equal(plain.generated.tokens, same.generated.tokens)


def test_ablating_and_projecting_out_leave_nothing(sae: SAE) -> None:
    x = random(1, 6, 32)
    d = sae.W_dec[7]
    out = Steered.of([steering(sae, "project-out", 1.0)], 6)(x)
    assert float((out[:, 1:] @ d).abs().max()) < 1e-5
    clamped = Steered.of([steering(sae, "clamp", 0.0)], 6)(x)
    assert torch.allclose(clamped, Steered.of([steering(sae, "ablate")], 6)(x), atol=1e-6)


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "last"])
def test_with_a_cache_or_without_the_same_text_and_every_token_is_reached(
    kind: Kind, scope: Any, sae: SAE, tiny: LanguageModel
) -> None:
    tokens = prompts(tiny)
    plan = [steering(sae, kind, 6.0, scope=scope, decay=0.9)] * 4
    cached = steer(tiny, tokens, 9, plan)
    again = steer(tiny, tokens, 9, plan, cache=False)
    if scope != "last":  # read again from the start, what was the last position once is no longer
        assert torch.equal(cached.generated.tokens, again.generated.tokens)
    expected = {"all": 5 + 8, "prompt": 5, "generated": 8, "last": 9}[scope]
    assert cached.steps == 9 and cached.applied == (expected,) * 4 == (positions(scope, 6, 9),) * 4 == again.applied


def test_a_model_that_keeps_no_cache_is_steered_at_every_token(
    sae: SAE, make_tiny: Callable[..., LanguageModel]
) -> None:
    sparse = make_tiny("weight_sparse")
    assert steer(sparse, prompts(sparse), 9, [steering(sae)] * 4).applied == (5 + 8,) * 4


def test_the_prompt_and_what_is_generated_are_everything(sae: SAE, tiny: LanguageModel) -> None:
    """Edits of disjoint positions: one after the other they are the edit of all."""
    x = random(2, 9, 32)
    parts = [Steered.of([steering(sae, scope=scope)] * 2, 5)(x) - x for scope in ("prompt", "generated")]
    whole = Steered.of([steering(sae, scope="all")] * 2, 5)(x) - x
    assert torch.allclose(parts[0] + parts[1], whole) and not bool((parts[0] * parts[1]).any())


def test_strength_decays_from_one_new_token_to_the_next(sae: SAE) -> None:
    one = steering(sae, decay=0.5)
    edit = Steered.of([one], 4)
    x = torch.zeros(1, 4, 32)
    sizes = [float(edit(x[:, : 4 if step == 0 else 1]).norm(dim=-1).max()) for step in range(4)]
    whole = 3.0 * float(one.vector.norm())
    assert sizes == pytest.approx([whole, whole / 2, whole / 4, whole / 8], rel=1e-5)
    here, end = 300 * sae.W_dec[7][None], torch.tensor([[1e-9]])  # what decays to nothing does nothing, scaling too
    for kind in ("add", "scale", "project-out"):
        assert float(steering(sae, kind).change(here, end).abs().max()) < 1e-6
    assert float(steering(sae, "scale").change(here, torch.ones(1, 1)).abs().max()) > 0.1


def test_rows_are_steered_each_in_its_own_way(sae: SAE, tiny: LanguageModel) -> None:
    """Other strengths, kinds, latents and layers in one batch: each row as it is alone."""
    tokens = prompts(tiny)
    early = Steering("blocks.0.hook_resid_post", 4.0, direction=random(32, seed=5))
    plan = [steering(sae, "add", 4.0), None, steering(sae, "clamp", 9.0, latent=3), (early, steering(sae, "ablate"))]
    whole = steer(tiny, tokens, 10, plan, temperature=0.5, seeds=[1, 2, 3, 4])
    for i, one in enumerate(plan):
        alone = steer(tiny, tokens[i : i + 1], 10, [one], temperature=0.5, seeds=[i + 1])
        assert torch.equal(whole.generated.tokens[i], alone.generated.tokens[0])
    assert len({tuple(row) for row in whole.generated.tokens.tolist()}) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "clamp", "sae": None, "direction": torch.ones(32)}, "clamp acts on a latent"),
        ({"kind": "swap", "other": None}, "give other"),
        ({"sae": None}, "nothing to steer with"),
        ({"latent": 64}, "there is no latent 64"),
        ({"decay": 0.0}, "decay=0 is no share"),
    ],
)
def test_impossible_steerings_are_sentences(given: dict[str, Any], message: str, sae: SAE) -> None:
    with pytest.raises(UserError, match=message):
        Steering(**{"hook": HOOK, "strength": 1.0, "sae": sae, "latent": 7, "other": 9, **given})


def test_plans_that_do_not_fit_are_sentences(sae: SAE, tiny: LanguageModel) -> None:
    tokens = prompts(tiny)
    with pytest.raises(UserError, match="4 rows and 1 plans"):
        steer(tiny, tokens, 3, [None])
    with pytest.raises(UserError, match="hook point"):
        steer(tiny, tokens, 3, [Steering("blocks.9.hook_resid_post", 1.0, direction=torch.ones(32))] * 4)
