"""Massive activations: a few entries of the residual stream that are thousands of times larger than the others.

An activation of the residual stream after a block is massive if its magnitude is above 100 and "at least or around
1,000 times larger than the median magnitude of its hidden state", which is all positions and channels of one prompt
(section 2). They appear within one block, stay until the last ones, and stand in a few fixed channels of the first
token and of some delimiters. Their values hardly depend on the prompt: they serve as biases. So

    set to zero   destroys the model (section 3, table 3: LLaMA2-7B's perplexity on WikiText goes from 5.47 to infinity)
    set to mean   changes nothing (5.47 to 5.47): by channel, at the first position and at later ones apart

As a control, as many other channels are set to zero at the same positions. `papers.attention_sinks` does all this.

Sun, Chen, Kolter & Liu 2024, "Massive Activations in Large Language Models", arXiv 2402.17762.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError
from workbench.passes import Edit


class Entry(NamedTuple):
    """One activation of the residual stream."""

    prompt: int
    position: int
    channel: int
    value: float


@dataclass(frozen=True)
class Massive:
    """A channel of massive activations after the block where they first appear.

    first    at the first position, or else at later ones
    prompts  how many have it
    mean, std   of its values over prompts and positions
    """

    channel: int
    first: bool
    prompts: int
    mean: float
    std: float


def massive_at(resid: Float[Tensor, "pos d_model"], magnitude: float, ratio: float) -> list[tuple[int, int]]:
    """Positions and channels of massive activations (Sun et al. 2024, section 2)."""
    size = resid.abs()
    found = ((size > magnitude) & (size >= ratio * size.median())).nonzero()
    return [(position, channel) for position, channel in found.tolist()]


def with_means(entries: Sequence[Entry]) -> list[Entry]:
    """Each entry with the mean of those in its channel, at the first position and at later ones apart."""
    groups = _groups(entries)
    means = {key: sum(one.value for one in some) / len(some) for key, some in groups.items()}
    return [one._replace(value=means[one.channel, one.position == 0]) for one in entries]


def elsewhere(entries: Sequence[Entry], d_model: int, generator: torch.Generator) -> list[Entry]:
    """Zeros at the same positions in as many channels that hold no entry at all, one of them for each that does.

    Raises UserError if there are too few.
    """
    taken = sorted({one.channel for one in entries})
    free = [channel for channel in range(d_model) if channel not in taken]
    if len(free) < len(taken):
        raise UserError(
            f"{len(taken)} of {d_model} channels are massive by these thresholds, which leaves too few for a control; "
            "raise magnitude or ratio."
        )
    chosen = torch.randperm(len(free), generator=generator)[: len(taken)].tolist()
    instead = {channel: free[i] for channel, i in zip(taken, chosen, strict=True)}
    return [one._replace(channel=instead[one.channel], value=0.0) for one in entries]


def by_channel(entries: Sequence[Entry]) -> list[Massive]:
    """Channels with their values, those of most prompts first."""
    found = []
    for (channel, first), some in _groups(entries).items():
        values = torch.tensor([one.value for one in some], dtype=torch.float64)
        prompts = len({one.prompt for one in some})
        found.append(Massive(channel, first, prompts, float(values.mean()), float(values.std(correction=0))))
    return sorted(found, key=lambda one: (-one.prompts, -abs(one.mean)))


def _groups(entries: Sequence[Entry]) -> dict[tuple[int, bool], list[Entry]]:
    groups: dict[tuple[int, bool], list[Entry]] = defaultdict(list)
    for one in entries:
        groups[one.channel, one.position == 0].append(one)
    return groups


def placing(entries: Sequence[Entry], prompts: Sequence[int]) -> Edit:
    """What puts the entries of these prompts, the rows of a pass, in their places."""
    row = {prompt: i for i, prompt in enumerate(prompts)}
    here = [one for one in entries if one.prompt in row]
    at = [torch.tensor(x) for x in zip(*((row[e.prompt], e.position, e.channel) for e in here), strict=True)]
    values = torch.tensor([one.value for one in here])

    def place(x: Tensor) -> Tensor:
        return x.index_put([i.to(x.device) for i in at], values.to(x)) if here else x

    return place
