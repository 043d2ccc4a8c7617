"""Whether `workbench.kernels` can be used: it imports triton, which torch's builds for CPUs come without."""

from __future__ import annotations

import importlib.util

from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
WIDEST = 2**15  # of a row, which is held in registers


def has_kernels(x: Tensor) -> bool:
    """For rows of this width, where this tensor is."""
    return HAS_TRITON and x.is_cuda and x.shape[-1] <= WIDEST
