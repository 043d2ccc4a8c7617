"""Exact activation patching of some nodes, each alone and all of them together.

    wb run patch-nodes --task ioi --nodes a7.h3,m4
    wb run patch-nodes --task ioi --basis neurons --nodes blocks.3.mlp.hook_post/17,blocks.3.mlp.hook_post/error

The model runs on one prompt, and the nodes get the values that they have on the other: of a head its `hook_z`, of an
MLP its `hook_mlp_out`, of a latent its value (what its basis decodes from the others stays, and so does what the basis
misses), of an error what the basis misses there. Values are those of the other run, and do not answer to the nodes
patched before them. All positions at once.

What nodes do together is not the sum of what they do alone: one may read another, one may stand in for another (Wang et
al. 2022, section 4). So both are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.evaluate import shares
from circuits.features import ERROR
from circuits.graph import nodes_of
from circuits.patching import PROMPTS_AT_ONCE
from workbench import bases as named
from workbench import sites
from workbench.activations import ActivationStore
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel, Resume
from workbench.passes import Edit
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis
from workbench.sites import Basis, Site

Direction = Literal["noise", "denoise"]
TOGETHER = "together"


@dataclass(frozen=True)
class PatchedNodes:
    """The metric per prompt, unpatched and patched.

    unpatched  on the prompt that the model reads; other: on the prompt that the nodes' values come from
    alone      with each node patched; together: with all of them
    """

    nodes: tuple[str, ...]
    direction: Direction
    unpatched: Float[Tensor, " batch"]
    other: Float[Tensor, " batch"]
    alone: Float[Tensor, "node batch"]
    together: Float[Tensor, " batch"]
    definition: str
    unit: str

    def share(self) -> tuple[Float[Tensor, " way"], Float[Tensor, " way"], Float[Tensor, " way"]]:
        """Of the way from the unpatched metric to the other one how much each node goes alone, and last all together: a
        ratio of means, with 95 % of a bootstrap over prompts."""
        moved = torch.cat([self.alone, self.together[None]]) - self.unpatched
        return shares(moved, self.other - self.unpatched)

    def summary(self) -> dict[str, Any]:
        names = [*self.nodes, TOGETHER]
        share, low, high = (x.tolist() for x in self.share())
        means = [float(x.mean()) for x in (*self.alone, self.together)]
        return {
            "direction": self.direction,
            f"{self.unit}_unpatched": round(float(self.unpatched.mean()), 4),
            f"{self.unit}_other": round(float(self.other.mean()), 4),
            f"{self.unit}_patched": {name: round(x, 4) for name, x in zip(names, means, strict=True)},
            "share": {name: round(x, 4) for name, x in zip(names, share, strict=True)},
            "share_95": {name: [round(a, 4), round(b, 4)] for name, a, b in zip(names, low, high, strict=True)},
            "definition": self.definition,
        }


@analysis("patch-nodes", n=32)
def patch_nodes(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    nodes: str = "a0.h0,m0",
    direction: Direction = "noise",
    basis: str = "",
) -> PatchedNodes:
    """Exact activation patching of some nodes, each alone and all of them together.

    nodes      separated by commas: heads and MLPs (a5.h1, m3), latents and errors (blocks.3.hook_mlp_out/17, .../error)
    direction  noise: clean run, nodes from the corrupted one; denoise: corrupted run, nodes from the clean one
    basis      of the latents: neurons, rotation:SEED, or one that a package adds (sae:FOLDER)
    """
    found = named.load(model, basis) if basis else {}
    names = read(nodes, model, found)
    ways = [[name] for name in names] + ([names] if len(names) > 1 else [])
    patched, ends = torch.empty(len(ways), len(batch)), torch.empty(2, len(batch))
    chunks = list(batch.parts(PROMPTS_AT_ONCE))
    with track(total=len(chunks) * len(ways), desc="patch-nodes") as bar:
        for chunk, some in chunks:
            pair = (some.clean, some.corrupted)
            both = _Pair(model, store, *(pair if direction == "noise" else pair[::-1]), found)
            ends[:, chunk] = torch.stack([some.score(logits) for logits in both.unpatched()])
            for i, way in enumerate(ways):
                patched[i, chunk] = some.score(both.patched(way))
                bar.update()
    if float((ends[1] - ends[0]).mean().abs()) < 1e-6 * max(float(ends.abs().mean()), 1e-6):
        raise UserError(
            f"{model.name} has {batch.task.metric} {float(ends[0].mean()):.3g} on clean and corrupted prompts: "
            "there is no difference that a node could carry."
        )
    read_in, from_other = ("clean", "corrupted") if direction == "noise" else ("corrupted", "clean")
    return PatchedNodes(
        tuple(names), direction, ends[0], ends[1], patched[: len(names)], patched[-1],
        f"{batch.task.metric} of the {read_in} run with nodes from the {from_other} prompt, all positions, over "
        f"{len(batch)} prompts; share: of the way from the {read_in} to the {from_other} metric, a ratio of means, "
        "95 % over prompts" + (f"; basis {basis}" if basis else ""),
        batch.task.metric,
    )  # fmt: skip


def read(text: str, model: LanguageModel, bases: Mapping[str, Basis]) -> list[str]:
    """Nodes from a text. Raises UserError for one that there is not, and where none is named."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError("no node is named; give some, such as a5.h1,m3.")
    known = nodes_of(model.config.n_layers, model.config.n_heads)
    for name in names:
        hook, slash, which = name.rpartition("/")
        if not slash:
            if name not in known:
                raise unknown("node of this model", name, known)
        elif hook not in bases:
            if not bases:
                raise UserError(f"{name} is a latent, and of no basis; give one, such as --basis neurons.")
            raise unknown("hook point of the basis", hook, bases)
        elif which != ERROR and not (which.isdecimal() and int(which) < bases[hook].n_latents):
            raise UserError(f"{name} is no latent of its basis; give 0 to {bases[hook].n_latents - 1}, or {ERROR}.")
    return names


def _site(name: str) -> tuple[str, int | str | None]:
    """Hook point of a node, and which head or latent of it; None: all of it."""
    hook, slash, which = name.rpartition("/")
    if slash:
        return hook, which if which == ERROR else int(which)
    layer, _, index = name[1:].partition(".h")
    if name.startswith("m"):
        return sites.block(int(layer), "hook_mlp_out"), None
    return sites.block(int(layer), "attn.hook_z"), int(index)


class _Pair:
    """Prompts of one length, run on one side with nodes from the other."""

    def __init__(
        self, model: LanguageModel, store: ActivationStore, base: Sequence[Tensor], other: Sequence[Tensor],
        bases: Mapping[str, Basis],
    ):  # fmt: skip
        self.model, self.store, self.bases = model, store, bases
        self.base, self.other = base, other

    def unpatched(self) -> tuple[Float[Tensor, "batch vocab"], Float[Tensor, "batch vocab"]]:
        """Logits at the last position, on either side."""
        last = self.model.hook_points[-1]
        sides = [(self._stored(side, last)[:, -1], torch.stack(list(side))[:, -1]) for side in (self.base, self.other)]
        one, two = (self.model.unembed(x, token.to(x.device)).cpu() for x, token in sides)
        return one, two

    def patched(self, names: Sequence[str]) -> Float[Tensor, "batch vocab"]:
        """Logits at the last position; the run starts at the first layer that is patched."""
        at: dict[str, list[int | str | None]] = {}
        for name in names:
            hook, which = _site(name)
            at.setdefault(hook, []).append(which)
        edit: dict[str | Site, Edit] = {hook: self._edit(hook, some) for hook, some in at.items()}
        first = min(layer for layer, _ in map(sites.split, at) if layer is not None)
        start = Resume(first, self._stored(self.base, sites.block(first, "hook_resid_pre")))
        logits = self.model.run(torch.stack(list(self.base)), edit=edit, logits="last", start=start).logits
        assert logits is not None
        return logits[:, -1].cpu()

    def _stored(self, side: Sequence[Tensor], hook: str) -> Float[Tensor, "batch pos *rest"]:
        found = torch.stack(self.store.get(self.model, list(side), [hook])[hook])
        return found.to(self.model.device, self.model.dtype)

    def _edit(self, hook: str, which: Sequence[int | str | None]) -> Edit:
        other = self._stored(self.other, hook)
        if None in which:  # with whatever else is patched there
            return lambda x: other
        if hook not in self.bases:
            heads = [one for one in which if isinstance(one, int)]

            def swap(x: Tensor) -> Tensor:
                x = x.clone()
                x[:, :, heads] = other[:, :, heads]
                return x

            return swap
        basis = self.bases[hook]
        values, latents = basis.encode(other), [one for one in which if isinstance(one, int)]
        missed = other - basis.decode(values)

        def instead(x: Tensor) -> Tensor:
            before = basis.encode(x)
            after, written = before.clone(), basis.decode(before)
            after[..., latents] = values[..., latents]
            out = x + basis.decode(after) - written
            return out + missed - (x - written) if ERROR in which else out

        return instead
