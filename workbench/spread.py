"""Models larger than a device: spread over all GPUs, then memory, then what stays in the files and is read whenever a
pass comes to it. accelerate does the moving; a module's own hooks see the same tensors in the same order.

A part whose weights lie in files has them only while it computes. Two threads would take them from each other, so that
all who compute with such parts, or read their weights, hold the model's lock. Norms, which are small and which analyses
call by themselves, stay in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
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


def is_spread(module: nn.Module) -> bool:
    return hasattr(module, "hf_device_map")


def keep_norms(module: nn.Module) -> None:
    """Read parts that have nothing but vectors, and leave them where they compute."""
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if own and all(x.ndim == 1 for x in own) and any(x.device.type == "meta" for x in own):
            with align_module_device(part):
                found = {name: x.detach().clone() for name, x in part.named_parameters(recurse=False)}
            remove_hook_from_module(part)
            for name, x in found.items():
                setattr(part, name, nn.Parameter(x, requires_grad=False))


def main_device(module: nn.Module) -> torch.device:
    """Where a model computes: one that is spread on its first GPU, which computes too what lies elsewhere."""
    if not is_spread(module):
        return next(module.parameters()).device
    places: dict[str, Any] = module.hf_device_map  # type: ignore[assignment]
    return torch.device(next((place for place in places.values() if place not in ("cpu", "disk")), "cpu"))


def weights(part: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear part, read where they lie in files; nothing else may run the model meanwhile."""
    with align_module_device(part):
        return part.weight.data, None if getattr(part, "bias", None) is None else part.bias.data
