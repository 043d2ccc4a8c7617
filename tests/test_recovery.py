"""Recovery of known circuits: by hand, against scikit-learn, and what must not change it."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score

from circuits.recovery import balanced, recovery, stability, standardised
from workbench.errors import UserError
from workbench.scores import NodeScores, PairScores, auc

HEADS = tuple(f"a{layer}.h{h}" for layer in range(12) for h in range(12))


def scored(values: torch.Tensor, per_prompt: torch.Tensor | None = None) -> NodeScores:
    return NodeScores(HEADS[: len(values)], values, "by hand", "none", per_prompt=per_prompt)


def random(n: int = 144, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_auc_equals_scikit_learn_with_and_without_ties() -> None:
    label = torch.rand(144, generator=torch.Generator().manual_seed(1)) < 0.2
    for value in (random(), random().round(), torch.zeros(144)):
        assert auc(value, label) == pytest.approx(float(roc_auc_score(label.numpy(), value.numpy())))
    assert auc(torch.zeros(144), label) == 0.5  # ties count half


def test_monotone_transforms_change_nothing() -> None:
    """Softmax over all heads, as in the discrete-SAE paper, is one."""
    truth = HEADS[3:20]
    value = random() + torch.tensor([float(name in truth) for name in HEADS])
    plain = recovery(scored(value), truth, name="t", absolute=False)
    for transformed in (value.softmax(0), value.double().exp().float(), 3 * value - 7):
        other = recovery(scored(transformed), truth, name="t", absolute=False)
        assert other.auc == pytest.approx(plain.auc) and other.f1_at_n == pytest.approx(plain.f1_at_n)


def test_a_confusion_table_by_hand() -> None:
    """4 true, 6 false; of the four best 3 are true, of the five best all 4."""
    value = torch.tensor([9.0, 8, 7, 1, 6, 0.5, 0.4, 0.3, 0.2, 0.1])
    found = recovery(scored(value), HEADS[:4], name="t")
    assert found.f1_at_n == pytest.approx(0.75) and found.n_true == 4 and found.n_items == 10
    assert found.best_f1 == pytest.approx(8 / 9)  # the five best: precision 4/5, recall 1
    label = torch.arange(10) < 4
    assert balanced(value, label) == pytest.approx(2 * 1 * (5 / 6) / (1 + 5 / 6))  # the five best: TPR 1, TNR 5/6
    assert balanced(value, label) != pytest.approx(found.best_f1)


def test_the_null_is_one_half_and_the_interval_holds_the_value() -> None:
    found = recovery(scored(random()), HEADS[:26], name="t")
    assert found.null_auc == pytest.approx(0.5, abs=0.02) and 0.02 < found.null_std < 0.1
    assert found.auc_low < found.auc < found.auc_high
    perfect = recovery(scored(torch.arange(144.0)), HEADS[-26:], name="t")
    assert perfect.auc == perfect.auc_low == perfect.f1_at_n == perfect.average_precision == 1


def test_pairs_of_heads_are_recovered_like_nodes() -> None:
    table = random(9).reshape(3, 3)
    pairs = PairScores.of(["a0.h0", "a0.h1", "a1.h0"], table, "by hand", "none")
    assert pairs.pairs == ("a0.h0->a1.h0", "a0.h1->a1.h0") and torch.equal(pairs.scores, table[:2, 2])
    best = pairs.pairs[int(pairs.scores.abs().argmax())]
    assert recovery(pairs, [best], name="t").auc == 1


def test_absolute_scores_find_what_hurts() -> None:
    value = torch.zeros(20)
    value[:5] = -1
    assert recovery(scored(value), HEADS[:5], name="t").auc == 1
    assert recovery(scored(value), HEADS[:5], name="t", absolute=False).auc == 0


def test_standardised_scores_are_alike_under_random_signs() -> None:
    """Loud nodes have large means by chance; over their standard error they do not: AUC .5 for them."""
    generator = torch.Generator().manual_seed(0)
    loud = torch.where(torch.arange(144) < 40, 10.0, 1.0)[:, None]
    raw, z = [], []
    for _ in range(20):
        each = loud * torch.randn(144, 50, generator=generator)
        scores = scored(each.mean(1), each)
        raw.append(recovery(scores, HEADS[:40], name="loud", draws=1).auc)
        z.append(recovery(standardised(scores), HEADS[:40], name="loud", draws=1).auc)
    assert sum(raw) / 20 > 0.9 and 0.45 < sum(z) / 20 < 0.55


def test_stability_of_clear_and_of_random_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(144, 30, generator=generator)
    clear = noise + 20 * (torch.arange(144) < 10)[:, None]
    assert stability(scored(clear.mean(1), clear), 10)[0] == 1
    mean, (low, high) = stability(scored(noise.mean(1), noise), 10)
    assert low <= mean <= high and mean < 0.7
    with pytest.raises(UserError, match="needs scores per prompt"):
        stability(scored(random()), 5)


def test_bad_truths_are_sentences() -> None:
    with pytest.raises(UserError, match=r"'a12\.h0'"):
        recovery(scored(random()), ["a12.h0"], name="t")
    with pytest.raises(UserError, match="144 of 144 items are true in 'all'"):
        recovery(scored(random()), HEADS, name="all")
    with pytest.raises(UserError, match="at least two prompts"):
        standardised(scored(random()))


def test_only_some_items_can_be_compared() -> None:
    value = torch.tensor([3.0, 2, 1, 9])
    found = recovery(scored(value), HEADS[:1], name="t", among=lambda item: item != "a0.h3")
    assert found.auc == 1 and found.n_items == 3
