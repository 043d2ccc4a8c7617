"""Generation: the library's own on plain models, the same with and without a cache, and edits at every token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.conftest import CONFIGS
from workbench.errors import UserError
from workbench.generation import generate
from workbench.interventions import steer
from workbench.models import LanguageModel
from workbench.sites import Site

HOOK = "blocks.1.hook_resid_post"
Make = Callable[..., LanguageModel]


def prompts(model: LanguageModel, rows: int = 3, pos: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, model.config.d_vocab - 5, (rows, pos), generator=generator)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if not kind.startswith("weight_sparse")])
def test_greedy_text_is_the_librarys(kind: str, make_tiny: Make) -> None:
    model = make_tiny(kind)
    tokens = prompts(model)
    found = generate(model, tokens, 12)
    expected = model._module.generate(
        tokens,
        max_new_tokens=12,
        do_sample=False,
        attention_mask=torch.ones_like(tokens),
        eos_token_id=-1,
        pad_token_id=0,
    )
    assert torch.equal(found.tokens, expected[:, 7:]) and found.passes == 12
    assert found.texts == tuple(model.tokenizer.decode(row.tolist()) for row in found.tokens)


@pytest.mark.parametrize("kind", CONFIGS)
def test_with_a_cache_or_without_the_same_edited_logits(kind: str, make_tiny: Make) -> None:
    """An edit sees the prompt at once and then every token; without a cache it sees everything, again and again."""
    model = make_tiny(kind)
    tokens = prompts(model)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    seen: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
    found = {}
    for cache in (True, False):

        def edit(x: Tensor, cache: bool = cache) -> Tensor:
            seen[cache].append(tuple(x.shape))
            return x + direction

        found[cache] = generate(model, tokens, 9, edit={HOOK: edit}, cache=cache)
    assert torch.equal(found[True].tokens, found[False].tokens)
    assert found[True].calls == {HOOK: 9} == found[False].calls
    assert seen[False] == [(3, 7 + i, 32) for i in range(9)]
    if not kind.startswith("weight_sparse"):
        assert seen[True] == [(3, 7, 32)] + [(3, 1, 32)] * 8
    assert not torch.equal(found[True].tokens, generate(model, tokens, 9).tokens)


def test_strength_0_changes_nothing(tiny: LanguageModel) -> None:
    tokens = prompts(tiny)
    plain = generate(tiny, tokens, 10, temperature=0.8)
    same = generate(tiny, tokens, 10, temperature=0.8, edit={HOOK: steer(torch.ones(32), 0.0)})
    assert torch.equal(plain.tokens, same.tokens)


def test_a_row_does_not_depend_on_the_batch_and_its_chance_is_its_seeds(tiny: LanguageModel) -> None:
    tokens = prompts(tiny, rows=6)
    whole = generate(tiny, tokens, 10, temperature=1.0, seeds=[5, 6, 7, 8, 9, 10])
    part = generate(tiny, tokens[2:4], 10, temperature=1.0, seeds=[7, 8])
    assert torch.equal(whole.tokens[2:4], part.tokens)
    other = generate(tiny, tokens[2:4], 10, temperature=1.0, seeds=[8, 7])
    assert not torch.equal(other.tokens, part.tokens)
    cold = generate(tiny, tokens, 10, temperature=1e-4)
    assert torch.equal(cold.tokens, generate(tiny, tokens, 10).tokens)


def test_chance_follows_the_models_probabilities(tiny: LanguageModel) -> None:
    """4,000 first tokens against the softmax: chi squared over the likeliest tokens and the rest."""
    tokens = prompts(tiny, rows=1)
    logits = tiny.run(tokens, logits="last").logits
    assert logits is not None
    p = (logits[0, -1] / 0.5).softmax(-1)
    drawn = torch.cat(
        [
            generate(tiny, tokens.expand(500, -1), 1, temperature=0.5, seeds=list(range(i, i + 500))).tokens[:, 0]
            for i in range(0, 4000, 500)
        ]
    )
    best = p.topk(12).indices
    counts = torch.stack([(drawn == token).sum() for token in best])
    expected = p[best] * 4000
    counts, expected = (
        torch.cat([counts, 4000 - counts.sum()[None]]),
        torch.cat([expected, 4000 - expected.sum()[None]]),
    )
    assert float(((counts - expected) ** 2 / expected).sum()) < 40  # of 12: 1 in 10,000


def test_a_row_that_ends_says_no_more(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompts(tiny)
    plain = generate(tiny, tokens, 8)
    end = int(plain.tokens[1, 2])
    first = [row.index(end) if end in (row := list(one)) else None for one in plain.tokens.tolist()]
    monkeypatch.setattr(tiny._module.generation_config, "eos_token_id", [end])
    found = generate(tiny, tokens, 8)
    for i, at in enumerate(first):
        if at is None:
            assert torch.equal(found.tokens[i], plain.tokens[i])
        else:
            assert torch.equal(found.tokens[i, :at], plain.tokens[i, :at]) and set(found.tokens[i, at:].tolist()) == {
                end
            }
            assert found.texts[i] == tiny.tokenizer.decode(plain.tokens[i, :at].tolist())


def test_what_cannot_be_generated_is_a_sentence(tiny: LanguageModel) -> None:
    tokens = prompts(tiny)
    for given, message in (
        ({"steps": 0}, "steps=0 writes nothing"),
        ({"steps": 600}, r"7 tokens and 600 new ones are more than the 512"),
        ({"steps": 2, "temperature": -1.0}, "is below 0"),
        ({"steps": 2, "seeds": [1]}, "there are 3 rows and 1 seeds"),
        ({"steps": 2, "edit": {"blocks.9.hook_resid_post": lambda x: x}}, "did you mean|hook point"),
        ({"steps": 2, "edit": {HOOK: lambda x: x[:, :, :3]}}, "must keep the shape"),
        ({"steps": 2, "edit": {Site("blocks.0.attn.hook_z", head=9): lambda x: x}}, "has heads 0 to 3"),
        ({"steps": 2, "edit": {HOOK: lambda x: tiny.run(tokens).logits}}, "an edit cannot run it again"),
    ):
        with pytest.raises(UserError, match=message):
            generate(tiny, tokens, **given)
    with pytest.raises(UserError, match="shape"):
        generate(tiny, tokens[:, :0], 2)
    assert torch.equal(generate(tiny, tokens, 3).tokens, generate(tiny, tokens, 3, edit={HOOK: lambda x: x}).tokens)
