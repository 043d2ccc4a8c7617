"""What the store holds, what a request would cost, and what is to be kept."""

from __future__ import annotations

import datetime
import random
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.activations import capture, codecs
from workbench.activations.capture import Clock
from workbench.activations.index import Index, token_ids
from workbench.activations.keys import Key, Scope
from workbench.errors import UserError
from workbench.models import LanguageModel


@dataclass(frozen=True)
class Estimate:
    """What a request would cost before it is made.

    Seconds come from the passes this store has timed, or, before the first one of any length, from a short matrix
    product; they leave out what is the same for every request (some tenths of a second when a model first runs).
    Memory leaves out the weights. How good both are is measured in `tests/benchmarks/test_bench_estimate.py`.
    """

    entries: int
    missing: int
    bytes: int  # on disk
    missing_bytes: int
    peak_bytes: int  # of memory, with get; stream and fill need one window or one batch
    seconds: float


@dataclass(frozen=True)
class Stats:
    """Counts since this store (or session) was opened, and what each tier holds."""

    device_hits: int
    memory_hits: int
    disk_hits: int
    computed: int
    waited_for: int  # rows that another thread or process was computing already
    forward_passes: int
    seconds_computing: float
    device_entries: int
    device_bytes: int
    device_budget: int  # 0 where there is no GPU: the tier is absent
    memory_entries: int
    memory_bytes: int
    memory_budget: int
    disk_entries: int
    disk_bytes: int
    disk_budget: int


@dataclass(frozen=True)
class Series:
    """The stored activations of one model at one hook point."""

    model_name: str
    model: str
    hook: str
    entries: int
    bytes: int
    shards: int
    used: str
    pinned: bool


@dataclass(frozen=True)
class Recheck:
    """A stored entry beside the same computed anew, alone in its batch."""

    sequence: str
    hook: str
    difference: float  # relative L2 of the whole entry
    limit: float  # float rounding in the model's dtype, and the codec's own error


@dataclass(frozen=True)
class Manifest:
    """One entry: what it is, how it was made, and which runs used it."""

    sequence: str
    tokens: list[int]
    model_name: str
    model: str
    numerics: str
    hook: str
    codec: str
    edit: str
    shape: list[int]
    error: float  # largest relative L2 error of a row
    batch: str  # shape of the pass that computed it
    threads: int
    software: str
    created: str
    file: str
    offset: int
    nbytes: int
    runs: list[str]


def estimate(
    model: LanguageModel,
    codec: str,
    tokens: Mapping[bytes, Tensor],
    sequences: Sequence[bytes],
    wanted: Sequence[Key],
    missing: Sequence[Key],
    clock: Clock,
    alone: bool,
    room: int,
) -> Estimate:
    """The cost of having all that is wanted when some is missing and the memory tier has room for some bytes."""
    c = model.config
    hooks = list(dict.fromkeys(key.scope.hook for key in wanted))
    absent: dict[bytes, list[str]] = {}
    for key in missing:
        absent.setdefault(key.sequence, []).append(key.scope.hook)
    lengths = {digest: len(tokens[digest]) for digest in tokens}
    flops = sum(capture.flops(c, lengths[digest], capture.layers(some)) for digest, some in absent.items())
    passes = capture.plan(model, lengths, absent, alone)
    captured = [len(p.sequences) * capture.captured_bytes(c, lengths[p.sequences[0]], p.hooks) for p in passes]
    working = [capture.working_bytes(c, len(p.sequences) * lengths[p.sequences[0]]) for p in passes]
    # What is returned are views of what was captured, unless it had to be decoded or lies on a GPU.
    beside = 0 if codec == "float32" and model.device.type == "cpu" else 2 * max(captured, default=0)
    returned = sum(capture.captured_bytes(c, lengths[digest], hooks) for digest in sequences)
    sizes: dict[tuple[str, int], int] = {}
    for hook in hooks:
        for length in set(lengths.values()):
            sizes[hook, length] = codecs.size(capture.shape_at(hook, c, length), codec)
    return Estimate(
        entries=len(wanted),
        missing=len(missing),
        bytes=sum(sizes[key.scope.hook, lengths[key.sequence]] for key in wanted),
        missing_bytes=sum(sizes[key.scope.hook, lengths[key.sequence]] for key in missing),
        peak_bytes=returned + min(returned, room) + beside + max(working, default=0),
        seconds=flops / clock.speed(model) if flops else 0.0,
    )


def series(index: Index) -> list[Series]:
    """What is stored, by model and hook point, largest first."""
    with index.guard():
        pinned = index.pinned_shards()
        found: dict[tuple[str, str], list[tuple[int, int, int, float]]] = {}
        for id, model, hook, nbytes, entries, used in index.db().execute(
            "SELECT id, model, hook, bytes, entries, used FROM shards"
        ):
            found.setdefault((model, hook), []).append((id, nbytes, entries, used))
        names = dict(index.db().execute("SELECT fingerprint, name FROM models"))
        rows = [
            Series(
                model_name=names.get(model, ""),
                model=model,
                hook=hook,
                entries=sum(entries for _, _, entries, _ in some),
                bytes=sum(nbytes for _, nbytes, _, _ in some),
                shards=len(some),
                used=_time(max(used for *_, used in some)),
                pinned=all(id in pinned for id, *_ in some),
            )
            for (model, hook), some in found.items()
        ]
    return sorted(rows, key=lambda row: (-row.bytes, row.hook))


def manifests(index: Index, *, sequence: str = "", hook: str = "", run: str = "", limit: int = 100) -> list[Manifest]:
    """Entries by the first letters of a sequence's digest, by hook point, or by a run that used them.

    Raises UserError when nothing matches, or when the digest is not hexadecimal.
    """
    if sequence.strip("0123456789abcdef"):
        raise UserError(f"{sequence!r} is not the beginning of a sequence's digest; it has letters other than 0-9 a-f.")
    # A range of the unique index, so that looking up one sequence reads one row.
    low = bytes.fromhex((sequence + "0" * 32)[:32])
    high = bytes.fromhex((sequence + "f" * 32)[:32])
    query = """SELECT hex(digest) AS sequence, tokens, models.name AS model_name, model, numerics, hook, codec, edit,
        shape, error, batch, threads, software, created, file, offset, nbytes, sequences.id AS s, scopes.id AS c
        FROM sequences JOIN entries ON entries.sequence = sequences.id JOIN scopes ON scope = scopes.id
        JOIN passes ON pass = passes.id JOIN models ON model = fingerprint
        JOIN (SELECT id AS shard_id, file FROM shards) ON shard = shard_id
        WHERE digest BETWEEN :low AND :high AND :hook IN ('', hook) AND (:run = '' OR EXISTS (
            SELECT 1 FROM uses JOIN runs ON runs.id = uses.run
            WHERE runs.name = :run AND uses.sequence = sequences.id AND uses.scope = scopes.id))
        LIMIT :limit"""
    with index.guard():
        cursor = index.db().execute(query, {"low": low, "high": high, "hook": hook, "run": run, "limit": limit})
        names = [column for column, *_ in cursor.description]
        found = [_manifest(index, dict(zip(names, row, strict=True))) for row in cursor.fetchall()]
    if not found:
        what = " ".join(f"{k} {v!r}" for k, v in (("sequence", sequence), ("hook", hook), ("run", run)) if v)
        if not what:
            raise UserError("nothing is stored yet; what a run reads of a model is, as it runs.")
        raise UserError(f"nothing is stored for {what}; `wb store show` lists what is.")
    return found


def draw(index: Index, model: LanguageModel, n: int, seed: int) -> list[tuple[Key, Tensor]]:
    """n entries of a model that can be computed anew, with their tokens.

    Raises UserError when there are none.
    """
    some = """FROM entries JOIN sequences ON sequence = sequences.id JOIN scopes ON scope = scopes.id
        WHERE model = ? AND numerics = ? AND edit = ''"""
    which = (model.fingerprint, model.numerics)
    with index.guard():
        (count,) = index.db().execute(f"SELECT count(*) {some}", which).fetchone()
        places = random.Random(seed).sample(range(count), min(n, count))
        query = f"SELECT digest, tokens, model, numerics, hook, codec, edit {some} LIMIT 1 OFFSET ?"
        rows = [row for place in places for row in index.db().execute(query, (*which, place)).fetchall()]
    if not rows:
        raise UserError(f"nothing of {model.name} in {model.numerics} is stored that could be computed anew.")
    return [(Key(Scope(*scope), digest), token_ids(tokens)) for digest, tokens, *scope in rows]


def _manifest(index: Index, row: dict[str, Any]) -> Manifest:
    query = "SELECT name FROM uses JOIN runs ON runs.id = run WHERE sequence = ? AND scope = ? ORDER BY name"
    runs = index.db().execute(query, (row.pop("s"), row.pop("c")))
    row |= {
        "sequence": row["sequence"].lower(),
        "tokens": token_ids(row["tokens"]).tolist(),
        "shape": [int(n) for n in row["shape"].split(",")],
        "created": _time(row["created"]),
        "runs": [run for (run,) in runs],
    }
    return Manifest(**row)


class Pins:
    """What may not be evicted, by model, hook point or run.

    Kept in the index, so that every process honours a pin on disk at once; in its own memory, when it opens the store.
    """

    def __init__(self, index: Index):
        self._index = index
        self._rules: list[tuple[str, str, str]] = []
        self._reload()

    def covers(self, key: Key) -> bool:
        """Whether a row in memory is pinned by its model or hook point."""
        return any(
            not run and model in ("", key.scope.model) and hook in ("", key.scope.hook)
            for model, hook, run in self._rules
        )

    def add(self, model: str, hook: str, run: str) -> None:
        """Raises UserError for a pin of everything, or of a run together with something else."""
        if run and (model or hook):
            raise UserError(f"a pin names a run, or a model and a hook point, not both: {run!r} and {model or hook!r}.")
        if not (model or hook or run):
            raise UserError("a pin of everything would leave no room; name a model, a hook point or a run.")
        with self._index.guard():
            known = [name for (name,) in self._index.db().execute("SELECT name FROM runs")]
            if run and run not in known:
                raise UserError(f"no run called {run!r} has used this store; see `wb runs`.")
            self._index.pin(model, hook, run)
        self._reload()

    def remove(self, model: str, hook: str, run: str) -> None:
        with self._index.guard():
            if not self._index.unpin(model, hook, run):
                raise UserError(f"there is no such pin; there are: {self.rules() or 'none'}.")
        self._reload()

    def rules(self) -> list[dict[str, str]]:
        return [dict(zip(("model", "hook", "run"), rule, strict=True)) for rule in self._rules]

    def _reload(self) -> None:
        with self._index.guard():
            self._rules = self._index.pins()


def pack_used(used: Mapping[Scope, Iterable[bytes]]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Which entries a run used, for its folder: groups of scopes that share their sequences, and those sequences'
    digests as bytes [sequence, 16]."""
    groups: dict[tuple[bytes, ...], list[Scope]] = {}
    for scope, digests in used.items():
        groups.setdefault(tuple(sorted(digests)), []).append(scope)
    json, arrays = [], {}
    for n, (digests, scopes) in enumerate(sorted(groups.items(), key=lambda group: group[1][0])):
        json.append({"scopes": [scope._asdict() for scope in scopes], "sequences": f"sequences.{n}"})
        arrays[f"sequences.{n}"] = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).reshape(-1, 16)
    return json, arrays


def unpack_used(json: Iterable[Mapping[str, Any]], arrays: Mapping[str, Tensor]) -> dict[Scope, set[bytes]]:
    """The inverse of `pack_used`."""
    used: dict[Scope, set[bytes]] = {}
    for group in json:
        digests = {row.numpy().tobytes() for row in arrays[group["sequences"]]}
        used |= {Scope(**scope): digests for scope in group["scopes"]}
    return used


def _time(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError, TypeError) as error:
        raise sqlite3.DatabaseError(f"{seconds!r} is no time") from error
