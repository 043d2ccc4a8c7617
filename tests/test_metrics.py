"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.metrics import binary_loss, kl, logit_diff, prob_diff, top1

# Softmax of log p is p, so probabilities can be read off.
LOGITS = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.4, 0.4]]).log()
ANSWERS = [torch.tensor([0]), torch.tensor([2, 3])]
WRONG = [torch.tensor([1, 3]), torch.tensor([0])]


def test_prob_diff_sums_probabilities() -> None:
    assert prob_diff(LOGITS, ANSWERS, WRONG).tolist() == pytest.approx([0.5 - 0.3, 0.8 - 0.1])


def test_logit_diff_averages_logits() -> None:
    by_hand = [
        torch.tensor(0.5).log() - (torch.tensor(0.2).log() + torch.tensor(0.1).log()) / 2,
        torch.tensor(0.4).log() - torch.tensor(0.1).log(),
    ]
    assert logit_diff(LOGITS, ANSWERS, WRONG).tolist() == pytest.approx([float(x) for x in by_hand])
    torch.testing.assert_close(logit_diff(LOGITS + 7, ANSWERS, WRONG), logit_diff(LOGITS, ANSWERS, WRONG))


def test_binary_loss_is_over_the_two_candidates_alone() -> None:
    answers, wrong = [torch.tensor([0]), torch.tensor([1])], [torch.tensor([1]), torch.tensor([2])]
    expected = [-math.log(0.5 / 0.7), -math.log(0.1 / 0.5)]
    assert binary_loss(LOGITS, answers, wrong).tolist() == pytest.approx(expected)
    elsewhere = LOGITS.clone()
    elsewhere[:, 3] += 5
    torch.testing.assert_close(binary_loss(elsewhere, answers, wrong), binary_loss(LOGITS, answers, wrong))
    other = [-math.log(0.2 / 0.7), -math.log(0.4 / 0.5)]
    assert binary_loss(LOGITS, wrong, answers).tolist() == pytest.approx(other)


def test_binary_loss_of_one_token_against_the_rest() -> None:
    named, rest = [torch.tensor([0]), torch.tensor([2])], [torch.tensor([], dtype=torch.long)] * 2
    assert binary_loss(LOGITS, named, rest).tolist() == pytest.approx([-math.log(0.5), -math.log(0.4)])
    assert binary_loss(LOGITS, rest, named).tolist() == pytest.approx([-math.log(0.5), -math.log(0.6)])


def test_kl_of_two_coins() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = 0.5 * torch.tensor(0.5 / 0.25).log() + 0.5 * torch.tensor(0.5 / 0.75).log()
    assert float(kl(q.log(), reference=p.log())) == pytest.approx(float(expected))
    assert float(kl(p.log(), reference=p.log())) == pytest.approx(0, abs=1e-7)


def test_top1_looks_at_the_whole_vocabulary() -> None:
    assert top1(LOGITS, ANSWERS).tolist() == [1, 1]
    assert top1(LOGITS, WRONG).tolist() == [0, 0]
