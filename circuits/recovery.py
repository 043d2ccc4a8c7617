"""How well scores recover a known circuit, and how far such a number can be trusted.

ROC AUC does not depend on a threshold or on monotone transforms of the scores, and counts ties half; average precision
and F1 say more where few are true (26 of 144 heads). Beside each stand a bootstrap interval over the items scored, and
the null: the same scores against as many items drawn at random.

What the discrete-SAE paper calls F1 is the harmonic mean of sensitivity and specificity; it is here as `balanced`, to
compare, and is never called F1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph import EdgeScores
from workbench.errors import UserError, unknown
from workbench.scores import NodeScores, PairScores, auc

NULL_DRAWS = 200


@dataclass(frozen=True)
class Recovery:
    """Scores held to a set of true items.

    auc, average_precision   over all items; `auc_low`, `auc_high` bound 95 % of a bootstrap over items
    f1_at_n                  precision = recall = F1 of the n best items, n being the number of true ones
    best_f1                  over all thresholds: optimistic, as the threshold is chosen on the truth
    balanced                 over all thresholds, harmonic mean of sensitivity and specificity (not F1)
    null_auc, null_std       mean and standard deviation of the AUC of the same scores against random sets of n items
    truth                    which list; absolute: whether scores are ranked by absolute value
    """

    auc: float
    auc_low: float
    auc_high: float
    average_precision: float
    f1_at_n: float
    best_f1: float
    balanced: float
    null_auc: float
    null_std: float
    n_true: int
    n_items: int
    truth: str
    absolute: bool
    seed: int

    def summary(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in vars(self).items()}


def recovery(
    scores: NodeScores | EdgeScores | PairScores,
    truth: Iterable[str],
    *,
    name: str,
    absolute: bool = True,
    among: Callable[[str], bool] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Recovery:
    """Hold scores to true items.

    truth     names of the true nodes, edges or pairs of heads; name says which list it is
    absolute  rank by absolute value
    among     which items to compare: all, unless told otherwise (heads only, edges between heads only)
    draws     of the bootstrap over items

    Raises UserError for a true item that is not scored, and where all or none of the items are true.
    """
    names = _items(scores)
    keep = [i for i, item in enumerate(names) if among is None or among(item)]
    true = set(truth)
    for item in true:
        if item not in names:
            raise unknown("item that is scored", item, names)
    label = torch.tensor([names[i] in true for i in keep])
    value = (scores.scores.abs() if absolute else scores.scores)[keep].double()
    n = int(label.sum())
    if not 0 < n < len(keep):
        raise UserError(f"{n} of {len(keep)} items are true in {name!r}; an AUC needs some of both.")
    from sklearn.metrics import average_precision_score  # here: it is half a second that few need

    generator = torch.Generator().manual_seed(seed)
    boots = [auc(value[i], label[i]) for i in _resamples(label, draws, generator)]
    order = value.argsort(descending=True, stable=True)
    precision = label[order].double().cumsum(0) / torch.arange(1, len(keep) + 1)
    recall = label[order].double().cumsum(0) / n
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    ends = torch.cat([value[order][1:] != value[order][:-1], torch.ones(1, dtype=torch.bool)])  # no cut through ties
    null = torch.tensor([auc(value, label[torch.randperm(len(keep), generator=generator)]) for _ in range(NULL_DRAWS)])
    low, high = torch.tensor(boots).quantile(torch.tensor([0.025, 0.975])).tolist()
    return Recovery(
        auc=auc(value, label),
        auc_low=low,
        auc_high=high,
        average_precision=float(average_precision_score(label.numpy(), value.numpy())),
        f1_at_n=float(f1[n - 1]),
        best_f1=float(f1[ends].max()),
        balanced=balanced(value, label),
        null_auc=float(null.mean()),
        null_std=float(null.std()),
        n_true=n,
        n_items=len(keep),
        truth=name,
        absolute=absolute,
        seed=seed,
    )


def _items(scores: NodeScores | EdgeScores | PairScores) -> tuple[str, ...]:
    if isinstance(scores, NodeScores):
        return scores.nodes
    return scores.pairs if isinstance(scores, PairScores) else scores.graph.names


def balanced(value: Float[Tensor, " item"], label: Bool[Tensor, " item"]) -> float:
    """Highest harmonic mean of sensitivity and specificity, 2 TPR TNR / (TPR + TNR), over thresholds."""
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(label.numpy(), value.numpy())
    total = tpr + 1 - fpr
    return float((2 * tpr * (1 - fpr) / total.clip(min=1e-12)).max())


def standardised(scores: NodeScores) -> NodeScores:
    """Mean over its standard error over prompts: under shuffled labels alike for nodes that vary much and little.

    Raises UserError where there are no scores per prompt, or of one prompt only.
    """
    each = scores.per_prompt
    if each is None or each.shape[1] < 2:
        raise UserError("standardising needs scores per prompt of at least two prompts; this method or run has none.")
    error = each.double().std(1) / each.shape[1] ** 0.5
    z = torch.where(error > 0, each.double().mean(1) / error.clamp(min=torch.finfo(torch.float64).tiny), 0)
    return NodeScores(
        scores.nodes,
        z.float(),
        f"mean over its standard error over {each.shape[1]} prompts of: {scores.definition}",
        "standard errors",
        headline=dict(scores.headline),
    )


def stability(scores: NodeScores, k: int, *, draws: int = 100, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Mean Jaccard index of the k best nodes of two bootstrap samples of the prompts, and 95 % of it.

    Raises UserError without scores per prompt.
    """
    each = scores.per_prompt
    if each is None:
        raise UserError("stability over prompts needs scores per prompt; this method has none.")
    generator = torch.Generator().manual_seed(seed)
    n = each.shape[1]
    top = []
    for _ in range(2 * draws):
        some = torch.randint(n, (n,), generator=generator)
        top.append(set(each[:, some].mean(1).abs().topk(min(k, len(each))).indices.tolist()))
    pairs = zip(top[::2], top[1::2], strict=True)
    found = torch.tensor([len(one & other) / len(one | other) for one, other in pairs])
    low, high = found.quantile(torch.tensor([0.025, 0.975])).tolist()
    return float(found.mean()), (low, high)


def _resamples(label: Tensor, draws: int, generator: torch.Generator) -> Iterable[Tensor]:
    """Indices with replacement, true and false items apart, so that no draw lacks either."""
    groups = [label.nonzero()[:, 0], (~label).nonzero()[:, 0]]
    for _ in range(draws):
        yield torch.cat([group[torch.randint(len(group), (len(group),), generator=generator)] for group in groups])
