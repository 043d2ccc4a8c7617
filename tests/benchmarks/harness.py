"""How a measurement is kept: with machine and versions, under results/."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from workbench.runs import environment

RESULTS = Path(__file__).parent / "results"


def record(name: str, figures: dict[str, Any]) -> None:
    """Print, and keep under results/ with machine and versions."""
    whole = {"benchmark": name, **environment(), "machine": machine(), **figures}
    RESULTS.mkdir(exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (RESULTS / f"{name}-{device}.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(figures, indent=1))  # noqa: T201


def machine() -> dict[str, Any]:
    info: dict[str, Any] = {"system": platform.system(), "cores": torch.get_num_threads()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        info["cpu"] = models[0] if models else "unknown"
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info
