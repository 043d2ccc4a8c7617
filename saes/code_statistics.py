"""Statistics of tables of codes: which heads' codes, alone or in pairs, tell clean from corrupted prompts.

A table holds one code per example and head, NONE where a head says nothing. Row i of the clean and of the corrupted
table belong to one pair of prompts, whose labels may be swapped.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Real
from torch import Generator, Tensor

NONE = -1
PAIR_SWAPS = 20  # each a table of all pairs of heads, so fewer than for heads
Statistic = Literal["unique", "information"]


def score_codes(
    clean: Int[Tensor, "pair head"],
    corrupted: Int[Tensor, "pair head"],
    n_codes: int,
    permutations: int,
    generator: Generator,
    statistic: Statistic = "unique",
) -> dict[str, Tensor]:
    """u_h raw and normalised, the statistic against the null, and how many codes each head has."""
    swaps = torch.rand(permutations + 1, len(clean), generator=generator).to(clean.device) < 0.5
    swaps[0] = False
    only, used = unique_codes(clean, corrupted, n_codes, swaps)
    raw = only[0]
    both = only if statistic == "unique" else information(clean, corrupted, n_codes, swaps)
    return {"raw": raw, "normalised": raw / used.clamp(min=1), "z": z_score(both), "codes_used": used}


def z_score(swapped: Float[Tensor, "permutation *any"]) -> Float[Tensor, "*any"]:
    """The first row against all rows. It is one of the permutations itself, as in any permutation test: a statistic
    that no swap ever reaches then scores sqrt(permutations) instead of having no spread to be measured by."""
    std = swapped.std(0, correction=0)
    return torch.where(std > 0, (swapped[0] - swapped.mean(0)) / std, 0)


def unique_codes(
    clean: Int[Tensor, "pair head"],
    corrupted: Int[Tensor, "pair head"],
    n_codes: int,
    swaps: Bool[Tensor, "permutation pair"],
) -> tuple[Float[Tensor, "permutation head"], Float[Tensor, " head"]]:
    """u_h = |P_h \\ N_h| for every way of swapping the labels of some pairs, and |P_h | N_h|. NONE is no code."""
    only, used = [], []
    swap = swaps.float()
    for p, q in zip(clean.T, corrupted.T, strict=True):
        before, after = (F.one_hot(one + 1, n_codes + 1)[:, 1:].float() for one in (p, q))
        total = before.sum(0) + after.sum(0)
        count = before.sum(0) + swap @ (after - before)  # how often each code occurs among what is labelled clean
        only.append(((count == total) & (total > 0)).sum(1))
        used.append((total > 0).sum())
    return torch.stack(only, 1).double(), torch.stack(used).double()


def information(
    clean: Int[Tensor, "pair head"],
    corrupted: Int[Tensor, "pair head"],
    n_codes: int,
    swaps: Bool[Tensor, "permutation pair"],
) -> Float[Tensor, "permutation head"]:
    """Mutual information of code and label in bits, for every way of swapping the labels of some pairs; NONE is a code.

    Labels are equally frequent, so it is 1 - H(label | code), from 0 (codes alike) to 1 (no code in common).
    """
    out = []
    swap = swaps.float()
    for p, q in zip(clean.T, corrupted.T, strict=True):
        before, after = (F.one_hot(one + 1, n_codes + 1).float() for one in (p, q))
        total = before.sum(0) + after.sum(0)
        share = (before.sum(0) + swap @ (after - before)) / total.clamp(min=1)
        entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / math.log(2)
        out.append(1 - (entropy * total).sum(1) / total.sum())
    return torch.stack(out, 1).double()


# ---- pairs of heads ----


def pairs_z(
    clean: Int[Tensor, "pair head"], corrupted: Int[Tensor, "pair head"], n_codes: int, generator: Generator
) -> Float[Tensor, "head head"]:
    """U against swaps of the labels within pairs of prompts."""
    tables = [pair_scores(clean, corrupted, n_codes).double()]
    for _ in range(PAIR_SWAPS):
        swap = (torch.rand(len(clean), 1, generator=generator) < 0.5).to(clean.device)
        tables.append(pair_scores(clean.where(~swap, corrupted), corrupted.where(~swap, clean), n_codes).double())
    return z_score(torch.stack(tables))


def pair_scores(
    clean: Int[Tensor, "example head"],
    corrupted: Int[Tensor, "example head"],
    n_codes: int,
) -> Int[Tensor, "head head"]:
    """U[h1, h2]: pairs of codes that two heads have together on some clean and no corrupted example.

    Symmetric, as published: neither direction nor layer is used.
    """
    both = torch.cat([clean, corrupted])
    label = (torch.arange(len(both), device=both.device) >= len(clean))[:, None]
    out = torch.zeros(both.shape[1], both.shape[1], dtype=torch.long, device=both.device)
    for h in range(len(out) - 1):
        one, other = both[:, h, None], both[:, h + 1 :]
        joint = (one * n_codes + other).where((one != NONE) & (other != NONE), n_codes**2)
        # Sorted with the label as lowest bit, a run of one joint code ends with a clean row only if all of it is clean.
        key = (2 * joint + label).sort(0).values
        joint, is_corrupted = key // 2, key % 2
        last = torch.cat([joint[1:] != joint[:-1], torch.ones_like(joint[:1], dtype=torch.bool)])
        out[h, h + 1 :] = (last & (is_corrupted == 0) & (joint < n_codes**2)).sum(0)
    return out + out.T


def fold_back(pairs: Real[Tensor, "head head"], k: int | None = None) -> Int[Tensor, " head"]:
    """The paper's "edge-level" prediction, which is one number per *head*: how often it is among the first k endpoints
    when ordered pairs are listed best first, both endpoints of each. By default k = n_heads^2 / 2.

    Its AUC is over heads and cannot be compared with an AUC over edges.
    """
    n = len(pairs)
    ranked = pairs.double().masked_fill(torch.eye(n, dtype=torch.bool, device=pairs.device), -torch.inf)
    order = ranked.flatten().argsort(descending=True, stable=True)[: n * (n - 1)]
    ends = torch.stack([order // n, order % n], 1).flatten()
    return ends[: n * n // 2 if k is None else k].bincount(minlength=n)
