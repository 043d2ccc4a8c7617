"""How this machine is: what computes, what is free, what is installed, and which models were found to be right here."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import psutil
import torch

from workbench import settings


def facts() -> dict[str, str]:
    """What a job would have, in words."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(settings.home())
    found = {
        "device": settings.device(),
        "cores": f"{os.cpu_count() or 1}, of which torch uses {torch.get_num_threads()}",
        "memory": f"{memory.available / 1e9:,.1f} of {memory.total / 1e9:,.1f} GB free",
        "disk": f"{disk.free / 1e9:,.1f} of {disk.total / 1e9:,.1f} GB free",
    }
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found[f"GPU {i}"] = f"{torch.cuda.get_device_name(i)}, {free / 1e9:,.1f} of {total / 1e9:,.1f} GB free"
    packages = ("mechinterp-workbench", "torch", "transformers")
    return found | {"python": platform.python_version()} | {name: version(name) for name in packages}


@dataclass(frozen=True)
class Check:
    """A model's self-check: the largest difference of its logits to plain Hugging Face, and the relative error of the
    sum of all writes to the residual stream. `current`: with the libraries that are installed now."""

    model: str
    numerics: str
    logits: float
    residual: float
    current: bool


def checks() -> list[Check]:
    """Of every model that was loaded on this machine, by name; a model that fails is refused and has none."""
    now = {name: version(name) for name in ("torch", "transformers")}
    found = []
    for path in (settings.home() / "self-checks").glob("*.json"):
        try:
            one: dict[str, Any] = json.loads(path.read_text())
            numbers = float(one["max_logit_difference"]), float(one["residual_sum_error"])
            found.append(Check(str(one["model"]), str(one["numerics"]), *numbers, one["versions"] == now))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # loading the model writes it anew
    return sorted(found, key=lambda check: (check.model, check.numerics))
