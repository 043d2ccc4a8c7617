"""Any sequence of operations on any number of stores: the values are the model's, and one key has one value."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from workbench.activations import ActivationStore, keys
from workbench.errors import UserError
from workbench.interventions import steer
from workbench.models import LanguageModel
from workbench.sites import block

Z, OUT, FIRST = block(1, "attn.hook_z"), block(2, "hook_resid_post"), block(0, "hook_resid_post")
HOOKS = (Z, OUT)
EDITS: dict[str, dict[Any, Any] | None] = {
    "none": None,
    "steer": {FIRST: steer(torch.ones(32), 3)},
}
ROWS = [torch.arange(length) * 3 + i for i, length in enumerate((1, 3, 5, 5, 5, 13))]
DIGESTS = [keys.sequence_digest(row.numpy().tobytes()) for row in ROWS]
FLOAT16 = 5e-4  # relative L2 of a row
WHICH = st.lists(st.integers(0, len(ROWS) - 1), max_size=8)  # few things, so that requests overlap
SOME_HOOKS = st.lists(st.sampled_from(HOOKS), min_size=1, max_size=2, unique=True)
EDIT = st.sampled_from(sorted(EDITS))
BUDGET = st.sampled_from([0, 3_000, 10**8])
Entry = tuple[str, str, str, int]  # codec, edit, hook point, number of the sequence


def right(row: torch.Tensor, truth: torch.Tensor, codec: str) -> bool:
    if codec == "float32":
        return torch.allclose(row, truth, rtol=1e-5, atol=1e-5)
    gap = (row - truth).norm(dim=-1) - 1e-5
    return bool((gap <= FLOAT16 * truth.norm(dim=-1)).all())


class Stores(RuleBasedStateMachine):
    """Several store objects, now and then closed and opened again, on one folder."""

    model: LanguageModel
    truth: Mapping[tuple[str, str], Sequence[torch.Tensor]]  # by edit and hook point

    @initialize(disk=st.sampled_from([16_000, 10**9]), memory=BUDGET)
    def begin(self, disk: int, memory: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.disk = disk
        self.stores: list[ActivationStore] = []
        self.seen: dict[Entry, set[bytes]] = {}  # all the values that an entry may have
        self.settled: set[Entry] = set()  # no eviction since a value was seen: there is no other
        self.pins: set[str] = set()
        self.open("float32", memory)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.stores.clear()
            self.folder.cleanup()

    # ---- operations ----

    @rule(codec=st.sampled_from(["float32", "float16"]), memory=BUDGET)
    def open(self, codec: str, memory: int) -> None:
        """Another store object; the third one takes the place of the first."""
        store = ActivationStore(Path(self.folder.name) / "s", memory_bytes=memory, disk_bytes=self.disk, codec=codec)
        self.stores = [*self.stores[-1:], store]

    def get(self, n: int, some: list[int], hooks: list[str], edit: str, session: bool) -> None:
        store = self.stores[n % len(self.stores)]
        rows = [ROWS[i] for i in some]
        estimated = store.estimate(self.model, rows, hooks, edit=EDITS[edit])
        before = store.stats()
        asked = store.session() if session else store
        with Watched(self, asked):
            found = asked.get(self.model, rows, hooks, edit=EDITS[edit])
            entries = len(set(some)) * len(hooks)
            assert estimated.entries == entries
            if session:
                stats = asked.stats()
                assert store.stats().computed == before.computed
                assert sum(map(len, (asked.used or {}).values())) == entries
                assert stats.memory_hits + stats.disk_hits + stats.computed == entries
                assert stats.computed == estimated.missing
            else:
                assert store.stats().computed - before.computed == estimated.missing
            for hook in hooks:
                assert len(found[hook]) == len(some)
                for i, row in zip(some, found[hook], strict=True):
                    assert right(row, self.truth[edit, hook][i], store.codec), (hook, i)
                    self.see((store.codec, edit, hook, i), row)
                    row.fill_(torch.nan)  # it is ours

    @rule(n=st.integers(0, 1), some=WHICH, hooks=SOME_HOOKS, edit=EDIT)
    def get_for_itself(self, n: int, some: list[int], hooks: list[str], edit: str) -> None:
        self.get(n, some, hooks, edit, False)

    @rule(n=st.integers(0, 1), some=WHICH, hooks=SOME_HOOKS, edit=EDIT)
    def get_in_a_session(self, n: int, some: list[int], hooks: list[str], edit: str) -> None:
        self.get(n, some, hooks, edit, True)

    @rule(n=st.integers(0, 1), some=WHICH, hooks=SOME_HOOKS, edit=EDIT)
    def fill(self, n: int, some: list[int], hooks: list[str], edit: str) -> None:
        store = self.stores[n % len(self.stores)]
        with Watched(self, store):
            store.fill(self.model, [ROWS[i] for i in some], hooks, edit=EDITS[edit])

    @rule(
        n=st.integers(0, 1),
        some=st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=8),
        hooks=SOME_HOOKS,
        edit=EDIT,
        size=st.integers(1, 40),
        window=st.sampled_from([1, 7, 20, 10**6]),
        seed=st.integers(0, 99),
    )
    def stream(self, n: int, some: list[int], hooks: list[str], edit: str, size: int, window: int, seed: int) -> None:
        """One epoch is what get gives, row for row, in another order, and aligned over the hook points."""
        store = self.stores[n % len(self.stores)]
        rows = [ROWS[i] for i in some]
        with Watched(self, store):
            stream = store.stream(self.model, rows, hooks, edit=EDITS[edit], rows=size, window=window, seed=seed)
            batches = list(stream)
            assert [len(batch[hooks[0]]) for batch in batches[:-1]] == [size] * (len(batches) - 1)
            streamed = torch.cat([torch.cat([b[hook].flatten(1) for hook in hooks], 1) for b in batches])
            truth = [torch.cat([self.truth[edit, hook][i].flatten(1) for hook in hooks], 1) for i in some]
            wanted = torch.cat(truth)
            assert streamed.shape == wanted.shape
            nearest = torch.cdist(streamed.double(), wanted.double()).argmin(1)
            assert all(right(streamed[k], wanted[j], store.codec) for k, j in enumerate(nearest.tolist()))
            names = torch.unique(wanted, dim=0, return_inverse=True)[1]  # a sequence may come twice
            assert Counter(names[nearest].tolist()) == Counter(names.tolist())

    @rule(n=st.integers(0, 1), keep=st.sampled_from([0, 1_000, 5_000, 10_000]), hook=st.sampled_from([None, *HOOKS]))
    def evict(self, n: int, keep: int, hook: str | None) -> None:
        store = self.stores[n % len(self.stores)]
        before = {series.hook: series for series in store.series()}
        size = store.stats().disk_bytes
        freed = store.evict(keep_bytes=keep, hook=hook)
        self.settled.clear()
        after = {series.hook: series for series in store.series()}
        assert store.stats().disk_bytes == size - freed
        for name, series in before.items():
            if name in self.pins or hook not in (None, name):
                assert after[name].entries == series.entries
        left = sum(s.bytes for s in after.values() if s.hook not in self.pins and hook in (None, s.hook))
        assert left <= keep
        if not keep and not self.pins and hook is None:
            assert store.memory.bytes == 0 or any(store.pins())

    @rule(n=st.integers(0, 1), hook=st.sampled_from(HOOKS))
    def pin(self, n: int, hook: str) -> None:
        self.stores[n % len(self.stores)].pin(hook=hook)
        self.pins.add(hook)

    @precondition(lambda self: self.pins)
    @rule(n=st.integers(0, 1))
    def unpin(self, n: int) -> None:
        self.stores[n % len(self.stores)].unpin(hook=self.pins.pop())

    # ---- laws ----

    @invariant()
    def budgets_hold(self) -> None:
        for store in getattr(self, "stores", []):
            stats = store.stats()
            assert stats.disk_bytes <= self.disk and stats.memory_bytes <= stats.memory_budget
            files = [path.stat().st_size for path in store.disk.root.glob("*.rows")]
            assert sum(files) == stats.disk_bytes
            held = store.memory.get(
                keys.Key(scope, digest)
                for edit in EDITS.values()
                for scope in keys.scopes(self.model, HOOKS, store.codec, edit).values()
                for digest in DIGESTS
            )
            assert sum(row.numel() * row.element_size() for row, _ in held.values()) == stats.memory_bytes

    @invariant()
    def nothing_is_damaged(self) -> None:
        for store in getattr(self, "stores", [])[-1:]:
            assert store.verify() == []

    def see(self, entry: Entry, row: torch.Tensor) -> None:
        """One value for each entry, and one more for each eviction: a store may still have the old one in memory."""
        value = row.numpy().tobytes()
        allowed = self.seen.setdefault(entry, set())
        if value not in allowed:
            assert entry not in self.settled, f"{entry} has changed"
            allowed.add(value)
            self.settled.add(entry)


class Watched:
    """An operation that may compute: it may evict by itself, and it may find its budget taken by pins."""

    def __init__(self, stores: Stores, asked: ActivationStore):
        self.stores, self.asked = stores, asked
        self.before = asked.stats()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        after = self.asked.stats()
        if after.disk_entries != self.before.disk_entries + after.computed - self.before.computed:
            self.stores.settled.clear()  # seldom enough to leave something to check
        return isinstance(error, UserError) and "pinned" in str(error) and bool(self.stores.pins)


@pytest.fixture(scope="module")
def machine(tiny: LanguageModel) -> type[Stores]:
    truth = {}
    for name, edit in EDITS.items():
        runs = [tiny.run(row[None], capture=HOOKS, edit=edit, logits="none") for row in ROWS]
        for hook in HOOKS:
            truth[name, hook] = [run[hook][0] for run in runs]
    return type("TinyStores", (Stores,), {"model": tiny, "truth": truth})


def profile(**options: Any) -> settings:
    return settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)


def test_any_sequence_of_operations_keeps_the_laws(machine: Callable[[], Stores]) -> None:
    run_state_machine_as_test(machine, settings=profile(derandomize=True, max_examples=30, stateful_step_count=25))


@pytest.mark.slow
def test_many_long_sequences_of_operations_keep_the_laws(machine: Callable[[], Stores]) -> None:
    run_state_machine_as_test(machine, settings=profile(max_examples=300, stateful_step_count=40))
