"""Path patching: what one node tells another, apart from everything else it tells.

Activation patching of a node changes all that comes after it. Path patching asks about one step: of what a *sender*
writes, how much matters because the *receivers* read it? Two passes (Wang et al. 2022, section 3.1; Goldowsky-Dill et
al. 2023):

1. The clean prompt, with the sender's output from the corrupted prompt and every other head's frozen at its clean
   value. MLPs are recomputed, so that a path may run through them, or frozen as well. What the receivers read is noted.
2. The clean prompt, in which the receivers alone read what was noted; all that follows is computed as usual.

Receivers are named as destinations of the graph: `logits`, `a5.h1<q>`, `m3`. With frozen heads nothing moves from one
position to another, so the first pass covers the positions that are patched and no others: the last one alone, if the
receiver is the logits. Both passes start at the first block that can differ, from stored activations, and many senders
share one batch. The result is that of two full passes per sender, up to float rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph import INPUT, LOGITS, PORTS
from circuits.writes import copies, stored_past
from workbench import scores, sites
from workbench.activations import ActivationStore
from workbench.backend import ModelConfig
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel, Resume
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis
from workbench.scores import NodeScores
from workbench.sites import Site

Position = Literal["all", "last"]
PROMPTS_AT_ONCE = 64  # bounds memory: the activations of this many prompts are held at a time
TOKENS_PER_PASS = 2048  # of those computed
CONTEXT_PER_PASS = 8192  # of those whose keys and values are looked at: they are copied for every sender
LOGITS_PER_PASS = 2**26
_NAME = re.compile(r"(?:a(\d+)\.h(\d+)(?:<([qkv])>)?|m(\d+))")


class Metrics(NamedTuple):
    """The task's metric per prompt: on both prompts as they are, and on the clean one with each group patched."""

    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]
    patched: Float[Tensor, "group batch"]


@analysis("path-patching", version=1, n=32)
def path_patching(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    receiver: str = LOGITS,
    position: Position = "all",
    mlps: bool = True,
    freeze_mlps: bool = False,
) -> NodeScores:
    """Effect of every head and MLP on the metric through what the receivers read of it, by exact path patching.

    receiver     logits, or destinations separated by commas, such as a5.h1<q>,a6.h0<q>
    position     where the sender is patched: all positions, or the last alone
    mlps         score the MLPs as senders too
    freeze_mlps  freeze the MLPs between sender and receivers, so that direct paths alone remain
    """
    receivers = read_receivers(receiver, model.config)
    names = [name for name in nodes(model.config, mlps) if any(precedes(name, to, model.config) for to in receivers)]
    if not names:
        raise UserError(f"no head or MLP comes before {receiver}: there is no path to patch. Name a later receiver.")
    groups = [(name,) for name in names]
    found = path_metrics(model, batch, store, groups, receivers, position=position, freeze_mlps=freeze_mlps)
    effect = found.clean - found.patched
    unit = batch.task.metric
    where = {"all": "at all positions", "last": "at the last position"}[position]
    kept = "MLPs frozen at their clean output too" if freeze_mlps else "MLPs recomputed"
    definition = (
        f"{unit}(clean) - {unit}(clean run in which {receiver} reads what it would if the node's output {where} were "
        f"the corrupted prompt's, all other heads frozen at their clean output, {kept}), mean over prompts; positive: "
        "the path helps"
    )
    return NodeScores(
        nodes=tuple(names),
        scores=effect.mean(1),
        definition=definition,
        unit=unit,
        per_prompt=effect,
        headline={
            "receiver": receiver,
            f"{unit}_clean": float(found.clean.mean()),
            f"{unit}_corrupted": float(found.corrupted.mean()),
            "prompts": len(batch),
        },
    )


def path_metrics(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    groups: Sequence[Collection[str]],
    receivers: Sequence[str],
    *,
    position: Position = "all",
    freeze_mlps: bool = False,
) -> Metrics:
    """The metric when the paths from a group of senders to the receivers carry what they do on the corrupted prompt,
    for each group. Senders are heads, MLPs and `input`; those of one group are patched together."""
    known = {INPUT, *nodes(model.config)}
    for name in {name for group in groups for name in group} - known:
        raise unknown(f"node of {model.name}", name, known)
    out = Metrics(torch.empty(len(batch)), torch.empty(len(batch)), torch.empty(len(groups), len(batch)))
    chunks = list(batch.parts(PROMPTS_AT_ONCE))
    with track(total=len(chunks) * len(groups), desc="path patching") as bar:
        for chunk, some in chunks:
            paths = _Paths(model, store, some, receivers, position, freeze_mlps)
            out.clean[chunk], out.corrupted[chunk] = (some.score(logits) for logits in paths.unpatched())
            for together in paths.passes(groups):
                logits = paths.logits([groups[i] for i in together])
                out.patched[torch.tensor(together)[:, None], chunk] = torch.stack([some.score(rows) for rows in logits])
                bar.update(len(together))
    return out


# ---- names ----


def nodes(config: ModelConfig, mlps: bool = True) -> list[str]:
    """Every head, then every MLP."""
    return [*scores.every_head(config.n_layers, config.n_heads)] + (
        [scores.mlp(layer) for layer in range(config.n_layers)] if mlps else []
    )


def layer_of(name: str) -> int:
    """The block of a node or destination; `input` stands before block 0, `logits` after all."""
    match = _NAME.fullmatch(name)
    return int(match[1] or match[4]) if match else {INPUT: 0, LOGITS: 10**9}[name]


def head_of(name: str) -> int:
    """Which head of its layer: 1 for `a5.h1` and `a5.h1<q>`."""
    match = _NAME.fullmatch(name)
    assert match and match[2]
    return int(match[2])


def precedes(sender: str, receiver: str, config: ModelConfig) -> bool:
    """Whether there is an edge from the sender to the receiver."""
    beside = sender.startswith("a") and receiver.startswith("m") and not config.parallel_attn_mlp
    return layer_of(sender) < layer_of(receiver) + beside


def read_heads(text: str, config: ModelConfig) -> tuple[str, ...]:
    """Heads from a text such as `a5.h1, a6.h0`. Raises UserError for one that the model has not."""
    return _read(text, nodes(config, mlps=False), "head of this model")


def read_receivers(text: str, config: ModelConfig) -> tuple[str, ...]:
    """Destinations from a text such as `a5.h1<q>, m6`. Raises UserError for one that the model has not."""
    heads = [f"{name}<{port}>" for name in nodes(config, mlps=False) for port in PORTS]
    found = _read(text, [LOGITS, *heads, *(scores.mlp(layer) for layer in range(config.n_layers))], "receiver")
    if LOGITS in found and len(found) > 1:
        raise UserError(f"receiver={text!r}: paths to logits include all others; name logits or the others.")
    return found


def _read(text: str, options: Sequence[str], kind: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"no {kind} is named in {text!r}; name some as in {options[-1]}, separated by commas.")
    for name in names:
        if name not in set(options):
            raise unknown(kind, name, options)
    return names


# ---- runs ----


class _Paths:
    """Every patched run of some prompts of one length, from stored activations."""

    def __init__(
        self,
        model: LanguageModel,
        store: ActivationStore,
        batch: Batch,
        receivers: Sequence[str],
        position: Position,
        freeze_mlps: bool,
    ):
        self.model, self.receivers, self.freeze_mlps = model, tuple(receivers), freeze_mlps
        self.tokens = torch.stack(batch.clean)
        self.to_logits = self.receivers == (LOGITS,)
        corrupted = torch.stack(batch.corrupted)
        self.ends = self.tokens[:, -1], corrupted[:, -1]
        differs = (self.tokens != corrupted).any(0).nonzero()
        at_end = position == "last" or self.to_logits  # without attention nothing else reaches the last position
        # Positions before this one are the same in all runs.
        self.begin = self.tokens.shape[1] - 1 if at_end else int(differs[0])
        n_layers = model.config.n_layers
        self.first = n_layers if self.to_logits else min(map(layer_of, self.receivers))
        self.end = n_layers if self.to_logits else max(map(layer_of, self.receivers)) + 1
        looks_back = self.begin > 0 and not self.to_logits
        hooks = [sites.block(at, name) for name in ("hook_resid_pre", "attn.hook_z") for at in range(self.end)]
        mlps = [sites.block(at, "hook_mlp_out") for at in range(self.end)]
        last = model.hook_points[-1]
        self.clean = self._fetch(store, batch.clean, [*hooks, *(mlps if freeze_mlps else ()), last])
        first = sites.block(0, "hook_resid_pre")
        taken = [hook for hook in hooks if hook.endswith("hook_z")]
        self.corrupted = self._fetch(store, batch.corrupted, [first, *taken, *mlps, last])
        self.past = stored_past(model, store, batch.clean, self.begin if looks_back else 0, self.first)

    def _fetch(self, store: ActivationStore, sequences: Sequence[Tensor], hooks: Sequence[str]) -> dict[str, Tensor]:
        found = store.get(self.model, sequences, hooks)
        return {hook: torch.stack(found[hook]) for hook in found}

    def unpatched(self) -> list[Float[Tensor, "batch vocab"]]:
        """Logits at the last position on the clean and on the corrupted prompts."""
        last = self.model.hook_points[-1]
        runs = zip((self.clean, self.corrupted), self.ends, strict=True)
        return [self.model.unembed(run[last][:, -1], tokens).cpu() for run, tokens in runs]

    def passes(self, groups: Sequence[Collection[str]]) -> list[list[int]]:
        """Which groups share a pass: those that start at one block, as many as fit."""
        n_prompts, length = self.tokens.shape
        each = [TOKENS_PER_PASS // (n_prompts * (length - self.begin))]
        each.append(LOGITS_PER_PASS // (n_prompts * self.model.config.d_vocab))
        if self.past:
            each.append(CONTEXT_PER_PASS // (n_prompts * length))
        at_once = max(1, min(each))
        starts: dict[int, list[int]] = {}
        for i, group in enumerate(groups):
            starts.setdefault(self._start(group), []).append(i)
        return [some[k : k + at_once] for some in starts.values() for k in range(0, len(some), at_once)]

    def _start(self, group: Collection[str]) -> int:
        return min([self.end - 1, *map(layer_of, group)])

    def logits(self, groups: Sequence[Collection[str]]) -> list[Float[Tensor, "batch vocab"]]:
        """Logits at the last position with each of these groups patched; all of them start at one block."""
        k, start = len(groups), self._start(groups[0])
        reading = [self._site(to) for to in self.receivers if to != LOGITS and layer_of(to) >= start]
        resid = self._resid(start, k)
        for copy, group in enumerate(groups):
            if INPUT in group:
                resid[copy] = self.corrupted[sites.block(0, "hook_resid_pre")][:, self.begin :]
        tokens = self.tokens.repeat(k, 1)
        first = self.model.run(
            tokens,
            capture=reading,
            edit=self._frozen(groups, start),
            logits="last" if self.to_logits else "none",
            start=Resume(start, resid.flatten(0, 1)),
            ungroup=True,
        )
        logits = first.logits
        if not self.to_logits:
            start = max(start, self.first)
            logits = self.model.run(
                tokens,
                edit={site: _replace(first[site]) for site in reading},
                logits="last",
                start=Resume(
                    start,
                    self._resid(start, k).flatten(0, 1),
                    copies(self.past, k, start),
                ),
                ungroup=True,
            ).logits
        assert logits is not None
        return list(logits[:, -1].cpu().unflatten(0, (k, -1)))

    def _resid(self, layer: int, k: int) -> Float[Tensor, "copy batch pos d_model"]:
        """The clean residual stream entering a block, k times."""
        return self.clean[sites.block(layer, "hook_resid_pre")][:, self.begin :].repeat(k, 1, 1, 1)

    def _site(self, receiver: str) -> Site:
        """Where what a receiver reads is noted and put back; of a head that is its query, key or value."""
        match = _NAME.fullmatch(receiver)
        assert match
        if match[4]:
            return Site(sites.block(int(match[4]), "hook_mlp_in"))
        return Site(sites.block(int(match[1]), f"attn.hook_{match[3]}"), head=int(match[2]))

    def _frozen(self, groups: Sequence[Collection[str]], start: int) -> dict[str | Site, Callable[[Tensor], Tensor]]:
        """Edits of the first pass: heads (and MLPs) at their clean values, but senders at their corrupted ones."""
        edit: dict[str | Site, Callable[[Tensor], Tensor]] = {}
        for layer in range(start, self.end):
            hook = sites.block(layer, "attn.hook_z")
            edit[hook] = self._mix(
                hook,
                {
                    copy: [head_of(name) for name in group if name[0] == "a" and layer_of(name) == layer]
                    for copy, group in enumerate(groups)
                },
            )
            senders = [copy for copy, group in enumerate(groups) if scores.mlp(layer) in group]
            hook = sites.block(layer, "hook_mlp_out")
            if self.freeze_mlps or senders:
                edit[hook] = self._mix(hook, dict.fromkeys(senders), recompute=not self.freeze_mlps)
        return edit

    def _mix(
        self, hook: str, taken: Mapping[int, Sequence[int] | None], recompute: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """Clean values (or what is computed), but these heads of these copies (None: everything) corrupted."""

        def fn(x: Tensor) -> Tensor:
            copies: Tensor = x.unflatten(0, (-1, len(self.tokens))).clone()
            if not recompute:
                copies[:] = self.clean[hook][:, self.begin :].to(x)
            source = self.corrupted[hook][:, self.begin :].to(x)
            for copy, some in taken.items():
                if some is None:
                    copies[copy] = source
                else:
                    copies[copy][:, :, some] = source[:, :, some]
            return copies.flatten(0, 1)

        return fn


def _replace(value: Tensor) -> Callable[[Tensor], Tensor]:
    def fn(_: Tensor) -> Tensor:
        return value

    return fn
