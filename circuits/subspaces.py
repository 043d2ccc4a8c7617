"""What a head looks at, how it acts, and in how few directions it does so: the tools of the Chinchilla study.

Lieberum et al. 2023, "Does Circuit Analysis Interpretability Scale?", asked how a large model picks the letter of a
multiple-choice answer. Three of its tools, for any task whose candidate answers stand in the prompt:

attention-classes  where a head looks from the last position, each key weighted by the size of what is moved from there
direct-total       the effect of a head on the metric by itself, and through all that reads it
qk-subspace        how few directions of its queries and keys a head needs; and whether these are about the candidates'
                   places or about the words: they are found on some prompts and tried on others, with other words

Candidates are the tokens that may be a right or a wrong answer in the task: every name in IOI, every colour in Colored
Objects. Where a prompt works an example first (`Q: ... A: ...`), those of its last question count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.mutations import MUTATIONS, mutated, vocabulary
from circuits.patching import patching
from circuits.path_patching import head_of, layer_of, path_patching, read_heads
from workbench import scores, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError, unknown
from workbench.lenses import key_classes
from workbench.models import LanguageModel, Resume
from workbench.prompts import Batch, Prompt, sample
from workbench.registry import analysis
from workbench.scores import NodeScores
from workbench.sites import Site

CLASSES = ("answer", "candidate", "first", "previous", "duplicate", "itself", "rest")

# ---- where a head looks ----


@dataclass(frozen=True)
class AttentionClasses:
    """Attention from the last position by class of key, every key in the first class that fits; they sum to 1.

    weighted   [layer, head] shares of |attention| x |what the value writes|, mean over prompts
    plain      shares of the attention itself; what a sink draws is missing
    written    the sum that the shares are of: the length of what is written if nothing cancels, mean over prompts
    """

    weighted: dict[str, Float[Tensor, "layer head"]]
    plain: dict[str, Float[Tensor, "layer head"]]
    written: Float[Tensor, "layer head"]

    def summary(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, grid in self.weighted.items():
            layer, h = divmod(int(grid.argmax()), grid.shape[1])
            share, plain = float(grid[layer, h]), float(self.plain[name][layer, h])
            head = scores.head(layer, h)
            out[name] = {"head": head, "weighted_attention": round(share, 4), "attention": round(plain, 4)}
        return out


@analysis("attention-classes", version=1, n=32)
def attention_classes(model: LanguageModel, batch: Batch, store: ActivationStore) -> AttentionClasses:
    """Where each head looks from the last position: the answer, other candidates, first, previous, duplicates.

    Lieberum et al. 2023, section 4. The value is taken through W_O, before a norm after attention where there is one.
    """
    c = model.config
    layers = range(c.n_layers)
    names = ("attn.hook_pattern", "attn.hook_v")
    classes = keys_by_class(model, batch)
    weighted, plain = (torch.zeros(len(CLASSES), c.n_layers, c.n_heads) for _ in range(2))
    written = torch.zeros(c.n_layers, c.n_heads)
    for start in range(0, len(batch), 16):
        some = batch.clean[start : start + 16]
        found = store.get(model, some, [sites.block(layer, name) for name in names for layer in layers])
        for i in range(len(some)):
            masks = torch.stack([classes[start + i][name] for name in CLASSES]).float()
            for layer in layers:
                pattern, value = (found[sites.block(layer, name)][i] for name in names)
                value = value.repeat_interleave(c.n_heads // c.n_kv_heads, 1).to(model.device, model.dtype)
                size = model.head_results(layer, value).float().norm(dim=-1).T.cpu()  # [head, key]
                attention = pattern[:, -1].float()
                moved = attention * size
                written[layer] += moved.sum(-1)
                plain[:, layer] += masks @ attention.T
                weighted[:, layer] += masks @ (moved / moved.sum(-1, keepdim=True).clamp_min(1e-30)).T
    mean = {name: i for i, name in enumerate(CLASSES)}
    return AttentionClasses(
        weighted={name: weighted[i] / len(batch) for name, i in mean.items()},
        plain={name: plain[i] / len(batch) for name, i in mean.items()},
        written=written / len(batch),
    )


def keys_by_class(model: LanguageModel, batch: Batch) -> list[dict[str, Bool[Tensor, "_"]]]:
    """For each prompt, which positions are of which class as seen from the last; each is of exactly one."""
    tokens_of = [model.token_ids(answer) for answer in vocabulary(batch.task)]
    single = torch.tensor([ids[0] for ids in tokens_of if len(ids) == 1], dtype=torch.long)
    candidates = torch.cat([single, *batch.answers, *batch.wrong]).unique()
    out = []
    for prompt, tokens, answers in zip(batch.prompts, batch.clean, batch.answers, strict=True):
        asked = torch.arange(len(tokens)) >= _question(model, prompt, tokens)
        last = {name: mask[-1] for name, mask in key_classes(tokens).items()}
        itself = torch.arange(len(tokens)) == len(tokens) - 1
        fits = {
            "answer": torch.isin(tokens, answers) & asked,
            "candidate": torch.isin(tokens, candidates) & asked,
            **{name: last[name] for name in ("first", "previous", "duplicate")},
            "itself": itself,
            "rest": torch.ones_like(itself),
        }
        free = torch.ones_like(itself)
        masks = {}
        for name in CLASSES:
            masks[name] = fits[name] & free
            free = free & ~fits[name]
        out.append(masks)
    return out


def _question(model: LanguageModel, prompt: Prompt, tokens: Tensor) -> int:
    """The position at which the last question begins; 0 in a prompt that works no example."""
    cut = prompt.clean.rfind("\nQ:")
    before = model.tokenize(prompt.clean[:cut]) if cut > 0 else tokens[:0]
    return len(before)


# ---- how it acts ----


@dataclass(frozen=True)
class DirectTotal:
    """Total and direct effect of every node, and what lies between: the effect through nodes that read it."""

    total: NodeScores
    direct: NodeScores
    indirect: NodeScores

    def summary(self) -> dict[str, Any]:
        parts = (self.total.scores, self.direct.scores, self.indirect.scores)
        rows = dict(zip(self.total.nodes, zip(*(part.tolist() for part in parts), strict=True), strict=True))
        largest = [name for name, _ in self.total.top(10)]
        total, direct = self.total.scores.abs().sum(), self.direct.scores.abs().sum()
        return {
            "total_direct_indirect": {name: [round(x, 5) for x in rows[name]] for name in largest},
            "most_indirect": [[name, round(score, 5)] for name, score in self.indirect.top(5)],
            "direct_share_of_all": round(float(direct / total), 4) if total else 0.0,
            "unit": self.total.unit,
            "definition": self.indirect.definition,
        }


@analysis("direct-total", version=1, n=32)
def direct_total(model: LanguageModel, batch: Batch, store: ActivationStore) -> DirectTotal:
    """Total effect of each head and MLP by activation patching, beside its direct effect on the logits.

    Lieberum et al. 2023, section 3; McGrath et al. 2023. Direct: heads and MLPs after it frozen at their clean output,
    so only its write at the last position counts. Total: all positions. What differs went through others.
    """
    total = patching(model, batch, store)
    direct = path_patching(model, batch, store, freeze_mlps=True)
    assert total.nodes == direct.nodes and total.per_prompt is not None and direct.per_prompt is not None
    between = total.per_prompt - direct.per_prompt
    definition = (
        f"total - direct effect on {total.unit}; total: the node's output from the corrupted prompt at all positions "
        "of the clean run; direct: the same with all other heads and MLPs frozen at their clean output; mean over "
        "prompts; positive: what others make of the node helps"
    )
    return DirectTotal(
        total, direct, NodeScores(total.nodes, between.mean(1), definition, total.unit, per_prompt=between)
    )


# ---- in how few directions ----


@dataclass(frozen=True)
class Subspace:
    """Directions of one head, found on one half of the prompts.

    centres     mean query, key and value (`q`, `k`, `v`): of the queries at the last position, of the others at the
                chosen keys
    bases       [direction, d_head] for each, by falling singular value; queries and keys share theirs
    explained   share of the centred queries' and keys' (or values') sum of squares in the first r + 1 directions
    """

    head: str
    centres: dict[str, Float[Tensor, " d_head"]]
    bases: dict[str, Float[Tensor, "direction d_head"]]
    explained: Float[Tensor, " direction"]

    def project(self, x: Float[Tensor, "*any d_head"], port: str, rank: int) -> Float[Tensor, "*any d_head"]:
        """x moved onto the first directions through the centre: at rank 0 the centre, at full rank x."""
        centre, basis = self.centres[port].to(x), self.bases[port][:rank].to(x)
        return centre + (x - centre) @ basis.T @ basis


@dataclass(frozen=True)
class SubspaceResult:
    """The metric with queries and keys of some heads confined to few directions.

    batches     "task" and each mutation of it
    metric      [batch, rank] mean over the prompts that were held out
    error       its standard error
    full        [batch] the metric with nothing changed
    points      queries and keys of the first head in its first three directions; `labels` says what each is
    skipped     mutations that do not work here, and why
    """

    subspaces: list[Subspace]
    ranks: list[int]
    batches: list[str]
    metric: Float[Tensor, "batch rank"]
    error: Float[Tensor, "batch rank"]
    full: Float[Tensor, " batch"]
    points: Float[Tensor, "point 3"]
    labels: list[str]
    skipped: dict[str, str]
    unit: str
    definition: str

    def summary(self) -> dict[str, Any]:
        names = [space.head for space in self.subspaces]
        rows = zip(self.batches, self.metric.tolist(), self.full.tolist(), strict=True)
        return {
            "heads": names,
            "metric_by_rank": {
                batch: dict(zip(map(str, self.ranks), (round(x, 4) for x in row), strict=True))
                | {"full": round(full, 4)}
                for batch, row, full in rows
            },
            "explained_by_3": {s.head: round(float(s.explained[:3][-1]), 4) for s in self.subspaces},
            "skipped": self.skipped,
            "unit": self.unit,
            "definition": self.definition,
        }


@analysis("qk-subspace", version=1, n=32)
def qk_subspace(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    heads: str = "",
    parts: Literal["qk", "v", "qkv"] = "qk",
    keys: Literal["candidates", "all"] = "candidates",
    rotated: bool = True,
    ranks: str = "0,1,2,3,4,6,8,12,16,24,32,48,64,96,128",
    mutations: str = "others,words,letters,numbers",
) -> SubspaceResult:
    """The metric when heads keep a few directions of their queries and keys, on the task and on mutations of it.

    Lieberum et al. 2023, section 5: queries at the last position and keys at the candidates, centred, SVD of both
    stacked, both projected before the softmax. Found on every second prompt, tried on the others.

    heads      separated by commas; empty: the one with the largest direct effect on the logits
    parts      what is confined: queries and keys, values, or all of these
    keys       which positions' keys and values: the candidate answers', or all
    rotated    queries and keys as they are multiplied, after any norm and rotation; otherwise as they are projected
    ranks      how many directions to keep, separated by commas
    mutations  others, words, letters, numbers: what the candidates are replaced by; none to leave out
    """
    if len(batch) < 2:
        raise UserError("n=1: subspaces are found on one half of the prompts and tried on the other; take n >= 2.")
    if heads:
        chosen = read_heads(heads, model.config)
    else:
        direct = path_patching(model, batch, store, mlps=False, freeze_mlps=True)
        chosen = (direct.nodes[int(direct.scores.argmax())],)
    wanted = _read_ranks(ranks, model.config.d_head)
    fitted, held_out = batch.select(range(1, len(batch), 2)), batch.select(range(0, len(batch), 2))
    spaces, points, labels = zip(*(_fit(model, fitted, store, h, parts, keys, rotated) for h in chosen), strict=True)
    tried, skipped = _mutations(model, held_out, mutations)
    metric = torch.empty(len(tried), len(wanted), len(held_out))
    full = []
    for i, some in enumerate(tried.values()):
        masks = _masks(model, some, keys)
        run = partial(_confined, model, some, store, masks, spaces, rotated)
        full.append(run(None))
        for j, rank in enumerate(wanted):
            metric[i, j] = run(rank)
    confined = {"qk": "queries and keys", "v": "values", "qkv": "queries, keys and values"}[parts]
    return SubspaceResult(
        subspaces=list(spaces),
        ranks=wanted,
        batches=list(tried),
        metric=metric.mean(-1),
        error=metric.std(-1, correction=0) / len(held_out) ** 0.5,
        full=torch.stack(full).mean(-1),
        points=points[0],
        labels=labels[0],
        skipped=skipped,
        unit=batch.task.metric,
        definition=f"{batch.task.metric} with the {confined} of {', '.join(chosen)} confined to so many directions "
        f"through their mean (queries at the last position, keys and values at {keys} positions), directions by SVD on "
        "one half of the task's prompts, mean over the other half, or over as many prompts of a mutation; larger: the "
        "behaviour is kept",
    )


def _read_ranks(text: str, d_head: int) -> list[int]:
    try:
        ranks = sorted({min(int(word), d_head) for word in text.split(",") if word.strip()} | {d_head})
    except ValueError:
        raise UserError(f"ranks={text!r} is not a list of numbers such as 0,1,2,4,8.") from None
    if ranks[0] < 0:
        raise UserError(f"ranks={text!r}: {ranks[0]} directions cannot be kept; the least is 0.")
    return ranks


def _masks(model: LanguageModel, batch: Batch, keys: str) -> list[Tensor]:
    """The positions whose keys and values are confined, per prompt."""
    if keys == "all":
        return [torch.ones(len(tokens), dtype=torch.bool) for tokens in batch.clean]
    masks = [found["answer"] | found["candidate"] for found in keys_by_class(model, batch)]
    if not any(bool(mask.any()) for mask in masks):
        raise UserError(f"no candidate answer stands in the prompts of {batch.task.name}; use keys=all.")
    return masks


def _hook(model: LanguageModel, head: str, port: str, rotated: bool) -> str:
    plain, turned = (sites.block(layer_of(head), f"attn.hook_{kind}{port}") for kind in ("", "rot_"))
    return turned if rotated and turned in model.hook_points else plain


def _fit(
    model: LanguageModel, batch: Batch, store: ActivationStore, head: str, parts: str, keys: str, rotated: bool
) -> tuple[Subspace, Tensor, list[str]]:
    """The directions of one head, and its queries and keys (or values) in the first three of them with their labels."""
    hooks = {port: _hook(model, head, port, rotated) for port in "qkv"}
    found = store.get(model, batch.clean, list(hooks.values()))
    h, shared = head_of(head), head_of(head) * model.config.n_kv_heads // model.config.n_heads
    masks = _masks(model, batch, keys)
    rows = {"q": torch.stack([x[-1, h] for x in found[hooks["q"]]]).float()}
    for port in "kv":
        pairs = zip(found[hooks[port]], masks, strict=True)
        rows[port] = torch.cat([x[mask, shared] for x, mask in pairs]).float()
    centres = {port: x.mean(0) for port, x in rows.items()}
    order = [f"key {n}" if keys == "candidates" else "key" for mask in masks for n in range(1, int(mask.sum()) + 1)]
    named = {"q": ["query"] * len(rows["q"]), "k": order, "v": [name.replace("key", "value") for name in order]}
    centred = {port: x - centres[port] for port, x in rows.items()}
    bases: dict[str, Tensor] = {}
    together = {"qk": ["qk"], "v": ["v"], "qkv": ["qk", "v"]}[parts]
    for ports in reversed(together):  # so that what is shown is of the first
        stacked = torch.cat([centred[port] for port in ports])
        # Completed to a basis: at full rank nothing may change, however few the prompts.
        _, singular, directions = torch.linalg.svd(stacked, full_matrices=True)
        bases |= dict.fromkeys(ports, directions)
        share = singular.square().cumsum(0) / singular.square().sum().clamp_min(1e-30)
        explained = torch.cat([share, torch.ones(len(directions) - len(share))])
        points = stacked @ directions[:3].T
        labels = [name for port in ports for name in named[port]]
    return Subspace(head, {port: centres[port] for port in bases}, bases, explained), points, labels


def _confined(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    masks: Sequence[Tensor],
    spaces: Sequence[Subspace],
    rotated: bool,
    rank: int | None,
) -> Float[Tensor, " batch"]:
    """The metric per prompt with some heads confined to `rank` directions; None: nothing is changed."""
    first = min(layer_of(space.head) for space in spaces)
    hook = sites.block(first, "hook_resid_pre")
    metric = torch.empty(len(batch))
    for bucket in batch.buckets():
        some = batch.select(bucket.tolist())
        where = torch.stack([masks[i] for i in bucket.tolist()]).to(model.device)
        at_end = torch.zeros_like(where)
        at_end[:, -1] = True
        edit: dict[str | Site, Callable[[Tensor], Tensor]] = {}
        if rank is not None:
            edit = {
                Site(_hook(model, space.head, port, rotated), head=head_of(space.head)): partial(
                    _project, space, port, rank, at_end if port == "q" else where
                )
                for space in spaces
                for port in space.bases
            }
        resid = torch.stack(store.get(model, some.clean, [hook])[hook])
        out = model.run(torch.stack(some.clean), edit=edit, logits="last", start=Resume(first, resid), ungroup=True)
        assert out.logits is not None
        metric[bucket] = some.score(out.logits[:, -1].cpu())
    return metric


def _project(space: Subspace, port: str, rank: int, where: Tensor, x: Tensor) -> Tensor:
    return torch.where(where[..., None], space.project(x, port, rank), x)


def _mutations(model: LanguageModel, batch: Batch, kinds: str) -> tuple[dict[str, Batch], dict[str, str]]:
    """The batch, and as many prompts of each mutation; and which mutations failed, with the reason."""
    tried, skipped = {"task": batch}, {}
    names = [kind.strip() for kind in kinds.split(",") if kind.strip() not in ("", "none")]
    for kind in names:
        if kind not in MUTATIONS:
            raise unknown("mutation", kind, MUTATIONS)
        try:
            tried[kind] = sample(mutated(batch.task, kind, model), model, len(batch), seed=0)
        except UserError as reason:
            skipped[kind] = str(reason)
    return tried, skipped
