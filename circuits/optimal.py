"""Optimal ablation: what is cut carries the constants that hurt the circuit least.

Li & Janson 2024 (arXiv:2409.09951, section 2): any fixed replacement may send the rest of the model somewhere it has
never been, so that part of what an ablation destroys is not information but spoofing. Replaced by the constants that
minimise the loss, a cut edge takes away what its source knows of the prompt, and nothing else. Here each source has one
constant for all prompts and positions, and minimised is KL(model || circuit) at the last position.

The constants belong to a circuit, and are fitted on prompts other than those that judge it. They start from the mean of
what a source writes; the best step is kept, so they never do worse than that mean on the prompts they were fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.wiring import PROMPTS_AT_ONCE, Keep, Wiring
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.metrics import kl
from workbench.models import LanguageModel
from workbench.progress import track
from workbench.prompts import Batch

STEPS, LR = 100, 0.05
ENOUGH = 1e-6  # nats of KL at which nothing is left to gain

Constants = Float[Tensor, "source d_model"]


def metric(
    model: LanguageModel, batch: Batch, fit: Batch, store: ActivationStore, keep: Keep, *, steps: int = STEPS
) -> Float[Tensor, "copy batch"]:
    """The task's metric per prompt when only some edges are kept and the others carry constants fitted on `fit`.

    Raises UserError if the two batches share a prompt.
    """
    shared = set(fit.prompts) & set(batch.prompts)
    if shared:
        raise UserError(
            f"optimal ablation is fitted on prompts that then judge it ({len(shared)} of them, such as "
            f"{next(iter(shared)).clean!r}); give it others."
        )
    learn = [Wiring(model, store, some, "mean", whole=fit) for _, some in fit.parts(PROMPTS_AT_ONCE)]
    judge = [(part, some, Wiring(model, store, some, "mean", whole=batch)) for part, some in
             batch.parts(PROMPTS_AT_ONCE)]  # fmt: skip
    out = torch.empty(len(keep), len(batch))
    for i, one in enumerate(track(keep, "optimal ablation")):
        constants, _ = fitted(learn, one, steps=steps)
        for part, some, run in judge:
            out[i, part] = some.score(run.replaced(constants).run(one[None])[0].cpu())
    return out


def fitted(
    runs: Sequence[Wiring], keep: Float[Tensor, "source destination"], *, steps: int = STEPS, lr: float = LR
) -> tuple[Constants, list[float]]:
    """Constants of one circuit, and the loss in nats at every step; the first is that of the mean.

    A constant moves in units of the RMS of what its source writes, by Adam.
    """
    total = sum(run.clean.sum((1, 2)) for run in runs)
    count = sum(run.clean[0, ..., 0].numel() for run in runs)
    square = sum(run.clean.square().sum((1, 2, 3)) for run in runs)
    assert isinstance(total, Tensor) and isinstance(square, Tensor)
    mean, unit = total / count, (square / (count * total.shape[1])).sqrt()[:, None]
    with torch.no_grad():
        whole = [run.run(torch.ones_like(keep)[None])[0].float() for run in runs]
    moved = torch.zeros_like(mean, requires_grad=True)
    adam = torch.optim.Adam([moved], lr=lr)
    best, lowest, losses = mean, float("inf"), []
    prompts = sum(len(run.tokens) for run in runs)
    for _ in range(steps):
        adam.zero_grad()
        loss = 0.0
        for run, target in zip(runs, whole, strict=True):
            logits = run.replaced(mean + unit * moved).run(keep[None], grad=True)[0].float()
            part = kl(logits, target).sum() / prompts
            if part.requires_grad:  # not where nothing is cut
                part.backward()
            loss += float(part.detach())
        losses.append(loss)
        if loss < lowest:
            best, lowest = (mean + unit * moved).detach(), loss
        if loss < ENOUGH:
            break
        adam.step()
    return best, losses
