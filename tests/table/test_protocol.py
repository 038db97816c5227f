"""Drivers and tasks that crash, hang and wake up: see ``tests.helpers.simulator``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from imagevec.table import fence as fence_module
from imagevec.table import parts
from imagevec.table.fence import Fence
from imagevec.table.folder import FolderTable
from tests.helpers import simulator
from tests.helpers.simulator import (
    SimulatedKeys,
    SimulatedPublisher,
    SimulatedTable,
    first_failure,
    world,
)

_EVENTS = ("crashes", "hangs", "takeovers", "rewritten parts", "zombie tasks", "errors")

Patch = Callable[[Any, str, Any], None]


def test_each_key_is_in_the_table_once_whoever_crashes_or_hangs() -> None:
    counts: Counter[str] = Counter()
    assert first_failure(range(2000), counts) is None
    assert counts["interleavings"] == 2000
    assert all(counts[event] > 50 for event in _EVENTS), counts


def test_safety_does_not_depend_on_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run takes over at once from a run that may be alive."""
    monkeypatch.setattr(Fence, "_watch", lambda *_: None)
    counts: Counter[str] = Counter()
    assert first_failure(range(500), counts) is None
    assert counts["takeovers"] > 500


def test_safety_does_not_depend_on_conditional_creation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs that write the same epoch, the first stops at its check."""

    def create(folder: Any, path: str, data: bytes) -> bool:
        folder.write(path, data)
        return True

    monkeypatch.setattr(fence_module, "create", create)
    assert first_failure(range(500), Counter()) is None


def test_safety_does_not_depend_on_tasks_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of dead runs go on, although the folder of their run was deleted."""
    tasks_of_dead_runs_write(monkeypatch.setattr)
    counts: Counter[str] = Counter()
    assert first_failure(range(500), counts) is None
    assert counts["zombie tasks"] > 50


def test_interleaving_depends_only_on_the_seed() -> None:
    first, second = Counter[str](), Counter[str]()
    first_failure(range(20), first)
    first_failure(range(20), second)
    assert first == second


def no_check(patch: Patch) -> None:
    patch(Fence, "check", lambda self: None)


def check_before_listing(patch: Patch) -> None:
    def look(self: Any) -> bool:
        self._fence.check()
        simulator.hang(world().random.choice([0, 20]))  # the worst place for it
        fence, self._fence = self._fence, Unfenced()
        try:
            return original(self)
        finally:
            self._fence = fence

    original = SimulatedPublisher.look
    patch(SimulatedPublisher, "look", look)
    tasks_of_dead_runs_write(patch)


def tasks_of_dead_runs_write(patch: Patch) -> None:
    patch(parts, "_check_is_open", lambda task: None)


class Unfenced:
    def check(self) -> None:
        pass


def no_keys(patch: Patch) -> None:
    patch(SimulatedKeys, "add", lambda *_: set())


def adopted_keys_are_not_looked_up(patch: Patch) -> None:
    patch(SimulatedTable, "keys_among", lambda *_: set())


def parts_of_dead_runs_stay_in_place(patch: Patch) -> None:
    def recover(self: Any, fence: Any, run: str) -> None:
        for dead in self._runs("runs"):
            SimulatedPublisher(self, fence, dead).adopt()
        original(self, fence, run)

    def publish(self: Any, parts: Any, run: str) -> None:
        simulator.hang(world().random.choice([0, 20]))  # the worst place for it
        publish_parts(self, parts, run)

    original, publish_parts = FolderTable.recover, FolderTable.publish
    patch(FolderTable, "recover", recover)
    patch(FolderTable, "publish", publish)


def only_the_next_epoch_is_checked(patch: Patch) -> None:
    def check(self: Any) -> None:
        if self._work.read(fence_module._file(self._epoch + 1)) is not None:
            raise simulator.ImageVecError("fenced")

    patch(Fence, "check", check)


MUTANTS: dict[Callable[[Patch], None], int] = {
    no_check: 300,
    check_before_listing: 500,
    no_keys: 50,
    adopted_keys_are_not_looked_up: 100,
    parts_of_dead_runs_stay_in_place: 1000,
    only_the_next_epoch_is_checked: 300,
}
"""The number of interleavings in which each is caught."""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(lambda owner, name, value: monkeypatch.setattr(owner, name, value, raising=False))
    assert first_failure(range(MUTANTS[mutant]), Counter()) is not None
