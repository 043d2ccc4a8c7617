"""Feature circuits: attribution to the latents of bases (SAE latents, neurons), with what a basis misses kept.

Marks et al. 2024, "Sparse feature circuits". At a hook point x = decode(f) + e, with latents f = encode(x) and an error
e. Every latent and every error is a node, and its score is the estimated effect of giving it its ablated value,

    score(f_i) = sum over positions of (f_i - f_i') * dm/df_i          score(e) = sum of (e - e') . dm/dx

at the clean run, or averaged over points between ablated and clean activation of that hook point (integrated
gradients). With a linear decoder the scores of a hook point add up to its attribution: what no latent explains is the
error's, and is never dropped.

Edges run between the best nodes: of the effect of v on the metric, the part that u passes on directly, not through
the other hook points that have a basis,  (u - u') * d/du [ v * dm/dv ]  with dm/dv held constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph import LOGITS, Circuit, Graph
from workbench import bases as named
from workbench import sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.passes import Edit
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis
from workbench.sites import Basis

PROMPTS_AT_ONCE = 16
ERROR = "error"


@dataclass(frozen=True)
class FeatureScores:
    """Scores of latents and errors, by hook point in order of computation.

    latents  for each hook point, one score per latent; errors: one score per hook point
    active   for each hook point, the share of clean positions at which a latent is not zero
    """

    hooks: tuple[str, ...]
    latents: tuple[Float[Tensor, " latent"], ...]
    errors: Float[Tensor, " hook"]
    active: tuple[Float[Tensor, " latent"], ...]
    definition: str
    unit: str
    headline: dict[str, Any] = field(default_factory=dict)

    def top(self, k: int) -> list[tuple[str, float]]:
        """The k nodes of largest absolute score, errors included: `blocks.3.hook_mlp_out/17`, `.../error`."""
        every = torch.cat([*self.latents, self.errors])
        names = [f"{hook}/{i}" for hook, row in zip(self.hooks, self.latents, strict=True) for i in range(len(row))]
        names += [f"{hook}/{ERROR}" for hook in self.hooks]
        best = every.abs().topk(min(k, len(every))).indices.tolist()
        return [(names[i], float(every[i])) for i in best]

    def summary(self) -> dict[str, Any]:
        explained = sum(float(row.abs().sum()) for row in self.latents)
        missed = float(self.errors.abs().sum())
        return {
            "top_features": [[name, round(score, 5)] for name, score in self.top(10)],
            "errors_share": round(missed / (missed + explained), 4) if missed + explained else 0.0,
            "unit": self.unit,
            "definition": self.definition,
            **self.headline,
        }


@analysis("feature-attribution", version=1, n=32)
def feature_attribution(
    model: LanguageModel, batch: Batch, store: ActivationStore, *, basis: str = "neurons", steps: int = 1
) -> FeatureScores:
    """Estimated effect of every latent of a basis, and of what the basis misses.

    basis  neurons, rotation:SEED, or one that a package adds (sae:FOLDER)
    steps  1: gradient of the clean run; more: averaged over points between corrupted and clean activation, per site
    """
    return attribute(model, batch, store, named.load(model, basis), steps=steps, name=basis)


@analysis("feature-circuit", version=1, n=16)
def feature_circuit(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    basis: str = "neurons",
    steps: int = 1,
    top: int = 40,
    edges: int = 100,
) -> Circuit:
    """The circuit of the best latents and errors of a basis, with the direct edges between them.

    basis  neurons, rotation:SEED, or one that a package adds (sae:FOLDER)
    steps  of the attribution to nodes; see feature-attribution
    top    how many latents and errors
    edges  how many edges, those of largest effect
    """
    found = named.load(model, basis)
    scored = attribute(model, batch, store, found, steps=steps, name=basis)
    return connect(model, batch, store, found, scored, top=top, edges=edges)


def attribute(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    bases: Mapping[str, Basis],
    *,
    steps: int = 1,
    name: str = "given bases",
) -> FeatureScores:
    """Score all latents of some bases by hook point.

    Raises UserError for steps < 1 or unknown hook points.
    """
    if steps < 1 or not bases:
        raise UserError(f"steps={steps} and {len(bases)} bases give nothing to score; both must be at least 1.")
    hooks = tuple(sorted(bases, key=sites.depth))
    latents = [torch.zeros(bases[hook].n_latents) for hook in hooks]
    active = [torch.zeros(bases[hook].n_latents) for hook in hooks]
    errors = torch.zeros(len(hooks))
    positions = 0
    parts = list(batch.parts(PROMPTS_AT_ONCE))
    for part, some in track(parts, "feature-attribution"):
        pairs = _pairs(model, store, some, hooks, bases)
        positions += len(part) * len(some.clean[0])
        slopes = {} if steps > 1 else _slopes(model, some, hooks)
        for i, hook in enumerate(hooks):
            pair = pairs[hook]
            grads = [slopes[hook]] if steps == 1 else _integrated(model, some, hook, bases[hook], pair, steps)
            for grad in grads:
                per_latent = _through(bases[hook], pair.clean, grad)
                latents[i] += ((pair.clean - pair.ablated) * per_latent).flatten(0, -2).sum(0).cpu() / len(grads)
                errors[i] += float(((pair.clean_error - pair.ablated_error) * grad).sum()) / len(grads)
            active[i] += (pair.clean != 0).flatten(0, -2).float().sum(0).cpu()
    n, unit = len(batch), batch.task.metric
    at = "gradient of the clean run" if steps == 1 else f"{steps} points between corrupted and clean activation"
    return FeatureScores(
        hooks,
        tuple(row / n for row in latents),
        errors / n,
        tuple(row / positions for row in active),
        f"estimated {unit}(clean) - {unit}(latent or error from the corrupted prompt), {at}, summed over positions, "
        f"mean over {n} prompts; basis {name}; positive: the latent helps",
        unit,
        {"prompts": n, "steps": steps, "basis": name},
    )


@dataclass(frozen=True)
class _Pair:
    clean: Tensor
    ablated: Tensor
    clean_error: Tensor
    ablated_error: Tensor


def _pairs(
    model: LanguageModel, store: ActivationStore, batch: Batch, hooks: Sequence[str], bases: Mapping[str, Basis]
) -> dict[str, _Pair]:
    out = {}
    sides = [store.get(model, list(side), list(hooks)) for side in (batch.clean, batch.corrupted)]
    for hook in hooks:
        x, y = (torch.stack(side[hook]).to(model.device, model.dtype) for side in sides)
        with torch.no_grad():
            f, g = bases[hook].encode(x), bases[hook].encode(y)
            out[hook] = _Pair(f, g, x - bases[hook].decode(f), y - bases[hook].decode(g))
    return out


def _slopes(model: LanguageModel, batch: Batch, hooks: Sequence[str]) -> dict[str, Tensor]:
    """dm/dx at every hook point, clean run."""
    out = model.run(torch.stack(batch.clean), capture=hooks, logits="last", grad=True)
    assert out.logits is not None
    grads = torch.autograd.grad(batch.score(out.logits[:, -1]).sum(), [out[hook] for hook in hooks])
    return dict(zip(hooks, grads, strict=True))


def _integrated(
    model: LanguageModel, batch: Batch, hook: str, basis: Basis, pair: _Pair, steps: int
) -> list[Float[Tensor, "batch pos width"]]:
    """dm/dx with this hook point alone between its ablated and its clean activation, at midpoints."""
    grads: list[Tensor] = []
    for k in range(steps):
        share = (k + 0.5) / steps
        with torch.no_grad():
            between = basis.decode(torch.lerp(pair.ablated, pair.clean, share))
            x = between + torch.lerp(pair.ablated_error, pair.clean_error, share)
        leaf = x.requires_grad_()
        edit: dict[str | sites.Site, Edit] = {hook: partial(_instead, leaf)}
        out = model.run(torch.stack(batch.clean), edit=edit, logits="last", grad=True).logits
        assert out is not None
        grads += torch.autograd.grad(batch.score(out[:, -1]).sum(), leaf)
    return grads


def _instead(leaf: Tensor, _: Tensor) -> Tensor:
    return leaf


def _through(basis: Basis, latents: Tensor, grad: Tensor) -> Tensor:
    """The gradient at the latents, from that at the activation."""
    leaf = latents.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(basis.decode(leaf), leaf, grad)
    return found


# ---- edges ----


def connect(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    bases: Mapping[str, Basis],
    scored: FeatureScores,
    *,
    top: int = 40,
    edges: int = 100,
) -> Circuit:
    """Direct edges between the best nodes, and from the best nodes to the logits."""
    chosen: dict[str, list[str]] = {}
    for name, _ in scored.top(top):
        hook, _, which = name.rpartition("/")
        chosen.setdefault(hook, []).append(which)
    order = sorted(chosen, key=sites.depth)
    names = [f"{hook}/{which}" for hook in order for which in chosen[hook]]
    weights = torch.zeros(len(names), len(names) + 1)  # [source, destination], logits last
    parts = list(batch.parts(PROMPTS_AT_ONCE))
    for _, some in track(parts, "feature-circuit"):
        weights += _direct(model, store, some, order, chosen, bases) / len(batch)
    layer = torch.tensor([order.index(name.rpartition("/")[0]) for name in names])
    pairs = [(s, d) for d in range(len(names) + 1) for s in range(len(names)) if d == len(names) or layer[s] < layer[d]]
    every = torch.tensor(pairs)
    values = weights[every[:, 0], every[:, 1]]
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[values.abs().topk(min(edges, len(values))).indices] = True
    return Circuit(
        Graph(tuple(names), (*names, LOGITS), every),
        kept,
        f"{edges} direct edges of largest effect between the {top} latents and errors of largest score; edge: what of "
        f"the destination's effect on {scored.unit} its source passes on, other hook points held; nodes by: "
        f"{scored.definition}",
        model=model.name,
        task=batch.task.name,
        method="feature-circuit",
        weights=values,
        headline=dict(scored.headline),
    )


def _direct(
    model: LanguageModel,
    store: ActivationStore,
    batch: Batch,
    order: Sequence[str],
    chosen: Mapping[str, Sequence[str]],
    bases: Mapping[str, Basis],
) -> Float[Tensor, "source destination"]:
    """Effects summed over prompts of one length. Every hook point is a leaf of its own, so that a gradient reaches only
    the nearest ones."""
    pairs = _pairs(model, store, batch, order, bases)
    slopes = _slopes(model, batch, order)
    arriving: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}

    def cut(hook: str, x: Tensor) -> Tensor:
        arriving[hook], leaves[hook] = x, x.detach().requires_grad_()
        return leaves[hook]

    out = model.run(
        torch.stack(batch.clean), edit={hook: partial(cut, hook) for hook in order}, logits="last", grad=True
    ).logits
    assert out is not None
    columns = []
    for at, hook in enumerate(order):
        latents = bases[hook].encode(arriving[hook])
        missed = arriving[hook] - bases[hook].decode(latents)
        slope = _through(bases[hook], pairs[hook].clean, slopes[hook])
        for which in chosen[hook]:
            value = (missed * slopes[hook]).sum() if which == ERROR else (latents * slope)[..., int(which)].sum()
            columns.append((value, order[:at]))
    columns.append((batch.score(out[:, -1]).sum(), order))
    weights = torch.zeros(len(columns) - 1, len(columns))
    for d, (value, before) in enumerate(columns):
        if not before:
            continue
        grads = torch.autograd.grad(value, [leaves[hook] for hook in before], retain_graph=True, allow_unused=True)
        row = 0
        for hook, grad in zip(before, grads, strict=True):
            if grad is not None:
                pair = pairs[hook]
                effect = (pair.clean - pair.ablated) * _through(bases[hook], pair.clean, grad)
                error = ((pair.clean_error - pair.ablated_error) * grad).sum()
                for i, which in enumerate(chosen[hook]):
                    weights[row + i, d] = float(error if which == ERROR else effect[..., int(which)].sum())
            row += len(chosen[hook])
    return weights
