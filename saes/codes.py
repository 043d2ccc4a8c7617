"""Discrete codes of attention heads: which heads say something on clean prompts that they never say on corrupted ones.

One small SAE is trained on the outputs of all heads on about ten prompts. The latent that fires most is the *code* of a
head on a prompt. A head is scored by the codes it uses on clean prompts only (O'Neill & Bui, arXiv:2405.12522):

    a = relu(E (x - b) + e),   x' = D a + b,   loss = mean (x' - x)^2 + lam * mean_rows sum a     (rows of E: unit norm)
    K[example, head] = argmax_j a_j,   P_h, N_h = codes of head h on clean, corrupted,   u_h = |P_h \\ N_h|

`mode="paper"` is the method as published, quirks included: the *rows* of D have unit norm, a row on which nothing
fires gets code 0, prompts that trained the SAE are scored too, and the score is the bare count u_h, which is higher
for a head with many codes even if labels are shuffled. `mode="fixed"` repairs each:

- dictionary vectors (columns of D) have unit norm, and a row on which nothing fires has NONE for a code, which is not
  counted;
- all outputs are divided by one number, their RMS. A latent stays on only where the projection on it exceeds
  lam * d_model / 2, so otherwise it is the unit of the activations that decides how much is silent. The score stays
  entangled with the norm of a head: one much quieter than the average has no codes;
- pairs of prompts that trained the SAE are not scored;
- the score is (u_h - mean) / std over label swaps *within* pairs of clean and corrupted prompt, the labels as they
  are being one of the swaps. The two prompts of a
  pair share a template, so under the null only the members of a pair are exchangeable. Shuffling all labels would put
  both on one side, call template-specific codes unique, and give every head that reads the template a null too high.

The score is not causal. It says that what a head writes differs between clean and corrupted prompts, never that the
model uses it; and where corrupted prompts vary less (greater-than's all end in 01), every head that reads the varying
token is scored, for which no permutation is a remedy. Hold it to exact patching before calling the top heads a circuit.

The published statistic counts; it does not compare. A head that says one and the same other thing on all clean prompts
has a single unique code, fewer than chance gives, so that its z is *negative*. `statistic="information"` puts in its
place the mutual information of code and label, silence included, also against label swaps: it is large whenever the
codes tell clean from corrupted.

Other encoders take the SAE's place as controls: `kmeans` (the code is the nearest of `latents` centroids) and `probe`
(each head's own difference-of-means direction, cut into bins), fitted on the same training rows.

Training is not what finds heads. Of the 20 heads of SmolLM2-135M with the largest exact effect, on ioi and on
greater_than, codes of a trained SAE find some (ROC AUC .73 and .67; in paper mode .74 and .82), those of a random one
as many (.71 and .84), and the plain norm of the mean difference between clean and corrupted outputs more (.87, .86):
tests/benchmarks/results/codes-*.json. On planted circuits, where heads that write as much do nothing, all fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from saes.code_statistics import NONE, PAIR_SWAPS, Statistic, pair_scores, pairs_z, score_codes
from saes.controls import kmeans, nearest, probe_codes
from workbench import sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis
from workbench.scores import NodeScores, PairScores, every_head

CHUNK = 64  # prompts whose activations are held at once

Mode = Literal["paper", "fixed"]
Encoder = Literal["sae", "kmeans", "probe"]
PROBE_BINS = 20


class DiscreteSAE(NamedTuple):
    """Parameters of the SAE, or their gradients."""

    encoder: Float[Tensor, "latent d_model"]
    encoder_bias: Float[Tensor, " latent"]
    decoder: Float[Tensor, "d_model latent"]
    bias: Float[Tensor, " d_model"]


class TrialSettings(NamedTuple):
    """The parameters of `sae_codes` that one trial needs."""

    mode: Mode = "fixed"
    latents: int = 200
    examples: int = 10
    steps: int = 500
    lam: float = 0.02
    lr: float = 1e-3
    permutations: int = 200
    pairs: bool = False
    encoder: Encoder = "sae"
    statistic: Statistic = "unique"


@dataclass(frozen=True)
class CodeScores:
    """Scores of the heads by their codes; every tensor over heads is a mean over trials.

    scores       what the mode calls its score: u_h in "paper", z in "fixed"
    raw          u_h, codes seen on clean prompts only
    normalised   u_h over the number of codes seen at all
    z            u_h against label swaps within pairs
    std          of the score, over trials
    codes_used   how many different codes a head has
    none         share of prompts on which no latent of a head fires (in "paper" they are merged with code 0)
    pairs        U[h1, h2], pairs of codes seen together on clean prompts only; None unless asked for
    edges        of these, heads of an earlier and a later layer, scored by U in "paper" and by z in "fixed": a real
                 edge score, which the paper's "edge level" is not (see `fold_back`); None unless asked for
    loss, fvu    of the SAE on the rows it was trained on: final loss, fraction of variance unexplained; of k-means its
                 squared error; NaN for probe codes, which reconstruct nothing
    """

    scores: NodeScores
    raw: Float[Tensor, " head"]
    normalised: Float[Tensor, " head"]
    z: Float[Tensor, " head"]
    std: Float[Tensor, " head"]
    codes_used: Float[Tensor, " head"]
    none: Float[Tensor, " head"]
    pairs: Float[Tensor, "head head"] | None
    edges: PairScores | None
    loss: Float[Tensor, " trial"]
    fvu: Float[Tensor, " trial"]

    @property
    def none_rate(self) -> float:
        return float(self.none.mean())

    def summary(self) -> dict[str, Any]:
        names = list(self.scores.nodes)
        out = self.scores.summary() | {
            "none_rate": round(self.none_rate, 4),
            "heads_without_codes": int((self.none == 1).sum()),
            "mean_codes_used": round(float(self.codes_used.mean()), 2),
            "trials": len(self.loss),
            "mean_std_over_trials": round(float(self.std.mean()), 4),
            "top_heads_std": [round(float(self.std[names.index(name)]), 4) for name, _ in self.scores.top(10)],
            "mean_loss": None if self.loss.isnan().any() else round(float(self.loss.mean()), 5),
            "mean_fvu": None if self.fvu.isnan().any() else round(float(self.fvu.mean()), 4),
        }
        if self.pairs is not None:
            best = self.pairs.triu(1).flatten().sort(descending=True, stable=True)
            ends = [(names[i // len(names)], names[i % len(names)]) for i in best.indices[:10].tolist()]
            out["top_pairs"] = [[*pair, round(u, 3)] for pair, u in zip(ends, best.values.tolist(), strict=False)]
        return out


@analysis("sae-codes", version=2, n=250)
def sae_codes(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    mode: Mode = "fixed",
    latents: int = 200,
    examples: int = 10,
    steps: int = 500,
    lam: float = 0.02,
    lr: float = 1e-3,
    trials: int = 10,
    permutations: int = 200,
    position: Literal["mean", "last"] = "mean",
    pairs: bool = False,
    encoder: Encoder = "sae",
    statistic: Statistic = "unique",
    sae_seed: int = 0,
) -> CodeScores:
    """Heads whose discrete SAE codes occur on clean prompts only. Correlational: it does not show that a head is used.

    mode          paper: as published; fixed: with its flaws repaired and a permutation null
    latents       of the SAE, which is how many codes there can be
    examples      prompts the SAE is trained on (fixed: whole pairs, so rounded up to even)
    steps         of training; 0 leaves the SAE random, the control that training has to beat
    lam           weight of the L1 penalty
    lr            learning rate of Adam
    trials        independent SAEs, over which scores are averaged
    permutations  label swaps that make the null distribution
    position      a head's output averaged over token positions, or at the last one
    pairs         also count code pairs of two heads that occur together on clean prompts only
    encoder       what makes codes: sae, or the controls kmeans and probe
    statistic     what is compared with label swaps (fixed): unique codes, or mutual information of code and label
    sae_seed      of training examples, initialisation and permutations
    """
    if mode == "paper" and statistic != "unique":
        raise UserError(f"mode='paper' scores by its count of unique codes, not by {statistic!r}; use mode='fixed'.")
    settings = TrialSettings(mode, latents, examples, steps, lam, lr, permutations, pairs, encoder, statistic)
    check(len(batch), trials, settings)
    generator = torch.Generator().manual_seed(sae_seed)
    x = head_outputs(model, store, [*batch.clean, *batch.corrupted], position)
    if mode == "fixed":
        x = rescale(x)
    runs = [trial(x, settings, generator) for _ in track(range(trials), "sae-codes")]
    every = {key: torch.stack([run[key] for run in runs]).float().cpu() for key in runs[0]}
    mean = {key: value.mean(0) for key, value in every.items()}
    which = "raw" if mode == "paper" else "z"
    null = f", z-scored against {permutations} label swaps within pairs" if mode == "fixed" else ""
    what = f"number of {encoder} codes a head uses on clean and never on corrupted prompts"
    if mode == "fixed" and statistic == "information":
        what = f"mutual information of {encoder} code and label clean or corrupted"
    size = {"sae": f"{latents} latents", "kmeans": f"{latents} centroids", "probe": f"{min(PROBE_BINS, latents)} bins"}
    definition = (
        f"{what}{null}; {mode} mode, {size[encoder]}, {examples} training examples, {position} position, mean over "
        f"{trials} trials from seed {sae_seed}; "
        "not causal"
    )
    nodes = every_head(model.config.n_layers, model.config.n_heads)
    return CodeScores(
        NodeScores(nodes, mean[which].clone(), definition, "codes" if mode == "paper" else "standard deviations"),
        **{key: mean[key] for key in ("raw", "normalised", "z", "codes_used", "none")},
        std=every[which].std(0, correction=0),
        pairs=mean.get("pairs"),
        edges=_edges(nodes, mean, mode, definition) if pairs else None,
        loss=every["loss"],
        fvu=every["fvu"],
    )


def check(n: int, trials: int, settings: TrialSettings) -> None:
    """Raises UserError for numbers that make no codes, and if training would leave none of n pairs to score."""
    if min(settings.latents, settings.examples, trials) < 1 or settings.permutations < 2 or settings.steps < 0:
        raise UserError("latents, examples and trials must be at least 1, permutations 2, and steps 0.")
    if settings.mode == "fixed" and n <= (settings.examples + 1) // 2:
        raise UserError(f"{n} pairs leave none to score after {settings.examples} training examples; raise --n.")


def trial(x: Float[Tensor, "example head d_model"], settings: TrialSettings, generator: Generator) -> dict[str, Tensor]:
    """Train one SAE on some examples (of x, clean half first) and score the heads by its codes."""
    n = len(x) // 2
    train, scored = split(n, settings.examples, settings.mode, generator)
    rows = x[train].flatten(0, 1)
    table, quality = assign(x, train, rows, settings, generator)
    none = (table[torch.cat([scored, scored + n])] == NONE).double().mean(0)
    if settings.mode == "paper":
        table = table.clamp(min=0)  # argmax over zeros is 0
    clean, corrupted = table[:n][scored], table[n:][scored]
    out = score_codes(clean, corrupted, settings.latents, settings.permutations, generator, settings.statistic)
    if settings.pairs:
        out["pairs"] = pair_scores(clean, corrupted, settings.latents).double()
        if settings.mode == "fixed":
            out["pairs_z"] = pairs_z(clean, corrupted, settings.latents, generator)
    return out | {"none": none} | quality


def _edges(nodes: Sequence[str], mean: dict[str, Tensor], mode: Mode, definition: str) -> PairScores:
    table, unit = (mean["pairs"], "pairs of codes") if mode == "paper" else (mean["pairs_z"], "standard deviations")
    null = f", z-scored against {PAIR_SWAPS} label swaps within pairs" if mode == "fixed" else ""
    return PairScores.of(
        nodes, table, f"pairs of codes that two heads have together on clean and never on corrupted prompts{null}; "
        f"heads: {definition}", unit,
    )  # fmt: skip


def assign(
    x: Float[Tensor, "example head d_model"],
    train: Int[Tensor, " trained"],
    rows: Float[Tensor, "row d_model"],
    settings: TrialSettings,
    generator: Generator,
) -> tuple[Int[Tensor, "example head"], dict[str, Tensor]]:
    """Codes of all examples, and how well the encoder fits its training rows."""
    if settings.encoder == "probe":
        missing = torch.tensor(torch.nan)
        return probe_codes(x, train, min(PROBE_BINS, settings.latents)), {"loss": missing, "fvu": missing}
    if settings.encoder == "kmeans":
        centres = kmeans(rows, settings.latents, generator)
        table = torch.cat([nearest(x[i : i + CHUNK], centres) for i in range(0, len(x), CHUNK)])
        error = (rows - centres[nearest(rows, centres)]).square().sum()
        return table, {"loss": error / rows.numel(), "fvu": error / (rows - rows.mean(0)).square().sum()}
    sae = fit(rows, settings, generator)
    return codes(sae, x), {"loss": loss(sae, rows, settings.lam), "fvu": _fvu(sae, rows)}


# ---- data ----


def pooled_z(
    model: LanguageModel, store: ActivationStore, sequences: Sequence[Int[Tensor, "_"]], position: str
) -> Float[Tensor, "layer example its_head d_head"]:
    """`hook_z` of each head, averaged over positions or at the last one."""
    hooks = [sites.block(layer, "attn.hook_z") for layer in range(model.config.n_layers)]
    out = []
    for start in range(0, len(sequences), CHUNK):
        found = store.get(model, sequences[start : start + CHUNK], hooks)
        each = [[one.float().mean(0) if position == "mean" else one[-1].float() for one in found[h]] for h in hooks]
        out.append(torch.stack([torch.stack(layer) for layer in each]).to(model.device, model.dtype))
    return torch.cat(out, 1)


def head_outputs(
    model: LanguageModel, store: ActivationStore, sequences: Sequence[Int[Tensor, "_"]], position: str
) -> Float[Tensor, "example head d_model"]:
    """What each head writes, averaged over positions or at the last one; heads in the order a0.h0, a0.h1, ..."""
    return written(model, pooled_z(model, store, sequences, position))  # W_O is linear, and z is narrower


def written(
    model: LanguageModel, z: Float[Tensor, "layer example its_head d_head"]
) -> Float[Tensor, "example head d_model"]:
    """What heads write whose `hook_z` is z."""
    out = []
    for start in range(0, z.shape[1], CHUNK):
        some = z[:, start : start + CHUNK]
        out.append(torch.cat([model.head_results(layer, one).float() for layer, one in enumerate(some)], 1))
    return torch.cat(out)


def rescale(x: Float[Tensor, "example head d_model"]) -> Float[Tensor, "example head d_model"]:
    """All heads by the same factor, to mean square 1 per element."""
    return x / x.square().mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny)


def split(n: int, examples: int, mode: Mode, generator: Generator) -> tuple[Int[Tensor, " row"], Int[Tensor, " pair"]]:
    """Rows that train (of 2n, clean ones first) and pairs that are scored."""
    if mode == "paper":
        return torch.randperm(2 * n, generator=generator)[:examples], torch.arange(n)
    order = torch.randperm(n, generator=generator)
    train, scored = order[: (examples + 1) // 2], order[(examples + 1) // 2 :]
    return torch.cat([train, train + n]), scored


# ---- the SAE ----


def fit(rows: Float[Tensor, "row d_model"], settings: TrialSettings, generator: Generator) -> DiscreteSAE:
    """Train by full-batch Adam. Unit norms hold at every step, and no gradient points along what they fix."""
    d, latents = rows.shape[1], settings.latents
    encoder, decoder = torch.randn(latents, d, generator=generator), torch.randn(d, latents, generator=generator)
    bias = (2 * torch.rand(latents, generator=generator) - 1) / d**0.5
    sae = DiscreteSAE(*(t.to(rows.device) for t in (encoder, bias, decoder, torch.zeros(d))))
    unit = ((sae.encoder, 1), (sae.decoder, 1 if settings.mode == "paper" else 0))
    _normalise(unit)
    adam = torch.optim.Adam(sae, lr=settings.lr)
    for _ in range(settings.steps):
        for parameter, gradient in zip(sae, gradients(sae, rows, settings.lam), strict=True):
            parameter.grad = gradient
        for weight, dim in unit:
            assert weight.grad is not None
            weight.grad -= (weight.grad * weight).sum(dim, keepdim=True) * weight
        adam.step()
        _normalise(unit)
    return DiscreteSAE(*(parameter.detach() for parameter in sae))  # without their gradients


def _normalise(unit: tuple[tuple[Tensor, int], ...]) -> None:
    for weight, dim in unit:
        weight /= weight.norm(dim=dim, keepdim=True)


def encode(sae: DiscreteSAE, x: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any latent"]:
    return F.linear(x, sae.encoder, sae.encoder_bias - sae.encoder @ sae.bias).relu_()


def decode(sae: DiscreteSAE, a: Float[Tensor, "*any latent"]) -> Float[Tensor, "*any d_model"]:
    return a @ sae.decoder.T + sae.bias


def loss(sae: DiscreteSAE, rows: Float[Tensor, "row d_model"], lam: float) -> Float[Tensor, ""]:
    """Squared error averaged over all elements, plus lam times the L1 norm averaged over rows only."""
    a = encode(sae, rows)
    return F.mse_loss(decode(sae, a), rows) + lam * a.sum(1).mean()


def gradients(sae: DiscreteSAE, rows: Float[Tensor, "row d_model"], lam: float) -> DiscreteSAE:
    """Of the loss. By hand: most rows and latents soon go silent, and only the rest need more than the encoder."""
    n, d = rows.shape
    a = encode(sae, rows)
    firing, alive = a.sum(1).nonzero()[:, 0], a.sum(0).nonzero()[:, 0]
    some, a = rows[firing], a[firing][:, alive]
    encoder, decoder = sae.encoder[alive], sae.decoder[:, alive]
    error = torch.addmm(sae.bias - some, a, decoder.T) * (2 / (n * d))
    inward = torch.where(a > 0, error @ decoder + lam / n, 0)
    out = DiscreteSAE(*(torch.zeros_like(parameter) for parameter in sae))
    out.encoder[alive] = inward.T @ some - inward.sum(0)[:, None] * sae.bias
    out.encoder_bias[alive] = inward.sum(0)
    out.decoder[:, alive] = error.T @ a
    # The reconstruction error of silent rows is bias - row, so that its sum over all rows needs none of them.
    outward = (a.sum(0) @ decoder.T + n * sae.bias - rows.sum(0)) * (2 / (n * d))
    out.bias.copy_(outward - inward.sum(0) @ encoder)
    return out


def _fvu(sae: DiscreteSAE, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, ""]:
    error = (decode(sae, encode(sae, rows)) - rows).square().sum()
    return error / (rows - rows.mean(0)).square().sum()


# ---- codes ----


def codes(sae: DiscreteSAE, x: Float[Tensor, "example head d_model"]) -> Int[Tensor, "example head"]:
    """The latent that fires most; NONE where none does."""
    out = []
    for start in range(0, len(x), CHUNK):
        top = encode(sae, x[start : start + CHUNK]).max(-1)
        out.append(top.indices.where(top.values > 0, NONE))
    return torch.cat(out)
