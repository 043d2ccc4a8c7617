"""How a measurement is made and kept.

`interleave` times the sides of a comparison in turn (A B C, A B C, ...) after a warm-up in which each side's value is
checked. `ratio` divides round by round and then takes the median, so that a busy neighbour falls on both sides.
`peak_growth` and `fresh_process` measure memory. `record` keeps the figures, with machine, versions and date, under
results/. BENCH_QUICK=1 tries a benchmark out: small sizes, one round, nothing kept.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from workbench.runs import environment

RESULTS = Path(__file__).parent / "results"
QUICK = bool(os.environ.get("BENCH_QUICK"))
ROUNDS = 1 if QUICK else 5
THREADS = 2
T = TypeVar("T")


class Side(NamedTuple):
    """One side of a comparison: `run` is timed and gets what `setup` made; `done` clears up, and neither is timed."""

    run: Callable[[Any], Any]
    setup: Callable[[], Any] = lambda: None
    done: Callable[[Any], None] = lambda _: None


Sides = Mapping[str, Side | Callable[[], Any]]
Check = Callable[[str, Any], None]
Timings = dict[str, dict[str, dict[str, Any]]]


def size(full: T, quick: T) -> T:
    return quick if QUICK else full


def interleave(sides: Sides, rounds: int = ROUNDS, check: Check | None = None) -> Timings:
    """Seconds of each side, {side: {"wall" or "cpu": {"median", "q1", "q3", "rounds"}}}; CPU is of all threads.

    check  called with each side's name and value in the warm-up
    """
    each = {name: side if isinstance(side, Side) else Side(lambda _, run=side: run()) for name, side in sides.items()}
    wall: dict[str, list[float]] = {name: [] for name in each}
    cpu: dict[str, list[float]] = {name: [] for name in each}
    for number in range(rounds + 1):
        for name, side in each.items():
            given = side.setup()
            gc.collect()
            cpu_before, before = time.process_time(), time.perf_counter()
            value = side.run(given)
            after, cpu_after = time.perf_counter(), time.process_time()
            if number == 0:
                if check is not None:
                    check(name, value)
            else:
                wall[name].append(after - before)
                cpu[name].append(cpu_after - cpu_before)
            del value
            side.done(given)
    return {name: {"wall": quartiles(wall[name]), "cpu": quartiles(cpu[name])} for name in each}


def quartiles(values: Sequence[float]) -> dict[str, Any]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": _short(median), "q1": _short(q1), "q3": _short(q3), "rounds": [_short(v) for v in values]}


def ratio(
    timings: Timings, above: str, below: str, *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, Any]:
    """How many times as long `above` takes as `below`: median and quartiles of the rounds' ratios, and the goal."""
    found: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        rounds = zip(timings[above][clock]["rounds"], timings[below][clock]["rounds"], strict=True)
        each = quartiles([a / b if b else float("inf") for a, b in rounds])
        found |= {clock: each["median"], f"{clock}_quartiles": [each["q1"], each["q3"]]}
    verdict = judge(found["wall"], at_most=at_most, at_least=at_least)
    if "met" in verdict:
        verdict["met_cpu"] = judge(found["cpu"], at_most=at_most, at_least=at_least)["met"]
    return found | {name: value for name, value in verdict.items() if name != "value"}


def judge(value: float, *, at_most: float | None = None, at_least: float | None = None) -> dict[str, Any]:
    """A figure beside its goal."""
    if at_most is not None:
        return {"value": value, "goal": f"<= {at_most:g}", "met": value <= at_most}
    if at_least is not None:
        return {"value": value, "goal": f">= {at_least:g}", "met": value >= at_least}
    return {"value": value}


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Both sides computed the same thing: to 1e-3 of the expected norm, in the same shape."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    difference = float((found.detach() - expected).norm() / expected.norm())
    assert difference < 1e-3, f"the values differ by {difference:.2g} of their norm"


# ---- memory and files ----


@contextmanager
def peak_growth() -> Iterator[dict[str, float]]:
    """MB by which resident memory rose above its start inside the block, at its highest: {"mb": ...} after the block.

    The kernel's own high-water mark, set back first. Not ru_maxrss: it cannot be set back, and a child process starts
    with its parent's. Where the mark cannot be set back, a thread polls.
    """
    gc.collect()
    found = {"mb": 0.0}
    exact = True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        exact = False
    before = memory_mb("VmRSS")
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(0.001):
            found["mb"] = max(found["mb"], memory_mb("VmRSS") - before)

    thread = threading.Thread(target=poll, daemon=True)
    if not exact:
        thread.start()
    try:
        yield found
    finally:
        stop.set()
        if exact:
            found["mb"] = memory_mb("VmHWM") - before
        else:
            thread.join()
        found["mb"] = round(found["mb"], 1)


def memory_mb(field: str = "VmRSS") -> float:
    """A line of /proc/self/status, in MB (10^6 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(field)


def fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of an importable module in a new interpreter, so that memory starts from nothing."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def drop_cache(folder: Path) -> None:
    """Put every file's pages on the disk and out of the page cache. Pages that are still mapped stay."""
    gc.collect()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            with suppress(AttributeError):  # only Linux has it
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


# ---- keeping ----


def record(name: str, figures: dict[str, Any], peers: Sequence[str] = ()) -> None:
    """Print (all but the "seconds"), and keep under results/ with date, machine and versions, also of the peers."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    whole = {"benchmark": name, "date": now, **environment(), "machine": machine(), **figures}
    whole["versions"] = whole["versions"] | {peer: _version(peer) for peer in peers}
    if not QUICK:
        RESULTS.mkdir(exist_ok=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        (RESULTS / f"{name}-{device}.json").write_text(json.dumps(whole, indent=1) + "\n")
    short = {key: value for key, value in figures.items() if key != "seconds"}
    print(json.dumps(short, indent=1))  # noqa: T201


def machine() -> dict[str, Any]:
    info: dict[str, Any] = {"system": platform.system(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        info["cpu"] = models[0] if models else "unknown"
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _short(value: float) -> float:
    return float(f"{value:.4g}")
