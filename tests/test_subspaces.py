"""Attention by class against loops, direct effects where all effects are direct, subspaces at their limits."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
import torch

from circuits.mutations import mutated
from circuits.subspaces import (
    CLASSES,
    Subspace,
    _confined,
    _fit,
    _masks,
    attention_classes,
    direct_total,
    keys_by_class,
    qk_subspace,
)
from tests.conftest import CONFIGS
from workbench import registry
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample
from workbench.sites import Site, block

Make = Callable[..., LanguageModel]


def draw(model: LanguageModel, task: str = "ioi", n: int = 6) -> Batch:
    return sample(registry.get_task(task), model, n, seed=0)


# ---- attention by class ----


@pytest.mark.parametrize("task", ["ioi", "colored_objects", "greater_than", "docstring"])
def test_every_key_has_exactly_one_class(task: str, tiny: LanguageModel) -> None:
    for masks in keys_by_class(tiny, draw(tiny, task)):
        assert tuple(masks) == CLASSES
        assert (torch.stack(list(masks.values())).sum(0) == 1).all()


def test_classes_of_colored_objects_by_reading_the_prompt(tiny: LanguageModel) -> None:
    batch = draw(tiny, "colored_objects", n=12)
    for i, masks in enumerate(keys_by_class(tiny, batch)):
        prompt = batch.prompts[i]
        asked = prompt.clean.rsplit("Q:", 1)[1].split("What")[0]
        colours = re.findall(r"an? (\w+) \w+", asked)
        tokens = batch.clean[i]
        words = {name: [w.strip() for w in tiny.token_strings(tokens[mask].tolist())] for name, mask in masks.items()}
        assert words["answer"] == [prompt.answers[0].strip()]
        assert sorted([*words["answer"], *words["candidate"]]) == sorted(colours)
        assert words["itself"] == [":"] and words["previous"] == ["A"]


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_weighted_attention_is_attention_times_the_length_of_what_is_written(
    kind: str, make_tiny: Make, store: ActivationStore
) -> None:
    model = make_tiny(kind)
    batch = draw(model, n=2)
    found = attention_classes(model, batch, store)
    torch.testing.assert_close(sum(found.weighted.values()), torch.ones(3, 4))
    looks = torch.ones(3, 4)
    if kind == "weight_sparse":  # what its sink draws is looked at nowhere
        hooks = [block(layer, "attn.hook_pattern") for layer in range(3)]
        each = [model.run(tokens[None], capture=hooks) for tokens in batch.clean]
        looks = torch.stack([torch.stack([run[hook][0, :, -1].sum(-1) for hook in hooks]) for run in each]).mean(0)
        assert float(looks.max()) < 0.99
    torch.testing.assert_close(sum(found.plain.values()), looks)
    classes = keys_by_class(model, batch)
    for layer, h in [(0, 0), (1, 3), (2, 2)]:
        pattern, value = (
            Site(block(layer, "attn.hook_pattern"), head=h, pos=-1),
            Site(block(layer, "attn.hook_v"), head=h),
        )
        shares = dict.fromkeys(CLASSES, 0.0)
        for tokens, masks in zip(batch.clean, classes, strict=True):
            run = model.run(tokens[None], capture=[pattern, value], ungroup=True)
            moved = [
                float(run[pattern][0, j] * (run[value][0, j] @ model.out_weight(layer)[h]).norm())
                for j in range(len(tokens))
            ]
            for name, mask in masks.items():
                shares[name] += sum(x for x, inside in zip(moved, mask, strict=True) if inside) / sum(moved) / 2
        for name in CLASSES:
            assert float(found.weighted[name][layer, h]) == pytest.approx(shares[name], abs=1e-5)


# ---- direct and total effect ----


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_effects_are_all_direct_where_nothing_follows(kind: str, make_tiny: Make, store: ActivationStore) -> None:
    model = make_tiny(kind)
    found = direct_total(model, draw(model), store)
    last = ["m2"] + ([f"a2.h{h}" for h in range(4)] if kind == "gpt_neox" else [])
    for name in found.total.nodes:
        i = found.total.nodes.index(name)
        total, direct = float(found.total.scores[i]), float(found.direct.scores[i])
        assert float(found.indirect.scores[i]) == pytest.approx(total - direct, abs=1e-6)
        if name in last:
            assert total == pytest.approx(direct, abs=1e-5)
    assert float(found.indirect.scores.abs().max()) > 1e-3


# ---- subspaces ----


@pytest.mark.parametrize(
    ("kind", "rotated"), [*((kind, True) for kind in CONFIGS), ("llama", False), ("gemma3_text", False)]
)
def test_at_full_rank_nothing_changes(kind: str, rotated: bool, make_tiny: Make, store: ActivationStore) -> None:
    model = make_tiny(kind)
    batch = draw(model, n=4)
    options = {"heads": "a1.h1, a1.h2, a2.h3", "parts": "qkv", "mutations": "others", "ranks": "0"}
    found = qk_subspace(model, batch, store, rotated=rotated, **options)  # type: ignore[arg-type]
    assert found.ranks == [0, model.config.d_head]
    torch.testing.assert_close(found.metric[:, -1], found.full, rtol=1e-4, atol=2e-5)
    assert (found.metric[:, 0] - found.full).abs().min() > 1e-6
    held_out = batch.select(range(0, 4, 2))
    logits = [model.run(tokens[None]).logits for tokens in held_out.clean]
    own = [held_out.select([i]).score(x[:, -1]) for i, x in enumerate(logits) if x is not None]
    assert float(found.full[0]) == pytest.approx(float(torch.cat(own).mean()), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("rank", [0, 2])
def test_confined_is_a_whole_pass_with_queries_and_keys_moved(
    kind: str, rank: int, make_tiny: Make, store: ActivationStore
) -> None:
    """Queries at the last position, keys at the candidates, of one head alone; at rank 0 they are the means."""
    model = make_tiny(kind)
    batch = draw(model, n=5)
    space, _, _ = _fit(model, batch, store, "a1.h3", "qk", "candidates", True)
    masks = _masks(model, batch, "candidates")
    found = _confined(model, batch, store, masks, [space], True, rank)
    turned = "" if kind == "gpt2" else "rot_"
    hooks = {port: Site(block(1, f"attn.hook_{turned}{port}"), head=3) for port in "qk"}
    rows = [model.run(tokens[None], capture=hooks.values(), ungroup=True) for tokens in batch.clean]
    q = torch.stack([run[hooks["q"]][0, -1] for run in rows])
    k = torch.cat([run[hooks["k"]][0, mask] for run, mask in zip(rows, masks, strict=True)])
    centres = {"q": q.mean(0), "k": k.mean(0)}
    basis = torch.pca_lowrank(torch.cat([q - q.mean(0), k - k.mean(0)]), q=rank or 1, center=False, niter=50)[2][
        :, :rank
    ]
    projector = basis @ basis.T
    for i, tokens in enumerate(batch.clean):
        at_end = torch.zeros(len(tokens), dtype=torch.bool)
        at_end[-1] = True

        def moved(port: str, where: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
            def fn(x: torch.Tensor) -> torch.Tensor:
                x = x.clone()
                x[:, where] = centres[port] + (x[:, where] - centres[port]) @ projector
                return x

            return fn

        edit = {hooks["q"]: moved("q", at_end), hooks["k"]: moved("k", masks[i])}
        logits = model.run(tokens[None], edit=edit, ungroup=True).logits  # type: ignore[arg-type]
        assert logits is not None
        assert float(found[i]) == pytest.approx(float(batch.select([i]).score(logits[:, -1])), abs=1e-4)


def test_at_rank_0_everything_is_the_mean_and_at_full_rank_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    x, centre = torch.randn(5, 8, generator=generator), torch.randn(8, generator=generator)
    space = Subspace("a0.h0", {"q": centre}, {"q": basis}, torch.ones(8))
    assert torch.equal(space.project(x, "q", 0), centre.expand(5, 8))
    torch.testing.assert_close(space.project(x, "q", 8), x)
    once = space.project(x, "q", 3)
    torch.testing.assert_close(space.project(once, "q", 3), once)
    assert torch.linalg.matrix_rank(once - centre) == 3


def test_as_many_directions_as_the_prompts_span_lose_nothing_on_them(
    tiny: LanguageModel, store: ActivationStore
) -> None:
    batch = draw(tiny, n=2)  # two centred queries span 1 direction; the keys of two prompts a few
    space, points, labels = _fit(tiny, batch, store, "a2.h1", "qk", "candidates", True)
    masks = _masks(tiny, batch, "candidates")
    n_keys = int(sum(mask.sum() for mask in masks))
    rank = 1 + n_keys - 1
    assert float(space.explained[rank - 1]) == pytest.approx(1, abs=1e-5)
    whole = _confined(tiny, batch, store, masks, [space], True, None)
    torch.testing.assert_close(_confined(tiny, batch, store, masks, [space], True, rank), whole, rtol=1e-4, atol=1e-5)
    assert len(points) == len(labels) == 2 + n_keys and labels[:3] == ["query", "query", "key 1"]


def test_the_head_is_the_one_with_the_largest_direct_effect(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, "colored_objects")
    found = qk_subspace(tiny, batch, store, ranks="1,2")
    effects = direct_total(tiny, batch, store).direct.heads()
    assert found.subspaces[0].head == max(effects, key=lambda name: effects[name])
    assert found.batches[0] == "task" and set(found.batches[1:]) | set(found.skipped) == {
        "others", "words", "letters", "numbers",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ranks": "1,b"}, "ranks='1,b' is not a list of numbers"),
        ({"ranks": "-1"}, "-1 directions cannot be kept"),
        ({"heads": "a0.h9"}, "no head of this model is called 'a0.h9'"),
        ({"mutations": "leters"}, "did you mean 'letters'"),
    ],
)
def test_what_cannot_be_is_a_sentence(
    given: dict[str, str], message: str, tiny: LanguageModel, store: ActivationStore
) -> None:
    with pytest.raises(UserError, match=message):
        qk_subspace(tiny, draw(tiny), store, **{"heads": "a1.h0", **given})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one half of the prompts"):
        qk_subspace(tiny, draw(tiny, n=1), store)


# ---- mutations ----


@pytest.mark.parametrize("kind", ["others", "words", "letters", "numbers"])
@pytest.mark.parametrize("name", ["ioi", "colored_objects", "docstring"])
def test_a_mutation_renames_candidates_and_nothing_else(
    kind: str, name: str, tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "token_ids", lambda _: [0])  # as if every word were one token
    task, rng = registry.get_task(name), random.Random(5)
    prompt = mutated(task, kind, tiny).draw(rng)
    before = task.draw(random.Random(5))
    texts = [(before.clean, prompt.clean), (before.corrupted, prompt.corrupted)]
    texts += list(zip(before.answers + before.wrong, prompt.answers + prompt.wrong, strict=True))
    renamed: dict[str, str] = {}
    for old, new in texts:
        words, others = re.findall(r"\w+|\W", old), re.findall(r"\w+|\W", new)
        assert len(words) == len(others)
        for a, b in zip(words, others, strict=True):
            assert renamed.setdefault(a, b) == b  # the same word everywhere
    changed = {a: b for a, b in renamed.items() if a != b}
    assert len(set(renamed.values())) == len(renamed)  # no two become one
    if kind != "others":
        assert {text.strip() for text in before.answers + before.wrong} <= set(changed)
    if kind == "letters":
        assert all(re.fullmatch("[A-Z]", word) for word in changed.values())


def test_a_mutation_that_fits_no_prompt_is_a_sentence(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the answers of greater_than are no words"):
        mutated(registry.get_task("greater_than"), "letters", tiny)
    monkeypatch.setattr(tiny, "token_ids", lambda _: [0, 0])
    with pytest.raises(UserError, match=r"candidates of ioi cannot be replaced by 0 letters of one token"):
        mutated(registry.get_task("ioi"), "letters", tiny).draw(random.Random(0))


# ---- a real model ----


@pytest.mark.slow
def test_subspaces_of_a_real_model(
    smollm: LanguageModel, store: ActivationStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2-135M on IOI: three directions of the movers' queries and keys do what all 64 do, and none do not."""
    movers = "a23.h0, a23.h1, a23.h2, a23.h3, a23.h7"
    found = qk_subspace(smollm, draw(smollm, n=64), store, heads=movers, ranks="0,3", mutations="letters")
    with capsys.disabled():
        print(f"\n{found.summary()}")  # noqa: T201
    none, three, every = found.metric[0].tolist()
    assert every == pytest.approx(float(found.full[0]), abs=1e-3)
    assert none < 0.5 * every and three > 0.8 * every
