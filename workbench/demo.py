"""The main job in one go: find the heads behind two tasks of a real model, by two methods, and compare.

Exact patching is the causal truth here; discrete-SAE codes are the observational method that is held to it.
"""

from __future__ import annotations

import time
from typing import Any

from workbench import pretrained, runs
from workbench.scores import NodeScores, head_auc, rank_agreement

TASKS = ("ioi", "greater_than")
N_PATCHING, N_CODES, TRIALS = 16, 100, 3
TRUTH = 20  # heads of largest exact effect, taken as the positives of the AUC


def demo(model: str = pretrained.DEFAULT) -> dict[str, Any]:
    """Figures per task, and the total cost of this call."""
    started = time.perf_counter()
    rows = []
    passes = 0
    for task in TASKS:
        patching = runs.run("patching", model=model, task=task, n=N_PATCHING)
        codes = runs.run("sae-codes", model=model, task=task, n=N_CODES, trials=TRIALS)
        passes += patching.forward_passes + codes.forward_passes
        exact: NodeScores = patching.result
        coded: NodeScores = codes.result.scores
        rows.append(
            {
                "task": task,
                "accuracy": codes.record["task"]["accuracy"],
                "metric": codes.record["task"]["metric"],
                "clean": codes.record["task"]["clean_mean"],
                "corrupted": codes.record["task"]["corrupted_mean"],
                "example": codes.record["task"]["example"],
                "patching_top": exact.top(6),
                "codes_top": coded.top(6),
                "rank_agreement": rank_agreement(exact, coded),
                "codes_auc": head_auc(coded, [name for name, _ in exact.top(TRUTH)], absolute=False),
                "runs": [patching.id, codes.id],
                "hit": patching.hit and codes.hit,
                "seconds": round(patching.seconds + codes.seconds, 1),
                "forward_passes": patching.forward_passes + codes.forward_passes,
            }
        )
    return {
        "model": model,
        "tasks": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "forward_passes": passes,
    }


def text(figures: dict[str, Any]) -> str:
    """The figures for the terminal."""
    lines = [f"\n{figures['model']}: which attention heads do the task?\n"]
    for row in figures["tasks"]:
        example = row["example"]
        lines += [
            f"{row['task']}   e.g. {example['clean']!r} -> {'/'.join(example['answers'][:3])!r}",
            f"  the model: {row['accuracy']:.0%} right, {row['metric']} {row['clean']:.2f} "
            f"({row['corrupted']:.2f} on corrupted prompts)",
            f"  exact patching ({N_PATCHING} prompts), loss of {row['metric']}:  "
            + "  ".join(f"{name} {score:+.2f}" for name, score in row["patching_top"]),
            f"  SAE codes ({N_CODES} prompts), permutation z:  "
            + "  ".join(f"{name} {score:.1f}" for name, score in row["codes_top"]),
            f"  agreement: rank correlation {row['rank_agreement']:.2f} over all heads; "
            f"AUC of codes for patching's top {TRUTH}: {row['codes_auc']:.2f}",
            f"  {row['seconds']} s, {row['forward_passes']} forward passes\n",
        ]
    lines += [
        f"total {figures['seconds']} s, {figures['forward_passes']} forward passes",
        "look at it in the browser: make app    run your own: wb run patching --task docstring",
    ]
    return "\n".join(lines)
