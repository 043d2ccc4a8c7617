"""Learned masks: gates on all nodes or all edges, trained together so that few stay open and the prediction is kept.

Edge Pruning (Bhaskar et al. 2024) and node pruning (Cao et al. 2021). Each gate g is between 0 (ablated) and 1 (kept);
what it gates carries g * now + (1 - g) * ablated. Minimised is

    KL(model || gated model) + l1 (share - t) + l2 (share - t)^2,     share = expected share of open gates

with multipliers l1, l2 that rise while the share is above its target t, which falls from 1 to `keep` in the first half
of the steps. Gates are hard-concrete (Louizos et al. 2018, eq. 10-11: sampled, exactly 0 or 1 with some probability) or
straight-through (a step function forwards, a sigmoid's gradient backwards, no sampling).

A score is the probability at the end that a gate is open, so that absolute and signed ranking agree. It ranks; it is no
effect on the metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from circuits.graph import EdgeScores, Graph, nodes_of
from circuits.wiring import Wiring
from circuits.writes import Ablation, Writes
from workbench import sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.metrics import kl
from workbench.models import LanguageModel, Resume
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis
from workbench.scores import NodeScores

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # temperature and stretch of hard-concrete gates, as in Louizos et al.
PROMPTS_AT_ONCE = 16
Gates = Literal["hard-concrete", "straight-through"]
Run = Callable[[Float[Tensor, " gate"]], Float[Tensor, "batch vocab"]]


@analysis("node-pruning", version=1, n=32)
def node_pruning(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    keep: float = 0.1,
    steps: int = 200,
    lr: float = 0.1,
    gates: Gates = "hard-concrete",
    ablation: Ablation = "resample",
    mask_seed: int = 0,
) -> NodeScores:
    """Learned gates on every head and MLP: which few together keep the model's prediction.

    keep       target share of open gates
    steps      of Adam, each on up to 16 prompts of one length
    lr         learning rate of the gates' logits
    gates      hard-concrete (sampled) or straight-through
    ablation   what a closed gate lets through: resample (corrupted prompt), mean (over corrupted prompts), zero
    mask_seed  of the order of the prompts and of the sampled gates
    """
    runs = [
        partial(_gated_nodes, model, Writes(model, store, some, batch, ablation), some)
        for _, some in batch.parts(PROMPTS_AT_ONCE)
    ]
    nodes = nodes_of(model.config.n_layers, model.config.n_heads)
    logit, headline = _train(runs, len(nodes), keep, steps, lr, gates, mask_seed)
    return NodeScores(
        nodes,
        open_share(logit, gates),
        _definition("node", batch, keep, gates, ablation),
        "probability",
        headline=headline,
    )


@analysis("edge-pruning", version=1, n=16)
def edge_pruning(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    keep: float = 0.02,
    steps: int = 200,
    lr: float = 0.1,
    gates: Gates = "hard-concrete",
    ablation: Ablation = "resample",
    mask_seed: int = 0,
) -> EdgeScores:
    """Learned gates on every edge: which few together keep the model's prediction.

    keep       target share of open gates
    steps      of Adam, each on up to 16 prompts of one length
    lr         learning rate of the gates' logits
    gates      hard-concrete (sampled) or straight-through
    ablation   what a closed gate lets through: resample (corrupted prompt), mean (over corrupted prompts), zero
    mask_seed  of the order of the prompts and of the sampled gates
    """
    graph = Graph.of(model.config)

    def gated(run: Wiring, gate: Tensor) -> Tensor:
        return run.run(graph.dense(gate)[None], grad=True)[0]

    parts = batch.parts(PROMPTS_AT_ONCE)
    runs = [partial(gated, Wiring(model, store, some, ablation, whole=batch)) for _, some in parts]
    logit, headline = _train(runs, len(graph), keep, steps, lr, gates, mask_seed)
    score = open_share(logit, gates)
    return EdgeScores(graph, score, _definition("edge", batch, keep, gates, ablation), "probability", headline=headline)


def _definition(what: str, batch: Batch, keep: float, gates: Gates, ablation: Ablation) -> str:
    return (
        f"probability that a learned {gates} gate on the {what} is open, trained to keep the prediction (KL) with "
        f"{keep:.1%} of gates open; ablation {ablation}, {len(batch)} prompts"
    )


def _gated_nodes(model: LanguageModel, writes: Writes, batch: Batch, gate: Tensor) -> Tensor:
    """Logits at the last position with every head and MLP between itself and its ablated value."""
    c = model.config
    by_layer = gate.to(model.device, model.dtype).unflatten(0, (c.n_layers, c.n_heads + 1))

    def mix(share: Tensor, ablated: Tensor, x: Tensor) -> Tensor:
        return ablated + share * (x - ablated)

    edit: dict[str | sites.Site, Callable[[Tensor], Tensor]] = {}
    for layer, (z, mlp) in enumerate(zip(writes.z_hooks, writes.mlp_hooks, strict=True)):
        edit[z] = partial(mix, by_layer[layer, :-1, None], writes.ablated[z])
        edit[mlp] = partial(mix, by_layer[layer, -1], writes.ablated[mlp])
    start = Resume(0, writes.clean[writes.start])
    out = model.run(torch.stack(batch.clean), edit=edit, logits="last", start=start, grad=True).logits
    assert out is not None
    return out[:, -1]


def _train(
    runs: Sequence[Run], n: int, keep: float, steps: int, lr: float, gates: Gates, seed: int
) -> tuple[Float[Tensor, " gate"], dict[str, float]]:
    """Logits of the gates, and how it ended."""
    if not 0 < keep < 1 or steps < 1:
        raise UserError(f"keep={keep:g} must lie between 0 and 1, and steps={steps} be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        whole = [run(torch.ones(n)).float() for run in runs]
    logit = torch.full((n,), 2.0, requires_grad=True)
    multipliers = torch.zeros(2, requires_grad=True)
    adam = torch.optim.Adam([logit], lr=lr)
    ascent = torch.optim.Adam([multipliers], lr=lr, maximize=True)
    loss = share = torch.zeros(())
    for step in track(range(steps), "pruning"):
        at = int(torch.randint(len(runs), (), generator=generator))
        target = max(keep, 1 - (1 - keep) * 2 * step / steps)
        loss = kl(runs[at](gate(logit, gates, generator)).float(), whole[at]).mean()
        share = open_share(logit, gates).mean()
        over = share - target
        adam.zero_grad()
        ascent.zero_grad()
        (loss + multipliers[0] * over + multipliers[1] * over.square()).backward()
        adam.step()
        ascent.step()
    return logit.detach(), {
        "final_kl": float(loss.detach()),
        "expected_share_open": float(share.detach()),
        "open": float((logit > 0).sum()),
        "steps": float(steps),
    }


def gate(logit: Float[Tensor, " gate"], gates: Gates, generator: Generator) -> Float[Tensor, " gate"]:
    """The gates of one step."""
    if gates == "straight-through":
        soft = logit.sigmoid()
        return (logit > 0).float() + soft - soft.detach()
    u = torch.rand(logit.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    s = ((u.logit() + logit) / BETA).sigmoid()
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def open_share(logit: Float[Tensor, " gate"], gates: Gates) -> Float[Tensor, " gate"]:
    """Probability that a gate is not exactly 0 (Louizos et al., eq. 12); for straight-through, the sigmoid."""
    return logit.sigmoid() if gates == "straight-through" else (logit - BETA * math.log(-LOW / HIGH)).sigmoid()
