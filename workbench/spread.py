"""Models larger than a device: spread over all GPUs, then memory, then what stays in the files and is read whenever a
pass comes to it. accelerate does the moving; a module's own hooks see the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from workbench.errors import UserError

SPREAD = "auto"  # a device
Memory = Mapping[int | str, int | str]


def options(device: str, memory: Memory | None) -> dict[str, Any]:
    """What loading needs; nothing for any other device. memory: how much each may hold, by number of a GPU or `cpu`;
    None: what is free. Raises UserError for memory that is not shared out."""
    if device == SPREAD:
        return {"device_map": "auto", "max_memory": None if memory is None else dict(memory)}
    if memory is not None:
        raise UserError(f"memory is shared out with device={SPREAD!r} alone, not with {device!r}.")
    return {}


def main_device(module: nn.Module) -> torch.device:
    """Where a model computes: one that is spread on its first GPU, which computes too what lies elsewhere."""
    places = getattr(module, "hf_device_map", None)
    if places is None:
        return next(module.parameters()).device
    return torch.device(next((place for place in places.values() if place not in ("cpu", "disk")), "cpu"))


def weights(part: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear part, read where they lie in files."""
    with align_module_device(part):
        return part.weight.data, None if getattr(part, "bias", None) is None else part.bias.data
