"""How speed is measured: as a ratio, interleaved in one process, both sides shown to do the same work."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from workbench.runs import environment

RESULTS = Path(__file__).parent / "results"


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of each side in each round, A B A B, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def record(name: str, figures: dict[str, Any]) -> None:
    """Print, and keep under results/ with machine and versions."""
    whole = {"benchmark": name, "machine": machine(), **environment(), **figures}
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
