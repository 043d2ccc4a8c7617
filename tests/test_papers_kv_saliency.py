"""Scores of cached tokens against loops, derivatives and numbers by hand; eviction against an edit of the pattern."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from papers import kv_saliency as paper
from papers.kv_saliency import (
    SCORES,
    Caches,
    Layer,
    first_order,
    largest,
    output_error,
    rank_agreement,
    removals,
    scores_of,
)
from workbench import metrics, registry, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample

MAKE = Callable[..., LanguageModel]
KINDS = ("llama", "gpt2", "gemma3_text", "gemma2", "weight_sparse")


def made(logits: Tensor, values: Tensor, weight: Tensor | None = None, sink: float | None = None) -> Layer:
    """A layer of these logits [head, query, key] and values [kv head, key, d_head]."""
    more = logits if sink is None else torch.cat([logits, torch.full_like(logits[..., :1], sink)], -1)
    pattern = more.softmax(-1)[..., : logits.shape[-1]].float()
    identity = torch.eye(values.shape[-1]).expand(len(logits), -1, -1)
    return Layer.of(logits, pattern, values, identity if weight is None else weight)


def random_layer(heads: int = 4, kv: int = 2, n: int = 6, sink: float | None = None, seed: int = 0) -> Layer:
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(heads, n, n, generator=g, dtype=torch.float64)
    logits = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    values = torch.randn(kv, n, 3, generator=g, dtype=torch.float64)
    return made(logits, values, torch.randn(heads, 3, 5, generator=g, dtype=torch.float64), sink)


# ---- scores ----


def test_scores_of_three_tokens_by_hand() -> None:
    """Attention 1/2, 1/4, 1/4 with logits ln 2, 0, 0; o = (2, 3).

    The first value (2, 2) is (0, -1) from o: value 8 / 4, key (ln 2 / 2)^2, and the cross term 2 / 4 ln 2 (-2). Keys of
    logit 0 have nothing to lose.
    """
    log2 = math.log(2)
    layer = made(
        torch.tensor([[[log2, 0.0, 0.0]]], dtype=torch.float64), torch.tensor([[[2.0, 2.0], [0.0, 4.0], [4.0, 4.0]]])
    )
    value, key, joint = first_order(layer, slice(None))[:, 0, 0]
    assert value.tolist() == pytest.approx([2.0, 1.0, 2.0])
    assert key.tolist() == pytest.approx([log2**2 / 4, 0.0, 0.0], abs=1e-12)
    assert joint.tolist() == pytest.approx([2 + log2**2 / 4 - log2, 1.0, 2.0])
    # Without the first the others have a half each, (2, 4); without the second 2/3 (2, 2) + 1/3 (4, 4).
    assert removals(layer, slice(None))[0, 0].tolist() == pytest.approx([1.0, (8 / 3 - 2) ** 2 + (8 / 3 - 3) ** 2])


def test_scores_are_what_little_losses_cost() -> None:
    """Where a share t of a value, a logit or both is lost, the squared error of the output is t^2 times the score."""
    layer = random_layer(heads=2, kv=2)
    a, t = layer.attention, 1e-5
    outputs = a @ layer.values
    found = first_order(layer, slice(None))
    for i, (lose_value, lose_key) in enumerate(((t, 0.0), (0.0, t), (t, t))):
        for at in range(6):
            less = torch.ones(6, dtype=torch.float64)
            less[at] = 1 - lose_key
            logits = (layer.logits * less).where(layer.logits.isfinite(), -torch.inf)
            values = layer.values.clone()
            values[:, at] *= 1 - lose_value
            error = (logits.softmax(-1) @ values - outputs).square().sum(-1) / t**2
            torch.testing.assert_close(found[i, :, :, at], error, rtol=1e-3, atol=1e-7)


def test_a_lost_value_costs_exactly_its_score() -> None:
    layer = random_layer(heads=1, kv=1)
    values = layer.values.clone()
    values[0, 2] = 0
    error = (layer.attention @ (values - layer.values)).square().sum(-1)
    torch.testing.assert_close(first_order(layer, slice(None))[0, :, :, 2], error)


@pytest.mark.parametrize("sink", [None, 1.5])
def test_removal_is_a_softmax_without_the_key(sink: float | None) -> None:
    """Head by head and query by query, of each group at once, written through the output projection."""
    layer = random_layer(sink=sink)
    expected = torch.zeros(2, 5, 5, dtype=torch.float64)
    for group in range(2):
        for query in range(1, 6):
            for key in range(5):
                moved = torch.zeros(5, dtype=torch.float64)
                for head in (2 * group, 2 * group + 1):
                    outputs = []
                    for gone in (None, key):
                        kept = [j for j in range(query + 1) if j != gone]
                        weights = [math.exp(float(layer.logits[head, query, j])) for j in kept]
                        total = sum(weights) + (0 if sink is None else math.exp(sink))
                        terms = [w / total * layer.values[group, j] for w, j in zip(weights, kept, strict=True)]
                        outputs.append(sum(terms, torch.zeros(3, dtype=torch.float64)))
                    moved += (outputs[1] - outputs[0]) @ layer.out[head]
                expected[group, query - 1, key] = moved.square().sum()
    torch.testing.assert_close(removals(layer, slice(1, None)), expected, rtol=1e-4 if sink else 1e-9, atol=1e-9)


def test_removal_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer()
    whole = removals(layer, slice(1, None))
    monkeypatch.setattr(paper, "NUMBERS", 1)
    torch.testing.assert_close(removals(layer, slice(1, None)), whole)


def test_the_first_order_is_right_where_little_is_lost() -> None:
    """With logit 1 the key score is a^2 |v - o|^2, short of removal by 1 - (1 - a)^2: less, the less attention."""
    values = torch.tensor([[[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]]])
    errors = []
    for others in (0.0, 1.0, 3.0, 6.0, 9.0):
        layer = made(torch.tensor([[[1.0, others, others]]], dtype=torch.float64), values)
        exact = float(removals(layer, slice(None))[0, 0, 0])
        a = float(layer.attention[0, 0, 0])
        errors.append(1 - float(first_order(layer, slice(None))[1, 0, 0, 0]) / exact)
        assert errors[-1] == pytest.approx(1 - (1 - a) ** 2, abs=1e-9)
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.5 and errors[-1] < 1e-3


def test_the_key_score_depends_on_which_logit_is_0_and_the_truth_does_not() -> None:
    layer = random_layer()
    moved = layer._replace(logits=layer.logits + 3)
    (before, last), (after, last_after) = scores_of(layer), scores_of(moved)
    for i, name in enumerate(SCORES):
        assert torch.equal(before[i], after[i]) == (name not in ("key", "joint")), name
    assert torch.equal(last, last_after)


def test_what_no_query_sees_has_no_score() -> None:
    """A key that all are too far away from: 0, and not the product of 0 and minus infinity."""
    layer = random_layer()
    logits = layer.logits.clone()
    logits[:, 2:, 1] = -torch.inf
    hidden = made(logits, layer.values, layer.out)
    scores, last = scores_of(hidden, window=3)
    assert bool((scores[:, :, 1] == 0).all()) and bool((last[:, 1] == 0).all())
    assert scores.isfinite().all() and float(scores[:, :, 2].min()) > 0


def test_scores_of_a_group_are_sums_over_its_heads() -> None:
    """As those of heads with keys and values of their own; of exact removal it is the length of the sum."""
    layer = random_layer()
    own = made(layer.logits, layer.values.repeat_interleave(2, 0), layer.out)
    grouped, single = scores_of(layer)[0], scores_of(own)[0]
    torch.testing.assert_close(grouped[:-1], single[:-1].unflatten(1, (2, 2)).sum(2))
    assert not torch.allclose(grouped[-1], single[-1].unflatten(0, (2, 2)).sum(1), rtol=0.01)
    assert bool((grouped[-1] <= 2 * single[-1].unflatten(0, (2, 2)).sum(1)).all())


def test_queries_before_the_last_add_up() -> None:
    """All but the first, which sees one key; a window takes the latest of them; the last is given by itself."""
    layer = random_layer()
    each = first_order(layer, slice(None)).unflatten(1, (2, 2)).sum(2)[..., :-1]
    for window, queries in ((None, [1, 2, 3, 4]), (2, [3, 4]), (99, [1, 2, 3, 4])):
        scores, last = scores_of(layer, window)
        torch.testing.assert_close(scores[:3], each[:, :, queries].sum(2))
        heads = layer.attention[:, queries].sum(1)[:, :-1]
        torch.testing.assert_close(scores[3], heads.unflatten(0, (2, 2)).sum(1))
        torch.testing.assert_close(scores[4], removals(layer, slice(None))[:, queries].sum(1))
        torch.testing.assert_close(last, removals(layer, slice(None))[:, 5])


# ---- choosing and comparing ----


def test_the_largest_are_kept_with_the_last_and_the_first() -> None:
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 0.0, 0.0]).double()

    def kept(share: float, recent: int, first: int) -> list[int]:
        return largest(scores, share, recent, first).nonzero().flatten().tolist()

    assert kept(0.5, 0, 0) == [0, 2, 3, 4]
    assert kept(0.5, 2, 0) == [0, 2, 6, 7]
    assert kept(0.5, 1, 2) == [0, 1, 2, 7]
    assert kept(0.1, 2, 1) == [0, 6, 7]  # no fewer than those that are always kept
    assert kept(0.8, 0, 0) == [0, 1, 2, 3, 4, 5] and kept(1.0, 0, 0) == list(range(8))


def test_rank_agreement_is_spearmans() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(5, (3, 9), generator=g).double() for _ in range(2))  # with ties
    expected = [spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert rank_agreement(a, b).tolist() == pytest.approx(expected)
    assert rank_agreement(a, torch.ones(3, 9).double()).isnan().all()


# ---- eviction ----


def batch_of(model: LanguageModel, n: int = 6) -> Batch:
    """Prompts of one length."""
    batch = sample(registry.get_task("ioi"), model, 4 * n, 0)
    found = batch.select(max(batch.buckets(), key=len).tolist()[:n])
    assert len(found) > 2
    return found


def random_masks(model: LanguageModel, batch: Batch, rows: int) -> Tensor:
    c, n = model.config, len(batch.clean[0]) - 1
    g = torch.Generator().manual_seed(1)
    return torch.rand(c.n_layers, len(batch), rows, c.n_kv_heads, n, generator=g) < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_eviction_is_attention_without_these_keys_at_the_last_position(
    kind: str, make_tiny: MAKE, store: ActivationStore
) -> None:
    """Against whole passes in which the last query's pattern is cut and scaled up; a sink keeps its share."""
    model = make_tiny(kind)
    batch, c = batch_of(model, 3), model.config
    masks = random_masks(model, batch, 2)
    found = Caches.of(model, store, batch.clean).last_logits(model, masks)

    def cut(at: int, row: int) -> Callable[[Tensor], Tensor]:
        def edit(pattern: Tensor) -> Tensor:
            pattern = pattern.clone()
            for i in range(len(batch)):
                for head in range(c.n_heads):
                    gone = ~masks[at, i, row, head * c.n_kv_heads // c.n_heads]
                    lost = pattern[i, head, -1, :-1][gone].sum()
                    pattern[i, head, -1, :-1][gone] = 0
                    pattern[i, head, -1] /= 1 - lost
            return pattern

        return edit

    for row in range(2):
        edits: dict[Any, Any] = {sites.block(at, "attn.hook_pattern"): cut(at, row) for at in range(c.n_layers)}
        logits = model.run(torch.stack(batch.clean), edit=edits, logits="last").logits
        assert logits is not None
        torch.testing.assert_close(found[:, row], logits[:, -1], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_with_everything_kept_the_model_is_itself(kind: str, make_tiny: MAKE, store: ActivationStore) -> None:
    model = make_tiny(kind)
    batch = batch_of(model)
    masks = random_masks(model, batch, 3)
    masks[:, :, :2] = largest(torch.rand(masks[:, :, :2].shape).double(), 1.0, 0, 0)
    found = Caches.of(model, store, batch.clean).last_logits(model, masks)
    assert torch.equal(found[:, 0], found[:, 1])  # bit for bit: no divergence
    assert float(metrics.kl(found[:, 2], found[:, 0]).min()) > 1e-6
    logits = model.run(torch.stack(batch.clean), logits="last").logits
    assert logits is not None
    torch.testing.assert_close(found[:, 0], logits[:, -1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "weight_sparse"])
def test_the_error_of_a_layer_is_that_of_its_output(kind: str, make_tiny: MAKE, store: ActivationStore) -> None:
    """Of passes in which the last query of one layer alone cannot see some keys, what attention adds less its bias."""
    model = make_tiny(kind)
    batch, c = batch_of(model, 3), model.config
    masks = random_masks(model, batch, 2)
    caches = Caches.of(model, store, batch.clean)
    for at in range(c.n_layers):
        hook = sites.block(at, "hook_attn_out")
        whole = model.run(torch.stack(batch.clean), capture=[hook])[hook][:, -1]
        bias = model.out_bias(at)
        for i in range(len(batch)):
            found = output_error(caches.layer(model, at, i), masks[at, i])
            for row in range(2):
                gone = ~masks[at, i, row].repeat_interleave(c.n_heads // c.n_kv_heads, 0)

                def hide(scores: Tensor, gone: Tensor = gone) -> Tensor:
                    scores = scores.clone()
                    scores[:, :, -1, :-1] = scores[:, :, -1, :-1].masked_fill(gone, -torch.inf)
                    return scores

                edit: dict[Any, Any] = {sites.block(at, "attn.hook_attn_scores"): hide}
                moved = model.run(batch.clean[i][None], edit=edit, capture=[hook])[hook][0, -1] - whole[i]
                size = (whole[i] - (0 if bias is None else bias)).square().sum()
                assert float(found[row]) == pytest.approx(float(moved.square().sum() / size), rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_of_a_layer_is_the_models_own(kind: str, make_tiny: MAKE, store: ActivationStore) -> None:
    """Attention in double precision, its complement, and the outputs they make, against what the model computed."""
    model = make_tiny(kind)
    batch = batch_of(model, 3)
    caches = Caches.of(model, store, batch.clean)
    for at in range(model.config.n_layers):
        names = [sites.block(at, name) for name in ("attn.hook_pattern", "attn.hook_z", "attn.hook_result")]
        seen = model.run(batch.clean[1][None], capture=names)
        layer = caches.layer(model, at, 1)
        a, sink = layer.attention, 1 - layer.attention.sum(-1, keepdim=True)
        torch.testing.assert_close(a.float(), seen[names[0]][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.rest, 1 - a, atol=1e-9, rtol=0)
        assert (kind == "weight_sparse") == bool((sink > 0.01).any())
        z = a @ layer.values.repeat_interleave(len(a) // len(layer.values), 0)
        torch.testing.assert_close(z.float(), seen[names[1]][0].transpose(0, 1), atol=1e-5, rtol=1e-3)
        torch.testing.assert_close((z @ layer.out).float(), seen[names[2]][0].transpose(0, 1), atol=1e-5, rtol=1e-3)


def test_no_score_knows_the_last_position(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = batch_of(tiny, 3)
    tokens = batch.clean[0]
    other = torch.cat([tokens[:-1], (tokens[-1:] + 1) % tiny.config.d_vocab])
    caches = Caches.of(tiny, store, [tokens, other])
    (scores, last), (scores_other, last_other) = (scores_of(caches.layer(tiny, 1, i)) for i in range(2))
    torch.testing.assert_close(scores, scores_other, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(last, last_other, rtol=0.01)


# ---- the analysis ----


def test_curves_are_those_of_their_own_prompts(tiny: LanguageModel, store: ActivationStore) -> None:
    """Each prompt's numbers are the same in any company: prompts of several lengths, in their own order."""
    batch = sample(registry.get_task("ioi"), tiny, 6, 0)
    assert len(batch.buckets()) > 1
    found = paper.kv_saliency(tiny, batch, store, 0, keep=0.6, draws=1)
    assert found.shares == (0.25, 0.375, 0.5, 0.6, 0.75) and found.ways[-1] == "random"
    for i in (0, 5):
        alone = paper.kv_saliency(tiny, batch.select([i]), store, 0, keep=0.6, draws=1)
        torch.testing.assert_close(found.kl[:-1, :, i], alone.kl[:-1, :, 0], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(found.whole[i], alone.whole[0], atol=1e-4, rtol=1e-3)
    logits = torch.stack([tiny.run(tokens[None]).logits[0, -1] for tokens in batch.clean])  # type: ignore[index]
    torch.testing.assert_close(found.whole, batch.score(logits), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.agreement[SCORES.index("exact")], torch.ones(3))
    summary = found.summary()
    assert summary["kl_by_score"]["value"] == round(float(found.kl[0, 3].mean()), 4)
    assert bool((found.error[:5, 0] > found.error[:5, -1]).all())  # more is lost where less is kept


def test_agreement_is_that_of_each_heads_tokens(tiny: LanguageModel, store: ActivationStore) -> None:
    """Means of correlations by scipy: with what the same queries lose, and with what the last position does."""
    batch = sample(registry.get_task("ioi"), tiny, 3, 0)
    found = paper.kv_saliency(tiny, batch, store, 0, window=4, draws=1)
    for at in range(3):
        expected = torch.zeros(2, 5)
        for tokens in batch.clean:
            layer = Caches.of(tiny, store, [tokens]).layer(tiny, at, 0)
            scores, last = scores_of(layer, 4)
            for i, j in ((i, j) for i in range(5) for j in range(2)):
                for k, truth in enumerate((scores[-1, j], last[j])):
                    expected[k, i] += spearmanr(scores[i, j].numpy(), truth.numpy()).statistic / 6
        torch.testing.assert_close(found.agreement[:, at], expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.ahead[:, at], expected[1], atol=1e-5, rtol=0)


def test_with_all_tokens_kept_nothing_changes(tiny: LanguageModel, store: ActivationStore) -> None:
    """Whatever the score: every row of a pass is then the model itself, bit for bit."""
    batch = sample(registry.get_task("ioi"), tiny, 3, 0)
    found = paper.kv_saliency(tiny, batch, store, 0, recent=1000)
    assert bool((found.kl == 0).all()) and bool((found.error == 0).all())
    torch.testing.assert_close(found.metric, found.whole.expand_as(found.metric))
    assert float(paper.kv_saliency(tiny, batch, store, 0).kl.min()) > 0


def test_only_random_eviction_depends_on_the_seed(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = sample(registry.get_task("ioi"), tiny, 2, 0)
    one, two = (paper.kv_saliency(tiny, batch, store, seed, draws=2) for seed in (0, 1))
    assert torch.equal(one.kl[:-1], two.kl[:-1]) and torch.equal(one.agreement, two.agreement)
    assert not torch.equal(one.kl[-1], two.kl[-1])


def test_what_makes_no_sense_is_refused(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = sample(registry.get_task("ioi"), tiny, 2, 0)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"window": 0}, "window=0 is too few"),
        ({"recent": -1}, "recent=-1 is too few"),
        ({"draws": 0}, "draws=0 is too few"),
        ({"keep": 1.0}, "keep=1.0 is no share"),
    ]
    for given, message in wrong:
        with pytest.raises(UserError, match=message):
            paper.kv_saliency(tiny, batch, store, 0, **given)
    short = replace(batch, clean=tuple(tokens[:2] for tokens in batch.clean))
    with pytest.raises(UserError, match="a prompt of ioi has fewer than 3 tokens"):
        paper.kv_saliency(tiny, short, store, 0)


@pytest.mark.slow
def test_scores_beat_random_eviction(smollm: LanguageModel, store: ActivationStore) -> None:
    """At equal shares, of every prompt; and what takes values into account agrees with the truth, more than attention
    alone does (Gu et al. 2025)."""
    batch = sample(registry.get_task("ioi"), smollm, 8, 0)
    found = paper.kv_saliency(smollm, batch, store, 0, draws=2)
    assert bool((found.kl[:5].mean(-1) < found.kl[-1].mean(-1)).all())
    assert bool((found.kl[:5, 2] < found.kl[-1, 2]).all())
    assert bool((found.kl[[0, 1, 2, 4], 2].mean(-1) < found.kl[-1, 2].mean() / 10).all())
    assert bool((found.error[:5] < found.error[-1]).all())
    agreement = dict(zip(found.scores, found.agreement.mean(1).tolist(), strict=True))
    assert min(agreement[name] for name in ("value", "key", "joint")) > 0.9 > agreement["attention"] > 0.7
    assert float(found.metric[2, 2].mean()) > 0.8 * float(found.whole.mean())
