"""The set of planted models that methods of discovery are scored on.

Mean ROC AUC over the heads and MLPs of a model, 24 prompts each: exact patching 0.993 (0.94 where movers are redundant,
else 1), attribution patching 0.91 (0.84 where saturated, else 0.98), with gradients integrated over 5 steps from
corrupted to clean embeddings 0.96 (0.92, 0.995), norm of the mean difference of what a node writes 0.49, random 0.52.
"""

from __future__ import annotations

import random
from typing import Any

from circuits.planted.planting import CHOICES, SOURCES


def variants(n: int = 36, seed: int = 0) -> list[dict[str, Any]]:
    """Arguments of `plant` for n models: all circuits in turn, with every option, and up to 12 layers of 12 heads.

    Every second one is saturated, every tenth has redundant movers. Seeds start at 1000 for the set of seed 0, which
    is `SUITE`, at 2000 for that of seed 1, and so on: tune a method on another set than it is reported on.
    """
    circuits = [*SOURCES, "copy+copy", "induction+copy", "copy+pointer", "pointer+induction", "inhibition+copy"]
    sizes = [(4, 6), (5, 8), (6, 8), (8, 6), (4, 12), (6, 12)]
    found = []
    for i in range(n):
        rng = random.Random(f"planted/variants/{seed}/{i}")
        layers, heads = (12, 12) if i % 17 == 16 else sizes[(i + i // len(sizes)) % len(sizes)]
        saturated, redundant = i % 2 == 1, i % 10 == 4
        lookup = rng.choice(CHOICES["lookup"])
        found.append(
            {
                "seed": 1000 * (seed + 1) + i,
                "n_layers": layers,
                "n_heads": heads,
                "circuit": circuits[i % len(circuits)],
                "gate": rng.choice(CHOICES["gate"]),
                "lookup": lookup,
                "hops": rng.randint(0, min(2, layers - 4)),
                "width": rng.choice((1, 1, 2)),
                "movers": 1 if redundant else rng.choice((1, 2, 3)),
                "negative": 0 if redundant or (saturated and lookup == "after") else rng.choice((0, 1, 1)),
                "redundant": redundant,
                "saturated": saturated,
                "loud": rng.choice((0.5, 1.0, 1.0, 3.0)),
                "fillers": CHOICES["fillers"][i // 2 % 3],
                "n_values": rng.choice((3, 4, 5)),
            }
        )
    return found


SUITE = tuple(variants())
