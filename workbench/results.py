"""Results on disk: a frozen dataclass of tensors and numbers becomes JSON plus safetensors, and comes back.

The class is never named in a file: it is the declared result of the analysis, so reading a run imports nothing that
the run chose. Tensors are kept in full precision and shape; everything else must be plain JSON.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints

from torch import Tensor


class Result(Protocol):
    """What an analysis returns: a frozen dataclass with its headline numbers."""

    def summary(self) -> dict[str, Any]: ...


def encode(value: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """JSON and the tensors it refers to by path."""
    if isinstance(value, Tensor):
        # A copy: two fields may share memory, which safetensors refuses.
        return {"tensor": path}, {path: value.detach().cpu().contiguous().clone()}
    if dataclasses.is_dataclass(value):
        items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif isinstance(value, dict):
        items = {str(key): item for key, item in value.items()}
    elif isinstance(value, list | tuple):
        pairs = [encode(item, f"{path}.{i}") for i, item in enumerate(value)]
        return [json for json, _ in pairs], {name: t for _, tensors in pairs for name, t in tensors.items()}
    elif value is None or isinstance(value, str | bool | int | float):
        return value, {}
    else:
        raise TypeError(f"{path or 'a result'} is a {type(value).__name__}; results hold tensors and plain values")
    encoded: dict[str, Any] = {}
    arrays: dict[str, Tensor] = {}
    for name, item in items.items():
        encoded[name], more = encode(item, f"{path}.{name}" if path else name)
        arrays |= more
    return encoded, arrays


def decode(kind: Any, value: Any, arrays: dict[str, Tensor]) -> Any:
    """The value of a declared type; the inverse of `encode`."""
    if value is None:
        return None
    if isinstance(value, dict) and value.keys() == {"tensor"}:
        return arrays[value["tensor"]]
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(k for k in get_args(kind) if k is not type(None))
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: decode(hints[name], item, arrays) for name, item in value.items()})  # type: ignore[operator]
    inner = get_args(kind)
    if get_origin(kind) is tuple:
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(decode(k, item, arrays) for k, item in zip(kinds, value, strict=True))
    if get_origin(kind) is list:
        return [decode(inner[0], item, arrays) for item in value]
    if get_origin(kind) is dict:
        return {key: decode(inner[1], item, arrays) for key, item in value.items()}
    return value
