"""Contextual decomposition (CD-T): what becomes of a node's deviation on its way to the logits, by rules, no gradients.

Hsu et al. 2025 (ICLR, arXiv:2407.00886). Every activation is a sum of a relevant part beta and an irrelevant part
gamma. At a source, beta is its output less its ablated output (section 3.2.1); from there on each module passes the two
on by a rule of its own, and beta + gamma stays what the clean run computes. A source's relevance to the task is the
metric of beta at the logits (section 3.3.2). It holds direct and indirect effects together: the method scores nodes,
and knows no edges.

The rules. The total t = beta + gamma is known from one clean run, so that beta alone is computed:

    affine map      beta W + bias |beta W| / (|beta W| + |gamma W|)                                 eq. 4
    scores          queries' beta . keys' beta / sqrt(d_head)                                       eq. 9
    pattern         softmax(mask(the scores' beta)): uniform where nothing is relevant              eq. 11
    z               the pattern's beta times the values' beta                                       eq. 13
    norm            its linear part with the scale of t; its bias is shared as above                the authors' code
    activation f    f(t) - f(gamma); the paper has no gated ones: here f is then f(gate) * linear   the authors' code
    opposite signs  where beta and gamma disagree, the larger takes the whole                       appendix B.1

If every module followed f(t) - f(gamma), gamma would be the run with the source ablated: exact patching. So a source
costs what a patched run does, and for the heads and MLPs of one model exact patching is the better choice. The measured
comparison is in `circuits/relp.py`.

Four departures from the paper. Patterns are kept as in the clean run and values alone decomposed, unless
attention=paper: planted nodes are ranked alike, and on smollm2-135m (ioi) its scores grow beyond all numbers.
Deviations are from the corrupted prompt, not from the mean: on smollm2-135m, means let parts of opposite sign grow
until scores overflow. Appendix B.1, which prevents that, is off, as it takes much of the signal away. Algorithm 1's
search, from the nodes relevant to the logits to those relevant to them and so on, is left out: on 18 planted models it
ranked nodes worse (AUC .75, against .88 by relevance to the logits). Nor are there edges: what a source makes relevant
where a node reads (eq. 16), times the relevance of that node, ranked them with .70.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph import PORTS, nodes_of
from circuits.writes import Ablation, Writes
from workbench import norms, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import Affine, LanguageModel, Resume
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis
from workbench.scores import NodeScores

TOKENS_PER_PASS = 4096  # over the sources that are decomposed together
TOKENS_AT_ONCE = 512  # bounds memory: of this many, all that the clean run computes is held
Attention = Literal["paper", "values"]
Beta = Float[Tensor, "source batch pos d_model"]
PerHead = Float[Tensor, "source batch pos head d_head"]


@analysis("cd-t", version=1, n=32)
def cdt(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    ablation: Ablation = "resample",
    attention: Attention = "values",
    signs: bool = False,
) -> NodeScores:
    """Contextual decomposition: the metric of what every head's and MLP's deviation becomes at the logits.

    ablation   what a node deviates from: resample (corrupted prompt), mean (over corrupted prompts; the paper), zero
    attention  values: patterns are kept, values alone are decomposed; paper: patterns too (eq. 9 to 13)
    signs      where the relevant and the irrelevant part have opposite signs, the larger takes the whole (appendix B.1)

    Raises UserError for models that norm what attention writes or cap its scores, and if a decomposition overflows.
    """
    names = nodes_of(model.config.n_layers, model.config.n_heads)
    per_prompt = torch.zeros(len(names), len(batch))
    with track(total=len(batch) * len(names), desc="cd-t") as bar:
        for part, some in batch.parts(tokens=TOKENS_AT_ONCE):
            rules = _Rules(model, Writes(model, store, some, batch, ablation), some, attention, signs)
            for sources in rules.passes():
                logits = rules.logits(rules.propagate(sources)).cpu()
                rows = torch.arange(sources.start, sources.stop)
                per_prompt[rows[:, None], part] = torch.stack([some.score(one) for one in logits])
                bar.update(len(part) * len(sources))
    lost = [name for name, finite in zip(names, per_prompt.isfinite().all(1).tolist(), strict=True) if not finite]
    if lost:
        raise UserError(
            f"the decompositions of {len(lost)} nodes ({lost[0]}, ...) grew beyond all numbers: parts of opposite sign "
            "feed each other. Keep the patterns (attention=values), deviate from the corrupted prompt "
            "(ablation=resample), or let the larger part take the whole (signs=True)."
        )
    unit = batch.task.metric
    return NodeScores(
        names,
        per_prompt.mean(1),
        f"{unit} of the relevant part of the logits, relevant being a node's output less its ablated output "
        f"({ablation}), by contextual decomposition (attention: {attention}, signs: {signs}), all positions, mean over "
        "prompts; positive: the node helps",
        unit,
        per_prompt=per_prompt,
        headline={"prompts": len(batch), "ablation": ablation, "attention": attention},
    )


# ---- the rules of modules ----


def _share(beta: Tensor, gamma: Tensor) -> Tensor:
    """|beta| / (|beta| + |gamma|), elementwise; 0 where both are."""
    beta, gamma = beta.abs(), gamma.abs()
    return beta / (beta + gamma + torch.finfo(beta.dtype).tiny)


def _affine(beta: Tensor, by: Affine, total: Tensor) -> Tensor:
    """Beta of x @ weight + bias. total: what the map makes of the whole x."""
    out = beta @ by.weight
    return out if by.bias is None else out + by.bias * _share(out, total - by.bias - out)


class _Norm(NamedTuple):
    """A norm with the scale that it has at x."""

    parts: norms.Norm
    x: Float[Tensor, "batch pos d_model"]
    scale: Float[Tensor, "batch pos 1"]

    def __call__(self, beta: Beta) -> Beta:
        linear: Tensor = self.parts.flat(beta) * self.parts.gain * self.scale
        return linear + self.parts.bias * _share(beta, self.x - beta) if bool(self.parts.bias.any()) else linear


def _frozen(norm: object, x: Tensor) -> _Norm:
    parts = norms.measure(norm, x)  # type: ignore[arg-type]  # a module is not typed as what it can be called with
    return _Norm(parts, x, parts.scale(x))


@dataclass(frozen=True)
class _Clean:
    """One layer of the clean run, at the positions from the first one on where anything can be relevant.

    values   by the part of a hook point's name after `blocks.N.`
    seen     which keys, of all positions, a query looks at
    scale    what products of queries and keys are multiplied by
    turns    what happens to queries ("q") and keys ("k") before they meet, up to a factor: a rotation, a norm's gain
    """

    values: dict[str, Tensor]
    seen: Bool[Tensor, "pos key"]
    scale: float
    turns: dict[str, Float[Tensor, "pos d_head d_head"]]
    attention_norm: _Norm
    mlp_norm: _Norm

    def turned(self, port: str, beta: PerHead) -> PerHead:
        """Queries or keys as they meet. A norm that they pass has the scale that it has in the clean run."""
        if port not in self.turns:
            return beta
        turn, before, after = (
            self.turns[port],
            self.values[f"attn.hook_{port}"],
            self.values[f"attn.hook_rot_{port}"],
        )
        factor = after.norm(dim=-1) / torch.einsum("bphd,pde->bphe", before, turn).norm(dim=-1)
        turned: Tensor = torch.einsum("sbphd,pde->sbphe", beta, turn) * factor[..., None]
        return turned


# ---- decompositions ----


class _Rules:
    """The decompositions of some prompts of one length, from every source."""

    def __init__(self, model: LanguageModel, writes: Writes, batch: Batch, attention: Attention, signs: bool):
        if model.post_attention_norm(0) is not None:
            raise UserError(f"{model.name} norms what attention writes; contextual decomposition has no rule for that.")
        self.model, self.writes, self.attention, self.signs = model, writes, attention, signs
        self.at = slice(writes.prefix, None)
        self.tokens = torch.stack(batch.clean)
        self.layers: list[_Clean] = []
        resid = writes.clean[writes.start]
        for layer in range(model.config.n_layers):
            clean, resid = self._clean(layer, resid)
            self.layers.append(clean)
        self.last = _frozen(model.final_norm, resid[:, -1:])

    def _clean(self, layer: int, resid: Tensor) -> tuple[_Clean, Tensor]:
        """A layer, and the residual stream after it. Raises UserError where scores are not queries times keys."""
        model = self.model
        rotary = sites.block(0, "attn.hook_rot_q") in model.hook_points
        met = [f"attn.hook_rot_{port}" if rotary else f"attn.hook_{port}" for port in "qk"]
        names = {*met, *(f"attn.hook_{port}" for port in PORTS), "hook_attn_out", "hook_mlp_in", "hook_mlp_out"}
        names |= {"mlp.hook_pre", "mlp.hook_post", "hook_resid_post", "attn.hook_attn_scores", "attn.hook_pattern"}
        names |= {"mlp.hook_pre_linear"} if sites.block(layer, "mlp.hook_pre_linear") in model.hook_points else set()
        hooks = {name: sites.block(layer, name) for name in names}
        run = model.run(self.tokens, capture=hooks.values(), logits="none", start=Resume(layer, resid), ungroup=True)
        found = {name: run[hook] for name, hook in hooks.items()}
        scores, pattern = found.pop("attn.hook_attn_scores"), found.pop("attn.hook_pattern")
        seen = ~scores[0, 0].isinf()
        q, k = (found[name].transpose(1, 2) for name in met)
        of_seen, plain = scores[..., seen], (q @ k.mT)[..., seen]
        scale = float((of_seen * plain).sum() / plain.square().sum().clamp(min=1e-30))
        limit = (1e-4 if model.dtype == torch.float32 else 2e-2) * of_seen.abs().max()
        if bool((of_seen - plain * scale).abs().max() > limit):
            raise UserError(f"{model.name} caps attention scores; contextual decomposition has no rule for that.")
        after = found["hook_resid_post"]
        values = {name: x[:, self.at] for name, x in found.items()}
        if self.attention == "values":
            values["attn.hook_pattern"] = pattern[:, :, self.at, self.at]
        return _Clean(
            values,
            seen[self.at],
            scale,
            self._turns(layer) if rotary and self.attention == "paper" else {},
            _frozen(model.attention_norm(layer), resid[:, self.at]),
            _frozen(model.mlp_norm(layer), values["hook_mlp_in"]),
        ), after

    def _turns(self, layer: int) -> dict[str, Float[Tensor, "pos d_head d_head"]]:
        """Measured with unit vectors in place of queries and keys."""
        c, length = self.model.config, self.tokens.shape[1]
        unit = torch.eye(c.d_head, device=self.model.device, dtype=self.model.dtype)[:, None, None]
        after = {port: sites.Site(sites.block(layer, f"attn.hook_rot_{port}"), head=0) for port in "qk"}
        found = self.model.run(
            self.tokens[:1].expand(c.d_head, -1),
            edit={sites.block(layer, f"attn.hook_{port}"): unit.expand_as for port in "qk"},
            capture=after.values(),
            logits="none",
            start=Resume(layer, unit.new_zeros(c.d_head, length, c.d_model)),
        )
        return {port: found[site].transpose(0, 1)[self.at] for port, site in after.items()}

    def passes(self) -> list[range]:
        """Sources that are decomposed together, numbered as in `nodes_of`."""
        n, (batch, length) = self.writes.n_sources - 1, self.last.x.shape[:1] + self.layers[0].seen.shape[:1]
        size = max(1, TOKENS_PER_PASS // (batch * length))
        return [range(at, min(at + size, n)) for at in range(0, n, size)]

    def propagate(self, sources: range) -> Beta:
        """Beta of the residual stream after the last layer."""
        c = self.model.config
        first = self.layers[0].attention_norm.x
        beta = first.new_zeros(0, *first.shape)  # of the sources that have written so far
        for layer in range(sources.start // (c.n_heads + 1), c.n_layers):
            here = [at % (c.n_heads + 1) for at in sources if at // (c.n_heads + 1) == layer]
            heads = [h for h in here if h < c.n_heads]
            z = torch.cat([self.heads(layer, beta), self._own(layer, heads)])
            before = torch.cat([beta, beta.new_zeros(len(heads), *beta.shape[1:])])
            mid = before + self.write(layer, z)
            out = self.mlp(layer, before if c.parallel_attn_mlp else mid)
            beta = self._agree(mid + out, self.layers[layer].values["hook_resid_post"])
            if c.n_heads in here:
                beta = torch.cat([beta, self._deviation(self.writes.mlp_hooks[layer])[None]])
        return beta

    def _deviation(self, hook: str) -> Tensor:
        return (self.writes.clean[hook] - self.writes.ablated[hook])[:, self.at]

    def _own(self, layer: int, heads: list[int]) -> PerHead:
        """Beta of z where heads of the layer are the sources: their deviation, and nothing in the others."""
        deviation = self._deviation(self.writes.z_hooks[layer])
        own = deviation.new_zeros(len(heads), *deviation.shape)
        for row, h in zip(own, heads, strict=True):
            row[:, :, h] = deviation[:, :, h]
        return own

    def heads(self, layer: int, beta: Beta) -> PerHead:
        """Beta of z, eq. 6 to 13."""
        clean = self.layers[layer]
        normed = clean.attention_norm(beta)
        weight, bias = self.model.in_weights(layer)
        totals = [clean.values[f"attn.hook_{port}"] for port in PORTS]
        q, k, v = (
            _affine(normed, Affine(w.flatten(0, 1).T, b.flatten()), total.flatten(2)).unflatten(-1, total.shape[2:])
            for w, b, total in zip(weight, bias, totals, strict=True)
        )
        if self.attention == "values":
            pattern = clean.values["attn.hook_pattern"]
        else:
            q, k = clean.turned("q", q), clean.turned("k", k)
            scores = q.transpose(2, 3) @ k.permute(0, 1, 3, 4, 2) * clean.scale
            # Keys before the prompts differ count in the softmax, with nothing relevant in them.
            scores = torch.cat([scores.new_zeros(*scores.shape[:-1], self.writes.prefix), scores], -1)
            pattern = scores.masked_fill(~clean.seen, -torch.inf).softmax(-1)[..., self.at]
        z: Tensor = (pattern @ v.transpose(2, 3)).transpose(2, 3)
        return z

    def write(self, layer: int, z: PerHead) -> Beta:
        """Beta of what attention adds to the residual stream, eq. 15."""
        by = Affine(self.model.out_weight(layer).flatten(0, 1), self.model.out_bias(layer))
        return _affine(z.flatten(3), by, self.layers[layer].values["hook_attn_out"])

    def mlp(self, layer: int, beta: Beta) -> Beta:
        """Beta of what the MLP adds to the residual stream."""
        clean, by = self.layers[layer], self.model.mlp_weights(layer)
        normed, total = clean.mlp_norm(beta), clean.values["mlp.hook_pre"]
        gamma = by.act(total - self._agree(_affine(normed, by.pre, total), total))
        if by.up is not None:
            total = clean.values["mlp.hook_pre_linear"]
            gamma = gamma * (total - self._agree(_affine(normed, by.up, total), total))
        total = clean.values["hook_mlp_out"]
        return self._agree(_affine(clean.values["mlp.hook_post"] - gamma, by.out, total), total)

    def _agree(self, beta: Tensor, total: Tensor) -> Tensor:
        """Appendix B.1."""
        if not self.signs:
            return beta
        gamma = total - beta
        whole = torch.where(beta.abs() >= gamma.abs(), total, 0)
        return torch.where(beta * gamma < 0, whole, beta)

    def logits(self, beta: Beta) -> Float[Tensor, "source batch vocab"]:
        """Beta of the logits at the last position."""
        logits: Tensor = self.last(beta[:, :, -1:])[:, :, 0] @ self.model.unembed_weight
        return logits
