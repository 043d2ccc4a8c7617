"""Relevance patching: attribution patching with the gradient replaced by the slopes of relevance propagation.

Jafari et al. 2025 (RelP, arXiv:2508.21258), with the rules of AttnLRP (Achtibat et al. 2024): a norm's scale is a
constant, an activation function multiplies by f(x) / x, and of a product (gate times input, query times key, pattern
times value) each factor gets half. What a source passes on is then shared out among its readers without being lost,
where a plain gradient may vanish (a saturated softmax, a norm that takes a common direction away) or explode. One
backward pass, as EAP.

Contextual decomposition (CD-T, Hsu et al. 2024) follows the same idea forwards, once per source; the two have not been
compared here.
"""

from __future__ import annotations

from circuits.attribution import edge_attribution
from circuits.graph import EdgeScores
from circuits.writes import Ablation
from workbench.activations import ActivationStore
from workbench.models import LanguageModel
from workbench.prompts import Batch
from workbench.registry import analysis


@analysis("relp", version=1, n=32)
def relp(model: LanguageModel, batch: Batch, store: ActivationStore, *, ablation: Ablation = "resample") -> EdgeScores:
    """Relevance patching: every edge's estimated effect from one backward pass with relevance rules.

    ablation  what an edge carries when it is cut: resample (corrupted prompt), mean (over corrupted prompts), zero
    """
    return edge_attribution(model, batch, store, 1, "right", ablation, relevance=True)
