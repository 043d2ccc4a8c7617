"""How well a model does a task, one number per prompt, from the logits at the last position.

A task names its metric. `answers` and `wrong` are token ids per prompt; most tasks have one of each, Greater-Than has
many. A task's metric is larger when the model does better, and 0 when right and wrong are equally likely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Ids = Sequence[Int[Tensor, "_"]]  # one length per prompt


def logit_diff(logits: Float[Tensor, "batch vocab"], answers: Ids, wrong: Ids) -> Float[Tensor, " batch"]:
    """Mean logit of the right answers minus mean logit of the wrong ones (Wang et al. 2022, section 2)."""
    return torch.stack(
        [
            row[a].mean() - row[w].mean()
            for row, a, w in zip(logits, _on(logits, answers), _on(logits, wrong), strict=True)
        ]
    )


def prob_diff(logits: Float[Tensor, "batch vocab"], answers: Ids, wrong: Ids) -> Float[Tensor, " batch"]:
    """Total probability of the right answers minus that of the wrong ones (Hanna et al. 2023, section 2)."""
    probs = logits.softmax(-1)
    return torch.stack(
        [row[a].sum() - row[w].sum() for row, a, w in zip(probs, _on(logits, answers), _on(logits, wrong), strict=True)]
    )


def kl(logits: Float[Tensor, "batch vocab"], reference: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
    """KL divergence of the prediction from a reference prediction, in nats: sum p_ref (log p_ref - log p)."""
    log_p = reference.log_softmax(-1)
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


def binary_loss(logits: Float[Tensor, "batch vocab"], answers: Ids, wrong: Ids) -> Float[Tensor, " batch"]:
    """Cross-entropy between two candidates alone, in nats: -log p(answer | answer or wrong). Smaller is better.

    Nothing else in the vocabulary counts; ln 2 where both are equally likely. A row with no wrong tokens has everything
    else wrong, -log p(answer); one with no answers has everything else right, -log(1 - p(wrong)).

    Gao et al. 2025, section 2.2 and appendix A.5: the loss that a pruned circuit is held to.
    """

    return torch.nn.functional.softplus(-log_odds(logits, answers, wrong))


def log_odds(logits: Float[Tensor, "batch vocab"], answers: Ids, wrong: Ids) -> Float[Tensor, " batch"]:
    """log p(answer) - log p(wrong); where one of the two is none, it stands for all that the other is not."""
    each = zip(logits, _on(logits, answers), _on(logits, wrong), strict=True)
    return torch.stack([_total(row, a, w) - _total(row, w, a) for row, a, w in each])


def _total(row: Tensor, ids: Tensor, others: Tensor) -> Tensor:
    if len(ids):
        return row[ids].logsumexp(-1)
    return row.index_fill(0, others, float("-inf")).logsumexp(-1)


def top1(logits: Float[Tensor, "batch vocab"], answers: Ids) -> Float[Tensor, " batch"]:
    """1 where the most likely token of the whole vocabulary is a right answer."""
    best = logits.argmax(-1)
    return torch.stack([(a == b).any().float() for a, b in zip(_on(logits, answers), best, strict=True)])


def _on(logits: Tensor, ids: Ids) -> list[Tensor]:
    return [i.to(logits.device) for i in ids]


METRICS: dict[str, Callable[..., Tensor]] = {"logit_diff": logit_diff, "prob_diff": prob_diff}
