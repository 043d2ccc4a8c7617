"""One channel of a sparse model as an edit of a dense one: what the channel does in the one, does it do in the other?

A node is one channel of what attention or an MLP of the sparse model reads (`1.attn.act_in:17`), after the norm and
AbsTopK. On a pair of prompts it differs, at every token, by some amount. Bridges act before the norm: divided by the
norm's gain and multiplied by the root mean square of the sparse residual stream, the amount becomes one of the residual
stream, and the bridge's decoder has a direction of the dense residual stream for it. Their product, times a strength,
is added to the dense model's stream at the same boundary (Gao et al. 2025, section 2.3 and appendix A.4). At strength 1
the direction stands for exactly what the sublayer would read if the norm's scale stayed as it is.

A probability that rises with the strength proves little by itself: whatever is added to a model may raise it. The same
is therefore done with other channels of the same site, drawn from those that differ between the prompts at all; and
once more with what they add scaled to the size of what the channel adds, as most of them differ by less.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuits.sparse.bridges import Bridged, boundary_hook
from circuits.sparse.channels import SITES
from circuits.sparse.prune import Pairs
from workbench import sites
from workbench.errors import UserError
from workbench.interventions import Intervention, steer
from workbench.models import LanguageModel

READS = ("attn.act_in", "mlp.act_in")
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
_SITE = re.compile(r"(\d+)\.(attn|mlp)\.act_in")


# ---- where ----


@dataclass(frozen=True)
class Read:
    """What one sublayer reads: `1.attn.act_in`. Raises UserError for what is no such place of the model."""

    name: str
    model: LanguageModel

    def __post_init__(self) -> None:
        match, n = _SITE.fullmatch(self.name), self.model.config.n_layers
        if match is None or int(match[1]) >= n:
            raise UserError(
                f"{self.name!r} is nothing that a sublayer of {self.model.name} reads; there are "
                f"0.attn.act_in to {n - 1}.mlp.act_in."
            )

    @property
    def boundary(self) -> int:
        layer, part = self.name.split(".")[:2]
        return 2 * int(layer) + (part == "mlp")

    @property
    def hook(self) -> str:
        """The hook point of what is read."""
        layer, name = self.name.split(".", 1)
        return sites.block(int(layer), SITES[name])

    @property
    def stream(self) -> str:
        """The hook point of the residual stream there."""
        return boundary_hook(self.boundary, self.model.config.n_layers)

    @property
    def norm(self) -> nn.RMSNorm:
        layer = self.boundary // 2
        found = self.model.mlp_norm(layer) if self.boundary % 2 else self.model.attention_norm(layer)
        assert isinstance(found, nn.RMSNorm)
        return found

    def channel(self, index: int) -> str:
        return f"{self.name}:{index}"


def _node(name: str, model: LanguageModel) -> tuple[Read, int]:
    place, _, index = name.partition(":")
    read = Read(place, model)
    if not index.isdigit() or int(index) >= model.config.d_model:
        raise UserError(f"{name!r} is no channel; {place} has {place}:0 to {place}:{model.config.d_model - 1}.")
    return read, int(index)


# ---- the intervention ----


def shifts(
    sparse: LanguageModel, read: Read, tokens: Int[Tensor, "batch pos"], counterfactual: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_sparse"]:
    """By how much every channel of a site differs on other tokens, as an amount of the sparse residual stream.

    With the norm's scale as it is on `tokens`, a stream to which a channel's shift is added is read, in that channel,
    as on `counterfactual`.
    """
    here, there = (sparse.run(x, capture=[read.hook, read.stream], logits="none") for x in (tokens, counterfactual))
    difference = there[read.hook] - here[read.hook]
    norm = read.norm
    eps = torch.finfo(difference.dtype).eps if norm.eps is None else norm.eps
    size = (here[read.stream].square().mean(-1, keepdim=True) + eps).sqrt()
    gain = norm.weight.detach()
    return torch.where(gain == 0, 0, difference * size / torch.where(gain == 0, 1, gain))


def direction(bridged: Bridged, node: str, shift: Float[Tensor, "batch pos d_sparse"]) -> Tensor:
    """What the shift of one channel is in the dense residual stream: [batch, pos, d_dense]."""
    read, index = _node(node, bridged.sparse)
    decoder = bridged.bridges.decoders[read.boundary]
    assert isinstance(decoder, nn.Linear)
    row = decoder.weight[:, index].detach().to(bridged.dense.device, bridged.dense.dtype)
    return shift[..., index, None].to(row) * row


def edit(
    bridged: Bridged,
    node: str,
    tokens: Int[Tensor, "batch pos"],
    counterfactual: Int[Tensor, "batch pos"],
    strength: float = 1.0,
) -> dict[str | sites.Site, Intervention]:
    """The edit of the dense model on `tokens` after which a channel of the sparse model is as on `counterfactual`:
    `dense.run(tokens, edit=edit(...))`. Strength 0 changes nothing, bit for bit.

    Raises UserError for a node that is no channel that a sublayer reads.
    """
    read, _ = _node(node, bridged.sparse)
    shift = shifts(bridged.sparse, read, tokens, counterfactual)
    return {read.stream: steer(direction(bridged, node, shift), strength)}


# ---- which channel ----


@dataclass(frozen=True)
class ChannelEffects:
    """What each channel does in the sparse model itself.

    scores  mean over prompts of the rise of the counterfactual answer's log odds, in nats, when the channel alone is
            as on the other prompt of the pair, at every token
    """

    nodes: tuple[str, ...]
    scores: Float[Tensor, " node"]
    model: str
    task: str

    def top(self, k: int) -> list[tuple[str, float]]:
        """The k channels of largest effect towards the counterfactual answer."""
        order = self.scores.argsort(descending=True, stable=True)[:k].tolist()
        return [(self.nodes[i], float(self.scores[i])) for i in order]

    def summary(self) -> dict[str, Any]:
        return {
            "top_channels": [[name, round(score, 4)] for name, score in self.top(10)],
            "n_nodes": len(self.nodes),
            "definition": "rise of the counterfactual answer's log odds when this channel alone is exchanged",
        }


def channel_effects(sparse: LanguageModel, pairs: Pairs, places: Sequence[str] | None = None) -> ChannelEffects:
    """Every channel of some sites (all that sublayers read, if None), exchanged between the prompts of each pair.

    Exact: one pass for each channel that differs; the others do nothing.
    """
    if places is None:
        places = [f"{layer}.{read}" for layer in range(sparse.config.n_layers) for read in READS]
    plain = pairs.differences(_last(sparse, pairs))
    names, scores = [], []
    for read in (Read(place, sparse) for place in places):
        here = sparse.run(pairs.tokens, capture=[read.hook], logits="none")[read.hook]
        other = pairs.partner(here)
        differs = (here != other)[_asked(pairs)].any(0)
        for index in range(here.shape[-1]):
            effect = 0.0
            if differs[index]:
                swap = {read.hook: partial(_exchanged, index, other)}
                effect = float((plain - pairs.differences(_last(sparse, pairs, swap))).mean())
            names.append(read.channel(index))
            scores.append(effect)
    return ChannelEffects(tuple(names), torch.tensor(scores), sparse.name, pairs.task)


# ---- how much it takes ----


@dataclass(frozen=True)
class DoseResponse:
    """The dense model's probability of the counterfactual answer, by the strength of the edit.

    probability    [strength, prompt], both prompts of each pair; towards_one: whether class 1's answer is the
                   counterfactual one
    goal           the same on the counterfactual prompt itself, unedited
    controls       other channels of the site, drawn from those that differ; control: [channel, strength], their means;
                   matched: these with what is added scaled to the size of what the node adds
    strongest      of the node and the controls as they are, the one whose mean rises most, over all strengths
    sizes          of the node and the controls: norm of what is added at strength 1, over that of the stream
    sparse         the sparse model's mean probability of the counterfactual answer, before and after this channel alone
                   is exchanged in it
    """

    node: str
    task: str
    model: str
    strengths: tuple[float, ...]
    probability: Float[Tensor, "strength prompt"]
    towards_one: Bool[Tensor, " prompt"]
    goal: Float[Tensor, " prompt"]
    controls: tuple[str, ...]
    control: Float[Tensor, "channel strength"]
    matched: Float[Tensor, "channel strength"]
    strongest: str
    sizes: Float[Tensor, " node"]
    sparse: tuple[float, float]

    @property
    def mean(self) -> Float[Tensor, " strength"]:
        return self.probability.mean(1)

    def band(self, low: float = 0.05, high: float = 0.95, *, matched: bool = False) -> Float[Tensor, "bound strength"]:
        """Quantiles of the controls' means at each strength; NaN without controls."""
        if not self.controls:
            return torch.full((2, len(self.strengths)), torch.nan)
        return (self.matched if matched else self.control).quantile(torch.tensor([low, high]), dim=0)

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {"node": self.node, "strengths": list(self.strengths)}
        found["probability"] = _rounded(self.mean)
        for name, means in (("control", self.control), ("matched_control", self.matched)) if self.controls else ():
            low, high = self.band(matched=means is self.matched)
            found |= {f"{name}_mean": _rounded(means.mean(0))}
            found |= {f"{name}_5_percent": _rounded(low), f"{name}_95_percent": _rounded(high)}
        return found | {
            "on_the_counterfactual_prompt": round(float(self.goal.mean()), 4),
            "strongest": self.strongest,
            "n_controls": len(self.controls),
            "relative_size": _rounded(self.sizes)[0],
            "relative_size_of_controls": _rounded(self.sizes[1:].mean(0, keepdim=True))[0] if self.controls else None,
            "sparse_model": [round(x, 4) for x in self.sparse],
            "definition": "mean probability of the counterfactual answer when the channel's difference between the "
            "prompts, carried over by the bridge, is added at all tokens times the strength",
        }


def dose_response(
    bridged: Bridged,
    pairs: Pairs,
    node: str,
    *,
    strengths: Sequence[float] = STRENGTHS,
    controls: int = 20,
    seed: int = 0,
) -> DoseResponse:
    """How the dense model answers when a channel of the sparse one is moved towards the other prompt of each pair.

    pairs     on which the channel was not chosen
    controls  how many other channels of the site; fewer if fewer differ between the prompts

    Raises UserError for a node that is no channel that a sublayer reads.
    """
    read, index = _node(node, bridged.sparse)
    towards_one = ~pairs.is_one
    asked = _asked(pairs)[..., None].to(bridged.sparse.device)
    shift = shifts(bridged.sparse, read, pairs.tokens, pairs.partner(pairs.tokens)) * asked
    differs = shift.flatten(0, 1).any(0)
    differs[index] = False
    others = random.Random(f"controls/{seed}").sample(
        differs.nonzero()[:, 0].tolist(), min(controls, int(differs.sum()))
    )
    names = (node, *(read.channel(i) for i in sorted(others)))

    stream = bridged.dense.run(pairs.tokens, capture=[read.stream], logits="none")[read.stream]
    whole = (stream * asked.to(stream.device)).norm()
    sizes = torch.stack([direction(bridged, name, shift).norm() / whole for name in names]).cpu()

    def curve(name: str, scale: float = 1.0) -> Float[Tensor, "strength prompt"]:
        added = direction(bridged, name, shift) * scale
        edits = [{read.stream: steer(added, float(s))} for s in strengths]
        return torch.stack([_probability(pairs, _last(bridged.dense, pairs, edit), towards_one) for edit in edits])

    curves = torch.stack([curve(name) for name in names])
    scales = torch.where(sizes[1:] > 0, sizes[0] / sizes[1:], 0).tolist()  # what adds nothing cannot be scaled
    matched = [curve(name, scale).mean(1) for name, scale in zip(names[1:], scales, strict=True)]
    plain = _last(bridged.dense, pairs)
    rise = curves.mean(2).amax(1) - _probability(pairs, plain, towards_one).mean()
    goal = pairs.partner(_probability(pairs, plain, pairs.is_one))
    there = pairs.partner(bridged.sparse.run(pairs.tokens, capture=[read.hook], logits="none")[read.hook])
    swap = {read.hook: partial(_exchanged, index, there)}
    before = _probability(pairs, _last(bridged.sparse, pairs), towards_one).mean()
    after = _probability(pairs, _last(bridged.sparse, pairs, swap), towards_one).mean()
    means = curves[1:].mean(2)
    return DoseResponse(
        node, pairs.task, bridged.dense.name, tuple(map(float, strengths)), curves[0], towards_one, goal,
        names[1:], means, torch.stack(matched) if matched else means, names[int(rise.argmax())], sizes,
        (float(before), float(after)),
    )  # fmt: skip


def _probability(
    pairs: Pairs, logits: Float[Tensor, "prompt vocab"], one: Bool[Tensor, " prompt"]
) -> Float[Tensor, " prompt"]:
    """Of class 1's answer where `one`, of class 2's elsewhere, among all tokens."""
    found = []
    for p, first, second, is_first in zip(logits.softmax(-1), pairs.one, pairs.two, one.tolist(), strict=True):
        ids, others = (first, second) if is_first else (second, first)
        found.append(p[ids].sum() if len(ids) else 1 - p[others].sum())
    return torch.stack(found)


def _last(model: LanguageModel, pairs: Pairs, edit: Mapping[Any, Any] | None = None) -> Float[Tensor, "prompt vocab"]:
    """Logits where the answer is asked for."""
    logits = model.run(pairs.tokens, edit=edit).logits
    assert logits is not None
    return logits[torch.arange(len(logits)), pairs.last].float().cpu()


def _asked(pairs: Pairs) -> Bool[Tensor, "prompt pos"]:
    """Which positions are of a prompt, and not what fills it up."""
    return torch.arange(pairs.tokens.shape[1]) <= pairs.last[:, None]


def _exchanged(index: int, other: Tensor, x: Tensor) -> Tensor:
    return torch.where(torch.arange(x.shape[-1], device=x.device) == index, other, x)


def _rounded(values: Tensor) -> list[float]:
    return [round(x, 4) for x in values.tolist()]
