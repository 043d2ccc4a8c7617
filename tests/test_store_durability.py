"""Hard laws of the activation store: what a kill, a race, a damaged bit, a full disk or a fork may not do."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from workbench.activations import ActivationStore, codecs
from workbench.activations.disk import Disk, NewEntry, Pass
from workbench.activations.keys import Key, Scope, sequence_digest
from workbench.errors import UserError
from workbench.interventions import Intervention, mean, steer, zero
from workbench.models import LanguageModel
from workbench.sites import Site, block

Z, OUT, FIRST = block(1, "attn.hook_z"), block(2, "hook_resid_post"), block(0, "hook_resid_post")
HOOKS = [Z, OUT, FIRST]
HANG = 60  # seconds; only what never ends takes as long
INSTANTS = [pytest.param(10, id="10"), pytest.param(200, id="200", marks=pytest.mark.slow)]
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 6e-4, "int8": 1.3e-2}  # relative L2 of a row


def sequences(n: int = 12, seed: int = 0, vocab: int = 500, shortest: int = 5) -> list[torch.Tensor]:
    """Unequal lengths, so that batches are bucketed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (shortest + i % 4,), generator=generator) for i in range(n)]


def alone(
    model: LanguageModel, rows: Sequence[torch.Tensor], hooks: Sequence[str], edit: Mapping[Any, Any] | None = None
) -> dict[str, list[torch.Tensor]]:
    """The truth: each sequence by itself."""
    runs = [model.run(row[None], capture=hooks, edit=edit, logits="none") for row in rows]
    return {hook: [run[hook][0] for run in runs] for hook in hooks}


def near(a: torch.Tensor, b: torch.Tensor, codec: str = "float32") -> bool:
    if a.shape != b.shape:
        return False
    if codec == "float32":
        return torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)).max()) <= BOUNDS[codec]


def wrong(found: Mapping[str, Sequence[torch.Tensor]], expected: Mapping[str, Sequence[torch.Tensor]]) -> list[str]:
    """Which rows are not what they should be."""
    pairs = [
        (f"{hook}[{i}]", a, b)
        for hook in found
        for i, (a, b) in enumerate(zip(found[hook], expected[hook], strict=True))
    ]
    return [name for name, a, b in pairs if not near(a, b)]


def table(root: Path, query: str) -> list[Any]:
    """What the index says, without a store."""
    db = sqlite3.connect(root / "index.sqlite", timeout=HANG)
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


def files(root: Path, pattern: str = "*.rows") -> dict[str, int]:
    """Names and sizes."""
    return {path.name: path.stat().st_size for path in root.glob(pattern)}


def strays(root: Path) -> list[str]:
    """Files that are no part of a store."""
    return [name for name in files(root, "*") if not name.startswith("index.sqlite") and not name.endswith(".rows")]


# ---- real processes ----

_fork = multiprocessing.get_context("fork")


class Hang(BaseException):
    """Out of reach of `except Exception`."""


@contextmanager
def deadline(seconds: float = HANG) -> Iterator[None]:
    """A call that never ends fails instead. In the main thread of a process."""

    def stop(*_: object) -> None:
        raise Hang(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Child:
    """A forked process; what its work returns, or how it failed, comes back through a pipe."""

    def __init__(self, work: Callable[..., Any], *args: Any):
        self._mine, theirs = _fork.Pipe(duplex=False)
        self._process = _fork.Process(target=_work, args=(theirs, work, args))
        self._process.start()
        theirs.close()

    def result(self, seconds: float = 2 * HANG) -> Any:
        ready = wait([self._mine, self._process.sentinel], seconds)
        if not ready:
            os.kill(self._process.pid, signal.SIGUSR1)  # it says where it stands
            time.sleep(0.5)
            self.kill()
            pytest.fail(f"a process did not end within {seconds} seconds")
        fine, value = self._mine.recv() if self._mine.poll() else (False, f"exit {self._process.exitcode}")
        self._process.join(HANG)
        assert fine, value
        return value

    def kill(self) -> None:
        self._process.kill()
        self._process.join()  # by its id: its own children may hold its pipes open


def _work(pipe: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    try:
        result = (True, work(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    pipe.send(result)
    pipe.close()


def ended(thread: threading.Thread) -> None:
    """Joined, and gone from the system too: a thread that ends holds MKL's lock for a moment, and a child forked then
    waits for ever in its first product (so with torch alone, after five forks)."""
    thread.join(HANG)
    assert not thread.is_alive(), "waits for ever"
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        time.sleep(0.001)


def at_once(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run them in one process each, begun together."""
    gate = _fork.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        gate.wait(HANG)
        return work()

    return [child.result() for child in [Child(begin, work) for work in works]]


@contextmanager
def paused(model: LanguageModel, reached: Any, go_on: Any) -> Iterator[None]:
    """The model stops inside its forward pass: sets one event and waits for the other."""

    def stop(*_: object) -> None:
        reached.set()
        go_on.wait(HANG)

    hook = model._module.register_forward_pre_hook(stop)
    base = model._module.base_model.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()
        base.remove()


# ---- 1. kills ----


def group(n: int) -> list[torch.Tensor]:
    """Six sequences of two lengths: two batches."""
    generator = torch.Generator().manual_seed(1000 + n)
    return [torch.randint(500, (4 + i % 2,), generator=generator) for i in range(6)]


def batches(n: int) -> list[torch.Tensor]:
    """The same as two forward passes."""
    return [torch.stack(group(n)[i::2]) for i in range(2)]


@pytest.mark.parametrize("kills", INSTANTS)
def test_a_kill_at_any_instant_loses_at_most_the_batch_in_flight(
    kills: int, tiny: LanguageModel, tmp_path: Path
) -> None:
    """What was stored stays and is right, batches are whole or absent, and the next process carries on."""
    root, rng = tmp_path / "s", random.Random(0)
    done = _fork.RawValue("i", 0)  # groups that a call has finished

    def write() -> None:
        store = ActivationStore(root, memory_bytes=0)
        while True:
            if done.value % 2:
                store.fill(tiny, group(done.value), [Z, OUT])
            else:
                store.get(tiny, group(done.value), [Z, OUT])
            done.value += 1

    for kill in range(kills):
        before, started = done.value, time.monotonic()
        child = Child(write)
        if kill % 2:  # no claim of the dead blocks the living
            while done.value == before:
                assert time.monotonic() - started < HANG, "the next process does not carry on"
                time.sleep(0.001)
        time.sleep(rng.random() * 0.15)
        child.kill()
        store = ActivationStore(root, memory_bytes=0)
        if kill < 10 or kill % 40 == 39:  # reading everything takes ever longer
            assert store.verify() == []
        for n in range(max(0, before - 1), done.value + 1):
            for batch in batches(n):
                missing = store.estimate(tiny, batch, [Z, OUT]).missing
                assert missing == 0 if n < done.value else missing in (0, 2 * len(batch))
        assert len(files(root, "*.owner")) <= 1  # of the dead, until it is found dead
        del store

    def finish() -> tuple[int, list[str]]:
        store = ActivationStore(root, memory_bytes=0)
        bad = []
        for n in range(done.value + 1):
            for batch in batches(n):
                anew = tiny.run(batch, capture=[Z, OUT], logits="none")
                bad += wrong(store.get(tiny, batch, [Z, OUT]), {hook: list(anew[hook]) for hook in (Z, OUT)})
        computed = store.stats().computed
        store.get(tiny, group(10**6), [Z, OUT])  # both series are taken up again
        return computed, bad

    computed, bad = Child(finish).result(20 * HANG)
    assert bad == [] and computed <= 2 * 6
    assert files(root) == dict(table(root, "SELECT file, bytes FROM shards"))  # tails of the dead are cut off
    assert len(files(root)) == 2


def content(n: int) -> bytes:
    return np.random.default_rng(n).bytes(256 + 4 * (n % 50))


def known(n: int, hook: str) -> tuple[Key, torch.Tensor]:
    """An entry whose content follows from its number; with it, the token ids."""
    tokens = torch.tensor([n])
    return Key(Scope("m", "n", hook, "float32", ""), sequence_digest(tokens.numpy().tobytes())), tokens


def store_known(disk: Disk, batch: int) -> None:
    entries, tokens = [], {}
    for n in range(4 * batch, 4 * batch + 4):
        for hook in ("a", "b", "c"):
            key, ids = known(n, hook)
            data = content(n)
            entries.append(NewEntry(key, (memoryview(data),), (len(data) // 4,), 0.0))
            tokens[key.sequence] = ids
    disk.write(Pass("m", "4x1", 1), entries, tokens)


def read_known(disk: Disk, batches: range) -> Counter[int]:
    """How many entries of each batch there are; all must be as they were written."""
    numbers = range(4 * batches.start, 4 * batches.stop)
    which = {known(n, hook)[0]: n for n in numbers for hook in ("a", "b", "c")}
    found: Counter[int] = Counter()
    for key, entry in disk.read(which):
        assert entry.raw.numpy().tobytes() == content(which[key])
        found[which[key] // 4] += 1
    return found


@pytest.mark.parametrize("evicting", [False, True], ids=["growing", "evicting"])
@pytest.mark.parametrize("kills", INSTANTS)
def test_a_killed_writer_of_the_disk_tier_leaves_whole_batches(kills: int, evicting: bool, tmp_path: Path) -> None:
    """Nothing is torn, nothing is lost, and nothing lies about, though shards come and go."""
    root, rng = tmp_path / "s", random.Random(1)
    done = _fork.RawValue("i", 0)

    def write() -> None:
        disk = Disk(root, 10**9)
        while True:
            store_known(disk, done.value)
            done.value += 1
            if evicting and done.value % 7 == 0:
                disk.evict(hook=random.choice("abc"), keep_bytes=0)

    for kill in range(kills):
        before = done.value
        child = Child(write)
        time.sleep(rng.random() * 0.12)
        child.kill()
        disk = Disk(root, 10**9)
        assert files(root).keys() <= {file for (file,) in table(root, "SELECT file FROM shards")}  # no leftovers
        everything = kill < 10 or kill % 40 == 39  # it takes ever longer
        first = 0 if everything else max(0, before - 1)
        assert not everything or list(disk.verify()) == []
        found = read_known(disk, range(first, done.value + 1))
        if evicting:
            assert set(found.values()) <= {4, 8, 12}
        else:
            assert all(found[n] == 12 for n in range(first, done.value)) and found[done.value] in (0, 12)
        del disk
    disk = Disk(root, 10**9)
    store_known(disk, 10**6)
    assert files(root) == dict(table(root, "SELECT file, bytes FROM shards WHERE entries"))
    assert len(files(root)) == 3
    assert len(table(root, "SELECT 1 FROM shards")) == 3, "shards without a file or an entry"


@pytest.mark.parametrize("kills", INSTANTS)
def test_processes_killed_while_they_open_a_store_leave_no_files(kills: int, tmp_path: Path) -> None:
    """Neither lock files, named or not yet, nor what the folder was probed with."""
    root, rng = tmp_path / "s", random.Random(3)
    Disk(root, 10**9)

    def work() -> None:
        while True:
            disk, some = Disk(root, 10**9), [os.urandom(16)]
            disk.claim(some)
            disk.release(some)

    for _ in range(5 * kills):
        child = Child(work)
        time.sleep(0.01 + rng.random() * 0.02)
        child.kill()
    Disk(root, 10**9)
    assert strays(root) == [] and table(root, "SELECT * FROM claims") == []


@pytest.mark.parametrize("times", [pytest.param(30, id="30"), pytest.param(1000, id="1000", marks=pytest.mark.slow)])
def test_an_interrupt_at_any_instant_damages_and_blocks_nothing(
    times: int, tiny: LanguageModel, tmp_path: Path
) -> None:
    """Ctrl-C in a notebook: the process lives on with the same model and the same store."""
    root, edit = tmp_path / "s", {FIRST: zero()}

    def truth(n: int, edit: Mapping[Any, Any] | None) -> dict[str, list[torch.Tensor]]:
        runs = [tiny.run(batch, capture=[Z, OUT], edit=edit, logits="none") for batch in batches(n)]
        return {hook: [runs[i % 2][hook][i // 2] for i in range(6)] for hook in (Z, OUT)}

    def work() -> dict[str, Any]:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        rng, found = random.Random(2), {}
        expected = [(truth(n, None), truth(n, edit)) for n in range(times + 10)]
        store = ActivationStore(root, memory_bytes=0)
        signal.signal(signal.SIGALRM, interrupt)
        for n in range(times):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.002 + rng.random() * 0.02)
                for batch in range(n, n + 10):
                    store.get(tiny, group(batch), [Z, OUT], edit=edit)
                    store.get(tiny, group(batch), [Z, OUT])
            except KeyboardInterrupt:
                pass
            except Exception as error:  # an interrupted pass has left something in the model
                found["error"] = traceback.format_exc() + str(error)
                break
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        found["damage"] = store.verify()
        bad = []
        try:
            with deadline(20 + times / 10):
                for n in range(times + 10):
                    bad += wrong(store.get(tiny, group(n), [Z, OUT]), expected[n][0])
                    bad += wrong(store.get(tiny, group(n), [Z, OUT], edit=edit), expected[n][1])
        except Hang as error:
            found["blocked"] = f"the store waits for itself: {error}"
        found["wrong"], found["claims"] = bad, len(table(root, "SELECT * FROM claims"))
        return found

    assert Child(work).result() == {"damage": [], "wrong": [], "claims": 0}


@pytest.mark.parametrize("times", [pytest.param(300, id="300"), pytest.param(5000, id="5000", marks=pytest.mark.slow)])
def test_an_interrupted_write_takes_nothing_back_that_was_committed(times: int, tmp_path: Path) -> None:
    """Least of all when the signal comes during the commit itself."""

    def work() -> list[str]:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        rng, disk = random.Random(4), Disk(tmp_path / "s", 10**9)
        store_known(disk, 0)
        signal.signal(signal.SIGALRM, interrupt)
        batch = 1
        for _ in range(times):
            with suppress(KeyboardInterrupt):
                # and once a second from then on: where Python may not raise, as in a destructor, the first one is lost
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + rng.random() * 0.006, 1.0)
                while True:
                    batch += 1  # before, so that none is written twice
                    store_known(disk, batch)
        signal.setitimer(signal.ITIMER_REAL, 0)
        damage = list(disk.verify())
        if set(read_known(disk, range(batch + 1)).values()) != {12}:
            damage.append("half a batch")
        return damage

    assert Child(work).result() == []


# ---- 2. races ----


def compete(
    root: Path, model: LanguageModel, rows: Sequence[torch.Tensor], expected: Mapping[str, Sequence[torch.Tensor]],
    seed: int, seconds: float, kind: str,
) -> tuple[list[str], dict[tuple[str, int], set[bytes]], int]:  # fmt: skip
    """One process: overlapping requests until time is up. Returns wrong rows, the bits seen, and the requests made."""
    rng = random.Random(seed)
    store = ActivationStore(root, memory_bytes=rng.choice([0, 20_000]))
    bad: list[str] = []
    bits: dict[tuple[str, int], set[bytes]] = {}
    count = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until or not count:
        some = [rng.randrange(len(rows)) for _ in range(rng.randint(1, 16))]
        hooks = rng.sample(HOOKS, rng.randint(1, 3))
        count += 1
        if kind == "evict":
            store.evict(hook=rng.choice([None, *HOOKS]), keep_bytes=rng.choice([0, 10_000, 50_000]))
            time.sleep(0.02)
            continue
        if kind == "write" and rng.random() < 0.5:
            store.fill(model, [rows[i] for i in some], hooks)
            continue
        found = store.get(model, [rows[i] for i in some], hooks)
        for hook in hooks:
            for i, row in zip(some, found[hook], strict=True):
                if not near(row, expected[hook][i]):
                    bad.append(f"{kind} {hook}[{i}]")
                bits.setdefault((hook, i), set()).add(row.numpy().tobytes())
    return bad, bits, count


@pytest.mark.parametrize("seconds", [pytest.param(2, id="short"), pytest.param(30, id="long", marks=pytest.mark.slow)])
@pytest.mark.parametrize("evicting", [False, True], ids=["kept", "evicted"])
def test_readers_and_writers_at_once_see_one_true_value(
    evicting: bool, seconds: float, tiny: LanguageModel, tmp_path: Path
) -> None:
    """Eight processes on one new store, and perhaps a ninth that evicts: no failure, no wrong row, and the same bits
    for everybody as long as nothing is evicted."""
    root, rows = tmp_path / "s", sequences(120)
    expected = alone(tiny, rows, HOOKS)
    kinds = ["write"] * 4 + ["read"] * 4 + ["evict"] * evicting

    def work(seed: int, kind: str) -> Callable[[], Any]:
        return lambda: compete(root, tiny, rows, expected, seed, seconds, kind)

    results = at_once([work(seed, kind) for seed, kind in enumerate(kinds)])
    assert [name for bad, _, _ in results for name in bad] == []
    bits: dict[tuple[str, int], set[bytes]] = {}
    for _, seen, _ in results:
        for key, values in seen.items():
            bits.setdefault(key, set()).update(values)
    assert len(bits) > 100
    if not evicting:
        assert [key for key, values in bits.items() if len(values) > 1] == []
    store = ActivationStore(root)
    assert store.verify() == [] and table(root, "SELECT * FROM claims") == []
    assert wrong(store.get(tiny, rows, HOOKS), expected) == []
    assert len(files(root)) <= len(HOOKS) * 8


def test_the_same_request_in_four_processes_is_computed_once(tiny: LanguageModel, tmp_path: Path) -> None:
    """They share the work, and each gets the same bits."""
    root, rows = tmp_path / "s", sequences(300)

    def work() -> tuple[int, int, list[bytes]]:
        store = ActivationStore(root)
        found = store.get(tiny, rows, [Z, OUT])
        stats = store.stats()
        return stats.computed, stats.waited_for, [row.numpy().tobytes() for hook in (Z, OUT) for row in found[hook]]

    results = at_once([work] * 4)
    distinct = 2 * len({tuple(row.tolist()) for row in rows})
    assert sum(computed for computed, _, _ in results) == distinct
    assert all(bits == results[0][2] for _, _, bits in results)
    assert ActivationStore(root).stats().disk_entries == distinct


def test_processes_that_write_at_once_share_one_budget(tiny: LanguageModel, tmp_path: Path) -> None:
    """It may be exceeded by what they write at the same instant, a batch each, and no more."""
    root, budget = tmp_path / "s", 60_000

    def work(seed: int) -> int:
        store, most = ActivationStore(root, memory_bytes=0, disk_bytes=budget), 0
        for n in range(25):
            store.fill(tiny, sequences(8, seed=100 * seed + n), [OUT, Z])
            most = max(most, store.stats().disk_bytes)
        return most

    most = max(at_once([lambda seed=seed: work(seed) for seed in range(4)]))
    batch = 2 * 2 * 8 * 32 * 4
    assert 2 * batch < most <= budget + 3 * batch
    store = ActivationStore(root, memory_bytes=0, disk_bytes=budget)
    store.fill(tiny, sequences(1, seed=10**6), [OUT, Z])
    assert store.stats().disk_bytes <= budget and store.verify() == []
    assert files(root) == dict(table(root, "SELECT file, bytes FROM shards WHERE bytes"))


def test_verify_tells_no_lies_while_another_process_evicts(tmp_path: Path) -> None:
    """What is evicted meanwhile is not damaged."""
    root, stop = tmp_path / "s", _fork.Event()

    def churn() -> None:
        disk = Disk(root, 10**9)
        n = 0
        while not stop.is_set():
            for _ in range(5):
                store_known(disk, n)
                n += 1
            disk.evict()

    child = Child(churn)
    disk, sentences = Disk(root, 10**9), []
    until = time.monotonic() + 2
    while time.monotonic() < until:
        sentences += list(disk.verify())
    stop.set()
    child.result()
    assert sentences == []


# ---- 3. damage ----


def flip(path: Path, where: int, mask: int) -> None:
    with open(path, "r+b") as file:
        file.seek(where)
        (value,) = file.read(1)
        file.seek(where)
        file.write(bytes([value ^ mask]))


def pristine(model: LanguageModel, root: Path, codec: str, rows: Sequence[torch.Tensor], hooks: Sequence[str]) -> None:
    """A store on disk that nobody has open, the journal folded into the index."""

    def work() -> None:
        ActivationStore(root, codec=codec).get(model, rows, hooks)

    Child(work).result()
    db = sqlite3.connect(root / "index.sqlite")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    assert not files(root, "*-wal")


@pytest.mark.parametrize("flips", [pytest.param(30, id="30"), pytest.param(400, id="400", marks=pytest.mark.slow)])
@pytest.mark.parametrize("codec", codecs.CODECS)
def test_a_flipped_bit_in_a_shard_is_named_and_never_served(
    codec: str, flips: int, tiny: LanguageModel, tmp_path: Path
) -> None:
    """Every bit of every shard is covered, whatever the codec."""
    rows, rng, copy = sequences(8), random.Random(0), tmp_path / "copy"
    expected = alone(tiny, rows, [Z, OUT])
    pristine(tiny, tmp_path / "s", codec, rows, [Z, OUT])
    whole = ActivationStore(tmp_path / "s", codec=codec).get(tiny, rows, [Z, OUT])
    for _ in range(flips):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "s", copy)
        shard = copy / rng.choice(sorted(files(copy)))
        flip(shard, rng.randrange(shard.stat().st_size), 1 << rng.randrange(8))
        (sentence,) = ActivationStore(copy, codec=codec).verify()
        assert shard.name in sentence
        store = ActivationStore(copy, codec=codec, memory_bytes=0)
        found = store.get(tiny, rows, [Z, OUT])
        assert store.stats().computed == 1
        for hook in (Z, OUT):
            changed = [i for i in range(8) if not torch.equal(found[hook][i], whole[hook][i])]
            assert len(changed) <= 1
            assert all(near(a, b, codec) for a, b in zip(found[hook], expected[hook], strict=True))
        assert store.verify() == []


@pytest.mark.parametrize("flips", [pytest.param(200, id="200"), pytest.param(4000, id="4000", marks=pytest.mark.slow)])
def test_a_damaged_index_gives_the_truth_or_a_sentence(flips: int, tiny: LanguageModel, tmp_path: Path) -> None:
    """One random byte of the database: right rows or a UserError, within bounded time, and nothing else."""
    rows = sequences(8)
    expected = alone(tiny, rows, [Z, OUT])
    pristine(tiny, tmp_path / "s", "float32", rows, [Z, OUT])
    size = (tmp_path / "s" / "index.sqlite").stat().st_size
    used = [place for place, byte in enumerate((tmp_path / "s" / "index.sqlite").read_bytes()) if byte]

    def work(seed: int) -> list[str]:
        rng, copy = random.Random(seed), tmp_path / f"copy{seed}"
        violations = []
        for n in range(flips // 2):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(tmp_path / "s", copy)
            where = rng.choice(used) if n % 2 else rng.randrange(size)
            mask = rng.randrange(1, 256)
            flip(copy / "index.sqlite", where, mask)
            try:
                with deadline(10):
                    store = ActivationStore(copy, memory_bytes=0)
                    bad = wrong(store.get(tiny, rows, [Z, OUT]), expected)
                    if bad:
                        violations.append(f"byte {where} ^ {mask}: wrong rows {bad}")
                    store.verify()
                    store.stats()
                    store.series()
                    store.get(tiny, sequences(3, seed=1), [Z, OUT])
                    store.evict(keep_bytes=1000)
            except UserError:
                pass
            except (Exception, Hang) as error:
                at = traceback.extract_tb(error.__traceback__)
                ours = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in at]
                last = [name for name in ours if not name.startswith("test_")][-1:]
                violations.append(f"byte {where} ^ {mask}: {type(error).__name__}: {error} {last}")
        return violations

    children = [Child(work, seed) for seed in range(2)]
    violations = [sentence for child in children for sentence in child.result(20 * HANG)]
    assert violations == [], f"{len(violations)} of {flips}:\n" + "\n".join(violations)


SWAPS = {
    "places": "UPDATE entries SET shard = {other}.shard, offset = {other}.offset, checksum = {other}.checksum",
    "offsets": "UPDATE entries SET shard = {other}.shard, offset = {other}.offset",
    "checksums": "UPDATE entries SET checksum = {other}.checksum",
    "everything": "UPDATE entries SET shard = {other}.shard, offset = {other}.offset, nbytes = {other}.nbytes, "
    "checksum = {other}.checksum, shape = {other}.shape, error = {other}.error",
}


@pytest.mark.parametrize("apart", ["sequence", "scope"])
@pytest.mark.parametrize("what", SWAPS)
def test_rows_exchanged_in_the_index_are_never_served(
    what: str, apart: str, tiny: LanguageModel, tmp_path: Path
) -> None:
    """A checksum is for one key: a row under another's name does not match it."""
    root, rows = tmp_path / "s", [torch.arange(6), torch.arange(6) + 1]
    hooks = [FIRST, OUT]  # of one shape
    expected = alone(tiny, rows, hooks)
    pristine(tiny, root, "float32", rows, hooks)
    db = sqlite3.connect(root / "index.sqlite", isolation_level=None)
    db.row_factory = sqlite3.Row
    one, two = db.execute(
        f"SELECT * FROM entries ORDER BY {'scope, sequence' if apart == 'sequence' else 'sequence, scope'} LIMIT 2"
    ).fetchall()
    assert one[apart] != two[apart]
    for here, other in ((one, two), (two, one)):
        statement = SWAPS[what]
        for column in ("shard", "offset", "nbytes", "checksum", "shape", "error"):
            statement = statement.replace(f"{{other}}.{column}", f":{column}")
        values = {column: other[column] for column in other.keys()} | {"s": here["sequence"], "c": here["scope"]}  # noqa: SIM118
        assert db.execute(f"{statement} WHERE sequence = :s AND scope = :c", values).rowcount == 1
    db.close()
    assert len(ActivationStore(root).verify()) == 2
    with deadline():
        store = ActivationStore(root, memory_bytes=0)
        assert wrong(store.get(tiny, rows, hooks), expected) == []
    assert store.stats().computed == 2


@pytest.mark.parametrize(
    ("one", "column"), [("sequences", "digest"), ("scopes", "hook"), ("shards", "file"), ("sequences", "tokens")]
)
def test_names_exchanged_in_the_index_are_never_believed(
    one: str, column: str, tiny: LanguageModel, tmp_path: Path
) -> None:
    """Two digests, two hook points, two files, or two sequences' tokens change places."""
    root, rows, hooks = tmp_path / "s", [torch.arange(6), torch.arange(6) + 1], [FIRST, OUT]
    expected = alone(tiny, rows, hooks)
    pristine(tiny, root, "float32", rows, hooks)
    db = sqlite3.connect(root / "index.sqlite", isolation_level=None)
    (a, x), (b, y) = db.execute(f"SELECT id, {column} FROM {one} ORDER BY id").fetchall()
    for id, value in ((a, b"aside"), (b, x), (a, y)):
        db.execute(f"UPDATE {one} SET {column} = ? WHERE id = ?", (value, id))
    db.close()
    assert ActivationStore(root).verify() != []
    with deadline():
        assert wrong(ActivationStore(root, memory_bytes=0).get(tiny, rows, hooks), expected) == []


@pytest.mark.parametrize("how", ["deleted", "emptied", "cut", "unreadable"])
def test_a_shard_that_somebody_has_taken_away_is_computed_anew(how: str, tiny: LanguageModel, tmp_path: Path) -> None:
    """Within bounded time, though the index says that it is there."""
    root, rows = tmp_path / "s", sequences(4)
    expected = alone(tiny, rows, [Z, OUT])
    pristine(tiny, root, "float32", rows, [Z, OUT])
    for name, size in files(root).items():
        if how == "deleted":
            (root / name).unlink()
        elif how == "unreadable":  # reading it is an input/output error, as on a bad disk
            (root / name).unlink()
            (root / name).symlink_to("/proc/self/mem")
        else:
            os.truncate(root / name, 0 if how == "emptied" else size // 2)

    def work() -> tuple[int, list[str], list[str]]:
        sentences = ActivationStore(root).verify()
        store = ActivationStore(root, memory_bytes=0)
        with deadline(20):
            bad = wrong(store.get(tiny, rows, [Z, OUT]), expected)
            bad += wrong(ActivationStore(root).get(tiny, rows, [Z, OUT]), expected)
        return len(sentences), bad, store.verify()

    sentences, bad, after = Child(work).result()
    assert sentences >= 4 and bad == [] and after == []


# ---- 4. full disks ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def long_sequences(n: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(500, (100 + i % 3,), generator=generator) for i in range(n)]


def free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def ask_without_space(
    root: Path, model: LanguageModel, same: bool, old: int, new: int, fill_up: Callable[[], None],
    make_space: Callable[[], None],
) -> tuple[bool, list[str]]:  # fmt: skip
    """Store something, ask for more where there is no space, make space, ask again. Returns whether it was refused,
    and what went wrong."""
    stored, more = long_sequences(old, 0), long_sequences(new, 1)
    expected = alone(model, stored, HOOKS), alone(model, more, HOOKS)
    store, refused, report = ActivationStore(root, memory_bytes=0), False, []
    store.get(model, stored, HOOKS)
    fill_up()
    try:
        with deadline(30):
            store.get(model, more, HOOKS)
    except UserError as error:
        refused = True
        if "what was stored before is safe. Free space" not in str(error):
            report.append(str(error))
    except (Exception, Hang):
        report.append(traceback.format_exc()[-1000:])
    make_space()
    if not same:
        store = ActivationStore(root, memory_bytes=0)
    report += store.verify()
    missing = store.estimate(model, more, HOOKS).missing
    before = store.stats().computed
    try:
        with deadline(20):
            report += wrong(store.get(model, stored, HOOKS), expected[0])
            if store.stats().computed != before:
                report.append("what was stored before had to be computed again")
            report += wrong(store.get(model, more, HOOKS), expected[1])
            if store.stats().computed != before + missing:
                report.append(f"computed {store.stats().computed - before}, but {missing} were missing")
    except (Exception, Hang) as error:
        report.append(f"with space again, {type(error).__name__}: {error}")
    return refused, report + store.verify()


@pytest.mark.parametrize("same", [True, False], ids=["same store", "reopened"])
def test_a_full_disk_is_one_sentence_and_loses_nothing(same: bool, tiny: LanguageModel, small_disk: Path) -> None:
    """Whatever did not fit any more (a row, the index, the claim): what was stored is whole, and when there is space
    the same request goes on with what is missing."""
    ballast, root = small_disk / "ballast", small_disk / "s"
    report = []
    for space in (0, 4_096, 12_288, 40_960, 131_072, 524_288):

        def fill_up(space: int = space) -> None:
            ballast.write_bytes(bytes(max(0, free(small_disk) - space)))

        def work(fill_up: Callable[[], None] = fill_up) -> tuple[bool, list[str]]:
            return ask_without_space(root, tiny, same, 6, 24, fill_up, ballast.unlink)

        refused, sentences = Child(work).result(3 * HANG)
        report += [f"{space} bytes: {sentence}" for sentence in sentences]
        assert refused, f"{space} bytes were enough"
        shutil.rmtree(root)
        ballast.unlink(missing_ok=True)
    assert report == []


def test_a_full_disk_can_be_evicted(tiny: LanguageModel, small_disk: Path) -> None:
    """The way out that the sentence names is open: `evict` makes room on a disk without any."""

    def work() -> list[str]:
        root, report, n = small_disk / "s", [], 0
        store = ActivationStore(root, memory_bytes=0)
        while n < 1000:
            try:
                store.get(tiny, long_sequences(10, n), HOOKS)
            except UserError:
                break
            n += 1
        for again, keep, few in ((store, 10**6, 6), (ActivationStore(root, memory_bytes=0), 0, 1)):
            (small_disk / "ballast").write_bytes(b"")
            (small_disk / "ballast").write_bytes(bytes(free(small_disk)))
            size = again.stats().disk_bytes
            with deadline(30):
                report += again.verify()
                if again.evict(keep_bytes=keep) < size - keep:
                    report.append("not enough was evicted")
                some = long_sequences(few, n)
                report += wrong(again.get(tiny, some, HOOKS), alone(tiny, some, HOOKS)) + again.verify()
        return report

    assert Child(work).result() == []


@pytest.mark.parametrize("same", [True, False], ids=["same store", "reopened"])
def test_a_limit_on_the_size_of_files_is_one_sentence(same: bool, tiny: LanguageModel, tmp_path: Path) -> None:
    """The same law where nothing can be mounted: writes fail at every kind of file, one after the other."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    report, refusals = [], 0
    for limit in (0, 1, 20_000, 60_000, 100_000, 130_000, 160_000):

        def work(limit: int = limit) -> tuple[bool, list[str]]:
            return ask_without_space(
                tmp_path / f"s{limit}", tiny, same, 3, 9,
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)),
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)),
            )  # fmt: skip

        refused, sentences = Child(work).result(3 * HANG)
        refusals += refused
        report += [f"{limit} bytes: {sentence}" for sentence in sentences]
    assert report == [] and refusals >= 4


def test_a_folder_that_may_not_be_written_is_one_sentence(tiny: LanguageModel) -> None:
    """New, or with a store in it, or made read-only while a store is open; afterwards all is well."""
    rows, more = sequences(4), sequences(4, seed=1)
    folder = Path(tempfile.mkdtemp())

    def work() -> list[str]:
        report = []

        def refused(call: Callable[[], object], name: str) -> None:
            try:
                with deadline(30):
                    call()
                report.append(f"{name}: allowed")
            except UserError:
                pass
            except (Exception, Hang) as error:
                report.append(f"{name}: {type(error).__name__} {error}")

        store = ActivationStore(folder / "s", memory_bytes=0)
        store.get(tiny, rows, [OUT])
        for path in (folder / "s").iterdir():
            path.chmod(0o444)
        (folder / "s").chmod(0o555)
        folder.chmod(0o555)
        if os.geteuid() == 0:  # whom permissions do not concern
            os.seteuid(65534)
        refused(lambda: ActivationStore(folder / "new"), "new")
        refused(lambda: ActivationStore(folder / "s"), "old")
        refused(lambda: store.get(tiny, more, [Z]), "open")
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)
        (folder / "s").chmod(0o755)
        for path in (folder / "s").iterdir():
            path.chmod(0o644)
        for again in (store, ActivationStore(folder / "s", memory_bytes=0)):
            with deadline(30):
                report += wrong(again.get(tiny, rows, [OUT]), alone(tiny, rows, [OUT]))
                report += wrong(again.get(tiny, more, [Z]), alone(tiny, more, [Z]))
            report += again.verify()
        return report

    try:
        assert Child(work).result() == []
    finally:
        shutil.rmtree(folder)


# ---- 5. forks ----


def test_a_forked_child_and_its_parent_use_one_store(tiny: LanguageModel, tmp_path: Path) -> None:
    """A hit from memory, a hit from disk and a miss, while the parent goes on writing to its own shards."""
    root, store = tmp_path / "s", ActivationStore(tmp_path / "s", memory_bytes=20_000)
    hits, ours, theirs, both = (sequences(20, seed=seed) for seed in range(4))
    store.get(tiny, hits, [OUT, Z])  # more than memory holds: some hits are on disk
    inside = _fork.Event()

    def work() -> tuple[list[str], list[int]]:
        inside.set()
        before = store.stats()
        bad = wrong(store.get(tiny, hits, [OUT, Z]), alone(tiny, hits, [OUT, Z]))
        bad += wrong(store.get(tiny, theirs, [OUT, Z]), alone(tiny, theirs, [OUT, Z]))
        bad += wrong(store.get(tiny, both, [OUT, Z]), alone(tiny, both, [OUT, Z]))
        after = store.stats()
        names = ("memory_hits", "disk_hits", "computed", "waited_for")
        return bad + store.verify(), [getattr(after, name) - getattr(before, name) for name in names]

    child = Child(work)
    assert inside.wait(HANG)
    before = store.stats().computed
    with deadline():
        found = store.get(tiny, ours, [OUT, Z])
        found_both = store.get(tiny, both, [OUT, Z])
    bad, (memory, disk, computed, waited) = child.result()
    assert bad == [] and memory > 0 and memory + disk + computed + waited == 3 * 40 and disk > 0
    assert computed - 40 + store.stats().computed - before - 40 == 40  # `both` was computed once, by whomever
    assert wrong(found, alone(tiny, ours, [OUT, Z])) == [] and wrong(found_both, alone(tiny, both, [OUT, Z])) == []
    store.get(tiny, sequences(20, seed=4), [OUT, Z])
    assert store.verify() == []
    assert files(root) == dict(table(root, "SELECT file, bytes FROM shards"))


@pytest.mark.parametrize("lock", ["memory._lock", "_lock", "disk._lock", "disk._readers._lock", "model"])
def test_a_fork_while_a_lock_is_held_does_not_hang(lock: str, tiny: LanguageModel, tmp_path: Path) -> None:
    """No lock is inherited locked: the thread that would open it is not in the child."""
    store = ActivationStore(tmp_path / "s", memory_bytes=0)
    for _ in range(2):  # the second time from files, which stay open
        store.get(tiny, sequences(4), [OUT])
    assert store.disk._readers._files
    held: Any = tiny._lock if lock == "model" else store  # a read-ahead that computes holds the model's
    for name in lock.split(".") if lock != "model" else ():
        held = getattr(held, name)

    def work() -> int:
        with deadline(20):
            store.get(tiny, sequences(6), [OUT])
        return store.stats().computed

    taken, leave = threading.Event(), threading.Event()

    def keep() -> None:
        with held:
            taken.set()
            leave.wait(HANG)

    thread = threading.Thread(target=keep)
    thread.start()
    taken.wait()
    try:
        assert Child(work).result() == 6
    finally:
        leave.set()
        thread.join()


def test_the_claims_of_a_dead_parent_do_not_outlive_it_in_its_child(tiny: LanguageModel, tmp_path: Path) -> None:
    """A process forks a worker, claims, and is killed; the worker lives on and has inherited every descriptor."""
    root, rows = tmp_path / "s", sequences(4)
    reached, never = _fork.Event(), _fork.Event()
    worker = _fork.RawValue("i", 0)

    def parent() -> None:
        store = ActivationStore(root)
        store.get(tiny, sequences(2, seed=1), [OUT])  # a shard and a lock file are open
        pid = os.fork()
        if not pid:
            time.sleep(2 * HANG)
            os._exit(0)
        worker.value = pid
        with paused(tiny, reached, never):
            store.get(tiny, rows, [OUT])

    child = Child(parent)
    assert reached.wait(HANG)
    child.kill()

    def survivor() -> list[str]:
        store = ActivationStore(root)
        with deadline(20):
            bad = wrong(store.get(tiny, rows, [OUT]), alone(tiny, rows, [OUT]))
        return bad + store.verify()

    try:
        assert Child(survivor).result() == []
        assert len(files(root)) == 1  # the shard of the dead was taken up
    finally:
        if worker.value > 1:
            os.kill(worker.value, signal.SIGKILL)


# ---- 6. rows are their sequences' own ----


def test_each_row_is_that_of_its_sequence_alone(tiny: LanguageModel, store: ActivationStore) -> None:
    """Unequal lengths, many repeats, edits and none, in any order and from every tier."""
    rng = random.Random(0)
    rows = [torch.tensor([rng.randrange(500) for _ in range(rng.randint(1, 12))]) for _ in range(30)]
    direction = torch.randn(tiny.config.d_model, generator=torch.Generator().manual_seed(0))
    edits: list[dict[Any, Intervention] | None] = [
        None,
        {Z: zero()},
        {Site(Z, head=2): zero()},
        {FIRST: steer(direction, 2.0)},
        {FIRST: steer(direction, -2.0), Site(Z, head=1): mean(torch.ones(8))},
    ]
    expected = [alone(tiny, rows, HOOKS, edit) for edit in edits]
    for n in range(40):
        which = rng.randrange(len(edits))
        some = [rng.randrange(30) for _ in range(rng.randint(1, 40))]
        hooks = rng.sample(HOOKS, rng.randint(1, 3))
        found = store.get(tiny, [rows[i] for i in some], hooks, edit=edits[which])
        assert wrong(found, {hook: [expected[which][hook][i] for i in some] for hook in hooks}) == [], n
        if n % 10 == 9:
            store.memory.drop()
    assert store.stats().memory_hits and store.stats().disk_hits


def test_a_batch_of_the_same_sequence_is_one_row(tiny: LanguageModel, store: ActivationStore) -> None:
    """Given as one tensor, with every row alike, or in another integer type."""
    row = torch.arange(6)
    found = store.get(tiny, row.expand(50, -1), [OUT])[OUT]
    assert len(found) == 50 and store.stats().computed == 1
    again = store.get(tiny, [row.to(torch.int32)], [OUT])[OUT]
    assert store.stats().computed == 1 and torch.equal(again[0], found[49])


# ---- 7. callers' tensors ----


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_no_caller_can_change_what_others_get(codec: str, tiny: LanguageModel, tmp_path: Path) -> None:
    """Every tensor handed out, on every path, is changed in place; what comes next is as before."""
    rows = [*sequences(6), *sequences(6)]  # each twice
    hooks = [Z, OUT, FIRST, block(1, "hook_resid_pre")]  # the last two are one tensor in the model
    truth = ActivationStore(tmp_path / "truth", codec=codec).get(tiny, rows, hooks)
    kept = {hook: [row.clone() for row in truth[hook]] for hook in hooks}

    def spoil(found: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """One after the other, and no other tensor may change with it."""
        before = {hook: [row.clone() for row in found[hook]] for hook in found}
        for hook in found:
            for i, row in enumerate(found[hook]):
                assert torch.equal(row, before[hook][i])
                row.fill_(float("nan"))

    def same(found: Mapping[str, Sequence[torch.Tensor]]) -> bool:
        return all(torch.equal(a, b) for hook in hooks for a, b in zip(found[hook], kept[hook], strict=True))

    for memory in (10**7, 0):  # memory hits, then disk hits
        store = ActivationStore(tmp_path / f"s{memory}", codec=codec, memory_bytes=memory)
        for _ in range(3):
            found = store.get(tiny, rows, hooks)
            assert same(found)
            spoil(found)
        stream = store.stream(tiny, rows, hooks, rows=7, window=20)
        clean = [{hook: x.clone() for hook, x in b.items()} for b in store.stream(tiny, rows, hooks, rows=7, window=20)]
        for batch, expected in zip(stream, clean, strict=True):  # changed before the next one is read
            assert all(torch.equal(batch[hook], expected[hook]) for hook in hooks)
            for x in batch.values():
                x.fill_(float("nan"))
        assert same(store.get(tiny, rows, hooks)) and store.verify() == []


@pytest.mark.parametrize("what", ["list", "tensor", "edit"])
def test_changing_what_was_asked_for_does_not_store_wrong_rows(what: str, tiny: LanguageModel, tmp_path: Path) -> None:
    """A stream that computes as it goes has the caller's tokens and interventions for a long time. Whether it takes
    no notice or refuses, the store must not keep a row under another's name."""
    rows = [torch.arange(6) + 7 * i for i in range(24)]
    value = torch.full((32,), 0.5)
    edit = {FIRST: mean(value)} if what == "edit" else None
    expected = alone(tiny, rows, [OUT], {FIRST: mean(value.clone())} if edit else None)
    mine = torch.stack(rows) if what == "tensor" else [row.clone() for row in rows]
    stream = ActivationStore(tmp_path / "s").stream(tiny, mine, [OUT], rows=8, window=6, edit=edit)
    with suppress(UserError):
        next(stream)
        value.zero_()
        for row in mine if what != "edit" else ():
            row.zero_()
        for _ in stream:
            pass
    again = ActivationStore(tmp_path / "s")
    found = again.get(tiny, rows, [OUT], edit={FIRST: mean(torch.full((32,), 0.5))} if edit else None)
    assert wrong(found, expected) == []
    assert again.verify() == []


# ---- 9. streams ----


def positions(
    store: ActivationStore, model: LanguageModel, some: Sequence[torch.Tensor], seeds: int, **options: int
) -> np.ndarray:
    """[seed, row]: where each row comes."""
    plain = torch.cat(store.get(model, some, [OUT])[OUT])
    number = {row.numpy().tobytes(): i for i, row in enumerate(plain)}
    assert len(number) == len(plain)
    found = np.empty((seeds, len(plain)), dtype=int)
    for seed in range(seeds):
        streamed = torch.cat([batch[OUT] for batch in store.stream(model, some, [OUT], seed=seed, **options)])
        order = [number[row.numpy().tobytes()] for row in streamed]
        assert sorted(order) == list(range(len(plain)))
        found[seed, order] = range(len(plain))
    return found


@pytest.mark.parametrize("window", [12, 10**6])
@pytest.mark.parametrize("seeds", [pytest.param(160, id="160"), pytest.param(4000, id="4000", marks=pytest.mark.slow)])
def test_a_row_may_come_anywhere_in_a_stream(
    seeds: int, window: int, tiny: LanguageModel, store: ActivationStore
) -> None:
    """Over seeds, each row's place is uniform, and so are the places of two rows of one sequence in their window."""
    rows = [torch.arange(4) + 7 * i for i in range(12)]
    found = positions(store, tiny, rows, seeds, rows=5, window=window)
    total = found.shape[1]
    for row in range(0, total, 5):
        counts = np.bincount(found[:, row] // 6, minlength=total // 6)
        assert chisquare(counts).pvalue > 1e-4
    inside = min(window, total)
    assert (found[:, ::4] // inside == found[:, 1::4] // inside).all()  # one sequence, one window
    first, second = found[:, ::4].ravel() % inside, found[:, 1::4].ravel() % inside
    half = inside // 2  # which half of the window each falls in: two places without replacement
    counts = np.bincount(2 * (first // half) + second // half, minlength=4)
    alike = 0.5 * (half - 1) / (inside - 1)
    expected = len(first) * np.array([alike, 0.5 - alike, 0.5 - alike, alike])
    assert chisquare(counts, expected).pvalue > 1e-4
    assert 0.4 < (first < second).mean() < 0.6


def test_neighbouring_windows_and_seeds_are_shuffled_differently(tiny: LanguageModel, store: ActivationStore) -> None:
    """The order within one window tells nothing of that in the next, nor of the next seed's."""
    rows = [torch.arange(4) + 7 * i for i in range(12)]
    found = positions(store, tiny, rows, 120, rows=5, window=24)
    orders = [tuple(np.argsort(found[seed])[start : start + 24] % 24) for seed in range(120) for start in (0, 24)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("window", [1, 6, 40, 10**6])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_a_stream_resumes_anywhere(size: int, window: int, tiny: LanguageModel, store: ActivationStore) -> None:
    """From each position, the tail of the whole; with repeats, batches of one row, and windows of any size."""
    rows = [*sequences(10), *sequences(3)]
    options = {"rows": size, "window": window, "seed": 3}
    whole = [batch[OUT] for batch in store.stream(tiny, rows, [OUT], **options)]
    total = sum(map(len, rows))
    assert [len(x) for x in whole[:-1]] == [size] * (len(whole) - 1) and sum(map(len, whole)) == total
    assert len(store.stream(tiny, rows, [OUT], **options)) == len(whole)
    streamed = torch.cat(whole)
    plain = torch.cat(store.get(tiny, rows, [OUT])[OUT])
    assert Counter(x.numpy().tobytes() for x in streamed) == Counter(x.numpy().tobytes() for x in plain)
    for start in range(0, len(whole) + 2, max(1, len(whole) // 12)):
        stream = store.stream(tiny, rows, [OUT], start=start, **options)
        rest = [batch[OUT] for batch in stream]
        assert len(rest) == max(0, len(whole) - start)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))
        assert stream.position == max(start, len(whole))


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**40, 2**62])
def test_any_seed_will_do(seed: int, tiny: LanguageModel, store: ActivationStore) -> None:
    rows = sequences(6)
    stream = store.stream(tiny, rows, [OUT], rows=8, window=10, seed=seed)
    assert sum(len(batch[OUT]) for batch in stream) == sum(map(len, rows))


def test_a_stream_left_behind_blocks_nobody(tiny: LanguageModel, tmp_path: Path) -> None:
    """A cold stream that is closed, or forgotten, after its first batch keeps no claim."""
    rows = sequences(40)
    store = ActivationStore(tmp_path / "s")
    stream = store.stream(tiny, rows, [OUT], rows=4, window=10)
    next(stream)
    stream.close()
    other = store.stream(tiny, rows, [OUT], rows=4, window=10, seed=1)
    next(other)
    del other, stream

    with deadline(30):
        assert wrong(ActivationStore(tmp_path / "s").get(tiny, rows, [OUT]), alone(tiny, rows, [OUT])) == []
    assert table(tmp_path / "s", "SELECT * FROM claims") == []


# ---- 10. claims ----


def test_what_another_store_is_computing_is_waited_for(
    tiny: LanguageModel, make_tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    """In one process and in two: the second computes nothing and gets the first one's bits."""
    rows, slow = [torch.arange(6) + i for i in range(6)], make_tiny()  # one batch: one claim
    for inside in (True, False):
        root = tmp_path / f"s{inside}"
        reached, go_on = (threading.Event(), threading.Event()) if inside else (_fork.Event(), _fork.Event())
        found: dict[str, Any] = {}

        def first(root: Path = root, reached: Any = reached, go_on: Any = go_on) -> list[bytes]:
            with paused(slow, reached, go_on):
                return [row.numpy().tobytes() for row in ActivationStore(root).get(slow, rows, [OUT])[OUT]]

        def second(root: Path = root, found: dict[str, Any] = found) -> None:
            store = ActivationStore(root)
            found["rows"] = [row.numpy().tobytes() for row in store.get(tiny, rows, [OUT])[OUT]]
            found["stats"] = store.stats()

        child = None if inside else Child(first)
        thread = threading.Thread(target=lambda f=first, found=found: found.update(first=f()), daemon=True)
        if inside:
            thread.start()
        assert reached.wait(HANG)
        waiting = threading.Thread(target=second, daemon=True)
        waiting.start()
        waiting.join(0.4)
        assert waiting.is_alive(), "did not wait"
        go_on.set()
        waiting.join(HANG)
        assert not waiting.is_alive(), "waits for ever"
        if child is None:
            thread.join(HANG)
        bits = found["first"] if child is None else child.result()
        assert found["rows"] == bits
        assert (found["stats"].computed, found["stats"].waited_for) == (0, 6)


def test_what_a_dead_process_was_computing_is_taken_over(tiny: LanguageModel, tmp_path: Path) -> None:
    """At once, by a store that was already waiting as well as by a new one."""
    root, rows = tmp_path / "s", sequences(6)
    reached, never = _fork.Event(), _fork.Event()
    waiting_store = ActivationStore(root)

    def first() -> None:
        with paused(tiny, reached, never):
            ActivationStore(root).get(tiny, rows, [OUT])

    child = Child(first)
    assert reached.wait(HANG)
    assert len(table(root, "SELECT * FROM claims")) > 0
    found: list[list[torch.Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(waiting_store.get(tiny, rows, [OUT])[OUT]), daemon=True)
    thread.start()
    thread.join(0.3)
    child.kill()
    thread.join(HANG)
    assert not thread.is_alive(), "the dead process blocks the living"
    assert wrong({OUT: found[0]}, alone(tiny, rows, [OUT])) == []
    assert waiting_store.stats().computed == 6 and table(root, "SELECT * FROM claims") == []
    assert strays(root) == [name for name in strays(root) if name.endswith(".owner")]


@pytest.mark.parametrize("failure", ["NaN", "error in the model", "max_error"])
def test_a_failed_computation_gives_its_claim_back(
    failure: str, tiny: LanguageModel, make_tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    """Nobody waits for what will never come, in this process or another."""
    rows, bad = sequences(6), make_tiny()
    codec = "int8" if failure == "max_error" else "float32"
    store = ActivationStore(tmp_path / "s", codec=codec)
    if failure == "NaN":
        for parameter in bad._module.base_model.layers[2].parameters():
            parameter.data.fill_(float("nan"))
    elif failure == "error in the model":

        def fail(*_: object) -> None:
            time.sleep(0.05)
            raise RuntimeError("out of something")

        bad._module.base_model.layers[2].register_forward_pre_hook(fail)
    errors: list[str] = []

    def ask() -> None:
        try:
            store.get(bad, rows, [OUT, Z], max_error=0.0 if failure == "max_error" else None)
        except Exception as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        ended(thread)
    assert len(errors) == 3
    assert all({"NaN": "gives NaN at", "max_error": "max_error"}.get(failure, "out of something") in e for e in errors)
    assert table(tmp_path / "s", "SELECT * FROM claims") == []

    def work() -> list[int]:
        with deadline(30):
            again = ActivationStore(tmp_path / "s", codec=codec)
            again.get(tiny, rows, [OUT, Z])
        return [again.stats().computed, len(again.verify())]

    computed, damaged = Child(work).result()
    assert damaged == 0 and (computed == 12 or failure == "max_error")
    with deadline(30):
        store.get(tiny, rows, [OUT, Z])


@pytest.mark.parametrize("who", ["the same store", "another"])
def test_a_claim_that_could_not_be_given_back_blocks_nobody(
    who: str, tiny: LanguageModel, make_tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    """The computation fails, and by then the index cannot be written either. When it can, anybody computes anew, though
    the process that failed lives on."""
    rows, bad = sequences(3), make_tiny()

    def fail(*_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        raise RuntimeError("out of something")

    def work() -> list[str]:
        store = ActivationStore(tmp_path / "s")
        store.get(tiny, rows, [Z])
        bad._module.base_model.layers[2].register_forward_pre_hook(fail)
        with suppress(RuntimeError, UserError):
            store.get(bad, rows, [OUT])
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with deadline(20):
            again = store if who == "the same store" else ActivationStore(tmp_path / "s")
            return wrong(again.get(tiny, rows, [OUT]), alone(tiny, rows, [OUT]))

    assert Child(work).result() == []
