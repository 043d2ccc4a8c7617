"""The few settings of a machine, each from one environment variable. Nothing is read on import.

WORKBENCH_HOME          where models, activations and runs are kept (default ~/.mechinterp-workbench)
WORKBENCH_DEVICE        torch device of the model (default cpu: a GPU is used when asked for)
WORKBENCH_STORE_DEVICE  bytes of the activation store's tier on a GPU (default 1 GB)
WORKBENCH_STORE_MEMORY  bytes of its tier in host memory (default 1 GB)
WORKBENCH_STORE_DISK    bytes of its disk tier (default 20 GB)
WORKBENCH_JOBS          how many jobs compute at once (default 1); the others wait
WORKBENCH_ACCEPT_TERMS  comma-separated models whose terms of use are accepted
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from workbench.errors import UserError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def home() -> Path:
    path = Path(os.environ.get("WORKBENCH_HOME") or "~/.mechinterp-workbench").expanduser().resolve()
    writable_folder(path)
    return path


def writable_folder(path: Path) -> None:
    """Create a folder, or say in one sentence why it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # without a name where the system can: a kill leaves nothing behind
    except OSError as error:
        raise UserError(
            f"{path} cannot be written to ({error.strerror}); set WORKBENCH_HOME to a folder that can."
        ) from error


def device() -> str:
    return os.environ.get("WORKBENCH_DEVICE") or "cpu"


def accepted_terms() -> set[str]:
    return {name.strip() for name in os.environ.get("WORKBENCH_ACCEPT_TERMS", "").split(",") if name.strip()}


def jobs() -> int:
    text = os.environ.get("WORKBENCH_JOBS") or "1"
    if not text.isdigit() or not int(text):
        raise UserError(f"WORKBENCH_JOBS={text!r} is no number of jobs; give a whole number from 1.")
    return int(text)


def store_device() -> int:
    return _bytes("WORKBENCH_STORE_DEVICE", "1G")


def store_memory() -> int:
    return _bytes("WORKBENCH_STORE_MEMORY", "1G")


def store_disk() -> int:
    return _bytes("WORKBENCH_STORE_DISK", "20G")


def _bytes(variable: str, default: str) -> int:
    text = os.environ.get(variable) or default
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if not match:
        raise UserError(f"{variable}={text!r} is not a size; write bytes or a number with K, M, G or T, e.g. 20G.")
    return int(float(match[1]) * _UNITS[match[2]])
