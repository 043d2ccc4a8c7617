"""Laws of truncated attention: identities and bounds by hand and in loops, and what the model itself does with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from papers import attention_truncation as module
from papers.attention_truncation import attention_truncation, gap_bound, head_tail_bound, tails, truncate
from tests.conftest import CONFIGS
from workbench import plots, registry
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.interventions import resample
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample
from workbench.sites import block

NONE = -math.inf


def draw(model: LanguageModel, n: int = 4) -> Batch:
    return sample(registry.get_task("ioi"), model, n, seed=0)


def random_rows(seed: int, scale: float, sink: bool) -> Tensor:
    """[head, query, outcome], with a window over the keys; the last outcome is the sink's."""
    generator = torch.Generator().manual_seed(seed)
    rows = scale * torch.randn(3, 9, 10, generator=generator, dtype=torch.float64)
    distance = torch.arange(9)[:, None] - torch.arange(9)[None]
    rows[..., :-1].masked_fill_((distance < 0) | (distance >= 6), NONE)
    if not sink:
        rows[..., -1] = NONE
    return rows


def test_a_row_by_hand() -> None:
    row = torch.tensor([1 / 8, 1 / 2, 1 / 8, 1 / 4], dtype=torch.float64)
    ranked = row.log().sort(descending=True).values
    torch.testing.assert_close(tails(row.sort(descending=True).values), row.new_tensor([1, 1 / 2, 1 / 4, 1 / 8, 0]))
    torch.testing.assert_close(head_tail_bound(ranked), row.new_tensor([1, 0.75 / 1.25, 1 / 4, 1 / 8, 0]))
    torch.testing.assert_close(gap_bound(ranked), row.new_tensor([1, 1 / (1 + 2 / 3), 1 / (1 + 2), 1 / (1 + 3), 0]))
    logits = torch.cat([row.log(), torch.tensor([NONE], dtype=torch.float64)])[None, None]
    values = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 4.0], [0.0, 2.0]]], dtype=torch.float64)
    for eps, needed in ((0.61, [1, 1, 1]), (0.3, [2, 2, 3]), (0.2, [3, 3, 4]), (0.1, [4, 4, 4])):
        assert truncate(logits, values, eps).least[:, 0, 0].tolist() == needed
    cut = truncate(logits, values, 0.3)  # output (1/2, 1); of the first two keys alone (2/3, 2/3)
    assert float(cut.error) == pytest.approx(math.hypot(1 / 6, 1 / 3) / math.hypot(1 / 2, 1))
    assert (cut.checks, cut.violations) == (2 * 3 + 1, 0)
    p, rank = logits.softmax(-1), torch.tensor([[[2, 0, 3, 1]]])
    tv, kl = module.distances(p, module.truncated(p, rank, torch.tensor([[2]])))
    assert float(tv) == pytest.approx(1 / 4) and float(kl) == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
def test_bounds_and_tails_are_those_of_a_loop_over_keys(sink: bool, scale: float) -> None:
    rows = random_rows(1, scale, sink)
    ranked = rows[..., :-1].sort(dim=-1, descending=True).values
    p = rows.softmax(-1)[..., :-1].sort(dim=-1, descending=True).values
    found = tails(p), head_tail_bound(ranked, rows[..., -1:]), gap_bound(ranked)
    for head in range(3):
        for query in range(9):
            logits = sorted((x for x in rows[head, query, :-1].tolist() if x > NONE), reverse=True)
            always = math.exp(rows[head, query, -1])
            n = len(logits)
            for k in range(1, n + 1):
                kept, left = (sum(map(math.exp, part)) for part in (logits[:k], logits[k:]))
                tv = left / (always + kept + left)
                most = (n - k) * math.exp(logits[k]) if k < n else 0.0
                by_gap = 1 / (1 + k / (n - k) * math.exp(logits[k - 1] - logits[k])) if k < n else 0.0
                expected = tv, most / (always + kept + most), by_gap
                assert [float(x[head, query, k]) for x in found] == pytest.approx(expected, rel=1e-9, abs=1e-14)
                assert expected[0] <= expected[1] * (1 + 1e-12) and expected[1] <= expected[2] * (1 + 1e-12)


def test_bounds_are_reached_where_nothing_is_lost() -> None:
    """The head-tail bound is the tail where the tail is one key, or all alike; the gap bound where all keys are."""
    ranked = torch.tensor([3.0, 1.0, 0.5, 0.5, 0.5], dtype=torch.float64)
    tail = tails(ranked.softmax(-1))
    torch.testing.assert_close(head_tail_bound(ranked)[[2, 3, 4]], tail[[2, 3, 4]])
    assert float(head_tail_bound(ranked)[1]) > float(tail[1]) + 0.01
    alike = torch.zeros(5, dtype=torch.float64)
    for bound in (head_tail_bound, gap_bound):
        torch.testing.assert_close(bound(alike), 1 - torch.arange(6, dtype=torch.float64) / 5)


@pytest.mark.parametrize("sink", [False, True])
def test_neither_a_shift_of_a_row_nor_the_order_of_keys_matters(sink: bool) -> None:
    rows = random_rows(2, 2.0, sink)
    values = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    cut = truncate(rows, values, 0.05)
    shifted = truncate(rows + torch.arange(9)[:, None], values, 0.05)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(4))
    permuted = truncate(rows[..., [*order.tolist(), 9]], values[:, order], 0.05)
    for other in (shifted, permuted):
        assert torch.equal(other.least, cut.least) and torch.equal(other.visible, cut.visible)
        torch.testing.assert_close(other.error, cut.error)
        assert (other.checks, other.violations) == (cut.checks, cut.violations) == (cut.checks, 0)
    assert float(cut.identity_error) < 1e-14 and float(cut.output_identity_error) < 1e-14


def test_broken_bounds_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(5, 2.0, False)
    values = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    sizes = [min(query + 1, 6) for query in range(9)]
    pairs = 3 * sum(n - 1 for n in sizes)
    assert truncate(rows, values, 0.01).checks == 2 * pairs + 3 * 8
    monkeypatch.setattr(module, "gap_bound", lambda ranked: head_tail_bound(ranked) - 1e-9)
    assert truncate(rows, values, 0.01).violations == pairs
    monkeypatch.undo()
    monkeypatch.setattr(module, "head_tail_bound", lambda ranked, sink: tails(ranked.softmax(-1)) * 0.9)
    assert truncate(rows, values, 0.01).violations == pairs


def test_opposite_values_reach_the_bound_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 0.9 and 0.1 with values 1 and -1 the output is 0.8, and 1 without the second: 2 x 0.1 x 1 apart."""
    logits = torch.tensor([[[0.9, 0.1, 0.0]]], dtype=torch.float64).log()
    values = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    cut = truncate(logits, values, 0.2)
    assert float(cut.error) == pytest.approx(0.2 / 0.8) and (cut.checks, cut.violations) == (3, 0)
    exact = module.truncated
    monkeypatch.setattr(module, "truncated", lambda p, rank, kept: 1.001 * exact(p, rank, kept))
    assert truncate(logits, values, 0.2).violations == 1


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_what_is_reported_is_what_the_model_does_with_truncated_patterns(
    kind: str, make_tiny: Callable[..., LanguageModel], store: ActivationStore
) -> None:
    """Keys are counted in the model's own patterns, and its heads' outputs compared with and without the others."""
    model, eps = make_tiny(kind), 0.15
    batch = draw(model)
    found = attention_truncation(model, batch, store, eps=eps)
    assert found.violations == 0 and found.checks > 1000
    assert found.identity_error < 1e-12 and found.output_identity_error < 1e-12 and found.pattern_error < 1e-5
    for layer in range(3):
        keys, shares, errors = [], [], []
        hooks = block(layer, "attn.hook_pattern"), block(layer, "attn.hook_z")
        for tokens in batch.clean:
            plain = model.run(tokens[None], capture=hooks)
            pattern = plain[hooks[0]]
            ranked = pattern.sort(dim=-1, descending=True)
            dropped = ranked.values.flip(-1).cumsum(-1).flip(-1) - ranked.values  # beyond each key
            kept = 1 + (dropped > eps).sum(-1, keepdim=True)
            if kind == "weight_sparse":  # a sink may hold enough of the attention
                kept = kept.where(pattern.sum(-1, keepdim=True) > eps, 0)
            stays = ranked.indices.argsort(-1) < kept
            rest = (pattern * stays) / (1 - (pattern * ~stays).sum(-1, keepdim=True))
            cut = model.run(tokens[None], capture=hooks[1:], edit={hooks[0]: resample(rest[0])})
            z, left = (run[hooks[1]][0].transpose(0, 1)[:, 1:] for run in (plain, cut))
            errors.append((z - left).norm(dim=-1) / z.norm(dim=-1))
            keys.append(kept[0, :, 1:, 0].float())
            shares.append(keys[-1] / (pattern[0, :, 1:] > 0).sum(-1))
        torch.testing.assert_close(found.keys[layer], torch.cat(keys, 1).mean(1))
        assert torch.equal(found.most[layer], torch.cat(keys, 1).amax(1).long())
        torch.testing.assert_close(found.share[layer], torch.cat(shares, 1).mean(1))
        torch.testing.assert_close(found.error[layer], torch.cat(errors, 1).mean(1), rtol=1e-3, atol=1e-5)
    assert bool((found.certified >= found.share).all()) and bool((found.by_gap >= found.certified).all())
    n = sum(len(tokens) - 1 for tokens in batch.clean)
    assert found.rows.sum(1).tolist() == [12 * n] * 3
    needed = (found.rows[0] * torch.arange(found.rows.shape[1])).sum() / (12 * n)
    assert float(needed) == pytest.approx(float(found.keys.mean()), rel=1e-5)


def test_a_head_of_a_model_with_a_strong_sink_needs_no_key(
    make_tiny: Callable[..., LanguageModel], store: ActivationStore
) -> None:
    model = make_tiny("weight_sparse")
    model._module.transformer.h[1].attn.attn_imp.sink_logit.data[2] = 20.0
    found = attention_truncation(model, draw(model), store)
    assert float(found.keys[1, 2]) == int(found.most[1, 2]) == float(found.certified[1, 2]) == 0
    assert float(found.error[1, 2]) == pytest.approx(1.0)  # nothing is left of the little it wrote
    assert int((found.most > 0).sum()) == 11 and found.violations == 0


def test_what_makes_no_sense_is_refused(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, 2)
    for eps in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(UserError, match="share of attention"):
            attention_truncation(tiny, batch, store, eps=eps)
    short = replace(batch, clean=tuple(tokens[:1] for tokens in batch.clean))
    with pytest.raises(UserError, match="one token"):
        attention_truncation(tiny, short, store)


def test_the_figure_has_layers_across_and_ends_at_all_rows(tiny: LanguageModel, store: ActivationStore) -> None:
    found = attention_truncation(tiny, draw(tiny), store)
    needed, certified, *curves = plots.figure(found).data
    assert torch.equal(torch.tensor(needed.z).T, found.share)
    assert torch.equal(torch.tensor(certified.z).T, found.certified)
    ends = [curve.y[-1] for curve in curves]
    assert ends == [1.0, 1.0, 1.0] and all(a >= b for a, b in zip(curves[0].y, curves[1].y, strict=True))


@pytest.mark.slow
def test_no_bound_is_broken_in_a_real_model(smollm: LanguageModel, store: ActivationStore) -> None:
    found = attention_truncation(smollm, draw(smollm, 16), store)
    assert found.checks >= 100_000 and found.violations == 0
    assert found.identity_error < 1e-6 and found.output_identity_error < 1e-6 and found.pattern_error < 1e-5
    assert found.summary()["fewest"]["head"] == "a18.h8"  # it attends to the first token alone
