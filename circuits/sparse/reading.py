"""What the channels of a circuit do: how much each is needed, when it is active, and which tokens it speaks of.

A channel that reads the residual stream (`act_in`) reads what the embedding and earlier channels of the same number
wrote there; one that writes (`resid_delta`) adds to it, and in the end to the answers' logits. So the tokens of a
channel are those whose embedding has most in it, and its effect is the unembedding of one answer less the other's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.sparse.prune import Question

TOKENS = 4  # that are named for a channel


@dataclass(frozen=True)
class Node:
    """One channel.

    loss_without  how much the circuit's held-out loss grows when this channel is ablated too, in nats per prompt
    one, two      its activation on prompts of either class, the largest over positions by absolute value, mean over
                  prompts
    tokens        those whose embedding is largest in the channel it reads or writes, by absolute value, with the sign
    towards_one   unembedding of class 1's answer less class 2's in the channel it writes, mean over prompts; None for
                  channels that write none
    """

    name: str
    loss_without: float
    one: float
    two: float
    tokens: list[str]
    towards_one: float | None


@dataclass(frozen=True)
class Reading:
    """answers: class 1's and class 2's, of the first prompt."""

    nodes: list[Node]
    answers: list[str]

    def strongest(self, k: int) -> list[Node]:
        """The k nodes that the circuit can spare least."""
        return sorted(self.nodes, key=lambda node: -node.loss_without)[:k]

    def __getitem__(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)


def read(question: Question, kept: Bool[Tensor, " channel"], scale: tuple[float, float]) -> Reading:
    """What each channel of a circuit does on the pairs that judge it; one forward pass per channel.

    scale  and shift of the difference of the two answers' logits
    """
    judge, channels = question.judge, question.judge.channels
    model, pairs = channels.model, judge.pairs
    mask = kept.float()
    base = question.judge.loss(mask, scale)
    run = model.run(pairs.tokens, capture=channels.hooks, edit=channels.edits(mask, judge.fill), logits="none")
    inside = torch.arange(pairs.tokens.shape[1]) <= pairs.last[:, None]
    embedding, unembedding = (
        channels.module.transformer.wte.weight.detach().cpu(),
        model._module.lm_head.weight.detach(),
    )
    difference = _answers(unembedding.cpu(), pairs.one) - _answers(unembedding.cpu(), pairs.two)
    nodes = []
    for (_, site, span), hook in zip(channels.spans, channels.hooks, strict=True):
        values = run[hook].flatten(2) if run[hook].ndim == 4 else run[hook]
        for number in kept[span].nonzero()[:, 0].tolist():
            x = values[..., number].cpu().masked_fill(~inside, 0)
            largest = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
            at = span.start + number
            less = mask.clone()
            less[at] = 0
            stream = site.endswith(("act_in", "resid_delta"))
            nodes.append(
                Node(
                    channels.names[at],
                    question.judge.loss(less, scale) - base,
                    float(largest[pairs.is_one].mean()),
                    float(largest[~pairs.is_one].mean()),
                    _tokens(model, embedding[:, number]) if stream else [],
                    float(difference[number]) if site.endswith("resid_delta") else None,
                )
            )
    first = (pairs.one[0].tolist(), pairs.two[0].tolist())
    return Reading(nodes, ["".join(model.token_strings(ids)) or "anything else" for ids in first])


def _answers(unembedding: Float[Tensor, "vocab d_model"], ids: tuple[Tensor, ...]) -> Float[Tensor, " d_model"]:
    """Mean unembedding of the answers; where there are none, that of all tokens."""
    rows = [unembedding[one].mean(0) if len(one) else unembedding.mean(0) for one in ids]
    return torch.stack(rows).mean(0)


def _tokens(model: object, weights: Float[Tensor, " vocab"]) -> list[str]:
    best = weights.abs().topk(TOKENS).indices
    best = best[weights[best] != 0]
    words: list[str] = model.token_strings(best.tolist())  # type: ignore[attr-defined]
    return [f"{'+' if weights[i] > 0 else '-'}{word}" for i, word in zip(best.tolist(), words, strict=True)]
