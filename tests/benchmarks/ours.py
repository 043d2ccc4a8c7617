"""Our side where a benchmark measures the disk tier and not the store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks import peers
from workbench.activations import ActivationStore, codecs
from workbench.activations.disk import Disk, NewEntry, Pass
from workbench.activations.keys import Key, Scope
from workbench.models import LanguageModel

EMBED = "hook_embed"
PER_PASS = 16  # entries of one transaction: 2,048 tokens, as one forward pass gives at one hook point
SCOPE = Scope("model", "float32-sdpa-cpu", "blocks.0.hook_resid_post", "float32", "")
HOW = Pass("model", "16x128", 2)


def _key(i: int) -> Key:
    return Key(SCOPE, hashlib.blake2b(i.to_bytes(8, "little"), digest_size=16).digest())


# ---- the disk tier itself: arrays of [entries, 128, 576] float32, keys are the entries' numbers ----


def tier_write(root: Path, arrays: np.ndarray, per_pass: int = PER_PASS) -> None:
    """Store all entries in a new tier, with checksums, a transaction for every `per_pass` of them."""
    disk = Disk(root, 10**12)
    tokens = torch.arange(arrays.shape[1])
    for start in range(0, len(arrays), per_pass):
        some = torch.from_numpy(arrays[start : start + per_pass])
        encoded = codecs.encode(some, "float32")
        keys = [_key(start + n) for n in range(len(some))]
        shape = tuple(some.shape[1:])
        entries = [NewEntry(key, pieces, shape, 0.0) for key, pieces in zip(keys, encoded.pieces, strict=True)]
        disk.write(HOW, entries, {key.sequence: tokens for key in keys})


def tier_read(root: Path, shape: tuple[int, int, int], order: Sequence[int]) -> Iterator[list[Tensor]]:
    """Open the tier and hand over the entries in a given order, in chunks, each checked against its checksum."""
    disk = Disk(root, 10**12)
    for start in range(0, len(order), peers.CHUNK):
        keys = [_key(i) for i in order[start : start + peers.CHUNK]]
        found = {key: codecs.decode(entry.raw, entry.shape, "float32") for key, entry in disk.read(keys)}
        yield [found[key] for key in keys]


# ---- the cost curve: small entries; the tier stays open between the calls on one root ----

_open: dict[Path, Disk] = {}


def small_entry(i: int) -> tuple[bytes, bytes]:
    """Key (as scattered as a digest) and 64 bytes of data of the i-th small entry."""
    return _key(i).sequence, hashlib.blake2b(i.to_bytes(8, "little"), digest_size=64).digest()


def curve_insert(root: Path, start: int, count: int) -> None:
    """Store small entries start to start + count in one write."""
    disk = _open.setdefault(root, Disk(root, 10**12)) if root not in _open else _open[root]
    tokens = torch.arange(2)
    some = [small_entry(i) for i in range(start, start + count)]
    entries = [NewEntry(Key(SCOPE, digest), (memoryview(data),), (16,), 0.0) for digest, data in some]
    disk.write(HOW, entries, {digest: tokens for digest, _ in some})


def curve_lookup(root: Path, sample: Sequence[int]) -> dict[bytes, bytes]:
    """Read small entries by number in one request: {key: data}."""
    return {key.sequence: entry.raw.numpy().tobytes() for key, entry in _open[root].read(map(_key, sample))}


# ---- through the public store, without the memory tier: keys, tiers and codec together ----


def disk_tier_write(root: Path, model: LanguageModel, sequences: Sequence[Tensor]) -> None:
    """Fill a new store at the embedding, where the model computes next to nothing."""
    ActivationStore(root, memory_bytes=0, disk_bytes=10**11).fill(model, sequences, [EMBED])


def disk_tier_read(root: Path, model: LanguageModel, sequences: Sequence[Tensor], order: Sequence[int]) -> Iterator:
    """Stored rows in a given order, in chunks, through a freshly opened store."""
    store = ActivationStore(root, memory_bytes=0, disk_bytes=10**11)
    for start in range(0, len(order), peers.CHUNK):
        yield store.get(model, [sequences[i] for i in order[start : start + peers.CHUNK]], [EMBED])[EMBED]
    assert store.stats().forward_passes == 0
