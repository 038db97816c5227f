"""Simulates runs of ``extract`` that start, crash, hang and wake up, with one store among them.

    python -m tests.helpers.simulator --runs 100000 --seed 0

Real are ``Fence``, ``Publisher``, ``FolderTable`` and ``write_parts``. The store is a dictionary,
where each call is one step, as in an object store or on a local disk. Each actor (the main thread
of a driver, its heartbeat, an attempt of a task) is a greenlet that stops before each step. A
scheduler chooses who goes on, who crashes and who hangs, by a seed.

Simplified are: the files, JSON lists of keys and versions instead of Parquet (``_rows``,
``_rewritten``, ``_count``, ``to_parquet``, ``_keys_in``, ``_is_whole``); the vectors
(``_results``); the published keys, which are in memory (``_Keys``); Spark's queries (``known``,
``keys_among``, ``_changed_paths``, ``_stage_without``); and the clock. The times of the fence are
shorter, in the same proportions. ``overwrite`` and outdated paths are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pyarrow as pa
from greenlet import GreenletExit, getcurrent, greenlet

from imagevec.errors import ImageVecError
from imagevec.table import fence as fence_module
from imagevec.table import folder as folder_module
from imagevec.table import parts as parts_module
from imagevec.table import publish as publish_module
from imagevec.table.fence import Fence, Owner
from imagevec.table.folder import FolderTable
from imagevec.table.parts import ERRORS, FEATURES, Part, Task, open_run, write_parts
from imagevec.table.publish import Publisher
from imagevec.table.schema import CHANGED

DEST = "dest"
_WORK = f"{DEST}/_imagevec/"
_JOURNAL = f"{_WORK}replace"
_PLACES = {FEATURES: "", ERRORS: "_errors/"}

_STEP_SECONDS = 0.05
_BEAT_SECONDS, _STALE_SECONDS = 0.5, 3.0
_MOST_STEPS = 20_000
# Actors often hang before calls whose paths contain one of these.
_SLOW_PATHS = ("/", "/epochs/", "/runs/", "replace", "/staged/", "/changed/")

Versions = dict[str, int]
"""The keys of a source or a table, and the version of each."""


class BrokenPromiseError(AssertionError):
    """The table is not as the protocol promises."""


@dataclass
class Process:
    """A driver, or an attempt of a task. Its actors crash and hang together."""

    name: str
    place: str = ""
    is_alive: bool = True
    hangs_until: float = 0.0
    is_fragile: bool = True  # may crash and hang


class Actor(greenlet):  # type: ignore[misc]
    """One thread of a process."""

    def __init__(self, world: World, process: Process, action: Callable[[], object]) -> None:
        super().__init__(self._act, world.scheduler)
        self.process = process
        self.wakes_at = world.now
        self.waits_for: Callable[[], bool] = bool
        self.next_path = ""
        self._action = action

    def _act(self) -> None:
        with contextlib.suppress(ImageVecError, FileNotFoundError, GreenletExit):
            self._action()

    def can_act_at(self) -> float:
        """Returns the time from which it can act, if nobody else acts before."""
        wakes_at = 0.0 if self.waits_for() else self.wakes_at
        return max(wakes_at, self.process.hangs_until)


@dataclass
class World:
    """The store, the clock and all actors of one interleaving.

    Attributes:
        counts: The number of crashes, and so on.
    """

    seed: int
    now: float = 1000.0
    files: dict[str, bytes] = field(default_factory=dict)
    source: Versions = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    actors: list[Actor] = field(default_factory=list)
    runs: dict[str, Process] = field(default_factory=dict)
    steps: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.scheduler = getcurrent()
        self.is_object_store = self.random.random() < 0.5
        self.crash_rate = self.random.choice([0.0, 0.002, 0.01])
        self.hang_rate = self.random.choice([0.0, 0.002, 0.01])
        self.stickiness = self.random.choice([0.0, 0.5, 0.9])
        self.slow_path = self.random.choice(_SLOW_PATHS)
        self.lost_rate = self.random.choice([0.0, 0.02])
        self._last: Any = None
        self._seen: set[str] = set()
        self.attempts = 0

    def start(self, process: Process, action: Callable[[], object]) -> Actor:
        self.actors.append(actor := Actor(self, process, action))
        return actor

    def step(self, path: str = "") -> None:
        """Called by an actor before each step that others can see."""
        actor = getcurrent()
        if isinstance(actor, Actor):  # else it is the test
            if actor.process.is_alive:
                actor.next_path = path
                self.scheduler.switch()
            if not actor.process.is_alive:
                raise GreenletExit

    def wait(self, seconds: float, until: Callable[[], bool] = bool) -> None:
        """Lets an actor wait for a time, or until a condition holds."""
        actor = getcurrent()
        assert isinstance(actor, Actor)
        actor.wakes_at, actor.waits_for = self.now + seconds, until
        self.step()
        actor.wakes_at, actor.waits_for = self.now, bool

    def happens(self, rate: float) -> bool:
        return self.random.random() < rate

    def act(self, until: Callable[[], bool]) -> None:
        """Lets the actors act, in random order, until a condition holds or all have ended."""
        while self.actors and not until():
            while self._step_of_one():
                pass
            self.actors = [a for a in self.actors if not a.dead and a.process.is_alive]

    def _step_of_one(self) -> bool:
        """Returns whether the actor that acted goes on."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise BrokenPromiseError("the actors do not end")
        actor = self._chosen()
        self._disturb(actor)
        actor.switch()
        return not actor.dead and actor.process.is_alive

    def _chosen(self) -> Actor:
        self.now += self.random.random() * 2 * _STEP_SECONDS
        last = self._last
        if self.happens(self.stickiness) and last in self.actors and last.can_act_at() <= self.now:
            return last
        able = [actor for actor in self.actors if actor.can_act_at() <= self.now]
        if not able:
            self.now = min(actor.can_act_at() for actor in self.actors)
            able = [actor for actor in self.actors if actor.can_act_at() <= self.now]
        self._last = self.random.choice(able)
        return self._last

    def _disturb(self, actor: Actor) -> None:
        process = actor.process
        if not process.is_fragile:
            return
        if self.happens(self.crash_rate):
            process.is_alive = False
            self.counts["crashes"] += 1
        elif self.happens(self.hang_rate * (10 if self._is_slow(actor) else 1)):
            process.hangs_until = self.now + self.random.choice([1, 5, 20, 40])
            self.counts["hangs"] += 1

    def _is_slow(self, actor: Actor) -> bool:
        """Returns whether an actor is about to do what takes long in this world."""
        return self.slow_path in actor.next_path and not actor.next_path.endswith(".beat")

    def close(self) -> None:
        """Ends all actors, which can no longer do anything."""
        for actor in self.actors:
            actor.process.is_alive = False
        for actor in self.actors:
            actor.throw(GreenletExit)

    def put(self, path: str, data: bytes) -> None:
        self.files[path] = data
        self._changed(path)

    def rename(self, old: str, new: str) -> None:
        self.files[new] = self.files.pop(old)
        self._changed(old)
        self._changed(new)

    def remove(self, path: str) -> None:
        if self.files.pop(path, None) is not None:
            self._changed(path)

    def _changed(self, path: str) -> None:
        if path.startswith(_JOURNAL) or not path.startswith(_WORK):
            self.check()

    def visible(self) -> list[str]:
        """Returns the files of the table."""
        paths = (path for path in self.files if path.endswith(".parquet"))
        return [path for path in paths if not path.startswith(_WORK)]

    def rows(self) -> list[tuple[str, int]]:
        return [row for path in self.visible() for row in rows_of(self.files[path])]

    def check(self) -> None:
        """Raises an error if a key is twice in the table, or is missing that was there before."""
        keys = [key for key, _ in self.rows()]
        if len(keys) != len(set(keys)):
            twice = [key for key, count in Counter(keys).items() if count > 1]
            raise BrokenPromiseError(f"{twice} are twice in the table")
        is_replacing = any(path.startswith(_JOURNAL) for path in self.files)
        if not is_replacing and not self._seen.issubset(keys):
            raise BrokenPromiseError(f"{self._seen.difference(keys)} are missing")
        self._seen.update(keys)


@functools.lru_cache(maxsize=4096)
def rows_of(data: bytes) -> tuple[tuple[str, int], ...]:
    return tuple((key, version) for key, version in json.loads(data))


def is_bad(key: str, version: int) -> bool:
    """Returns whether an image has an error instead of a vector."""
    return (ord(key[0]) + version) % 3 == 0


class FakeFolder:
    """A folder of the store of the world, with the methods of ``Folder``."""

    def __init__(self, world: World, path: str) -> None:
        self.path = path
        self._world = world

    def sub(self, name: str) -> FakeFolder:
        return FakeFolder(self._world, self._at(name))

    def names(self, folder: str = "", only_files: bool = False) -> list[str]:
        start = f"{self._at(folder)}/"
        self._world.step(start)
        below = [path[len(start) :] for path in self._world.files if path.startswith(start)]
        if only_files:
            return sorted(name for name in below if "/" not in name)
        return sorted({name.partition("/")[0] for name in below})

    def read(self, path: str) -> bytes | None:
        self._world.step(self._at(path))
        return self._world.files.get(self._at(path))

    def write(self, path: str, data: bytes) -> None:
        place = self._at(path)
        for _ in self._tries(place):
            self._world.put(place, data)

    def create(self, path: str, data: bytes) -> bool:
        was_created = False
        place = self._at(path)
        for _ in self._tries(place):
            there = self._world.files.get(place)
            if there is None:
                self._world.put(place, data)
            was_created = there is None or (was_created and there == data)
        return was_created

    def move(self, source: str, target: str) -> bool:
        was_moved = False
        old, new = self._at(source), self._at(target)
        for _ in self._tries(old):
            data = self._world.files.get(old)
            if data is None:
                return was_moved and new in self._world.files
            if self._world.is_object_store:
                self._world.put(new, data)
                self._world.step(old)
                self._world.remove(old)
            else:
                self._world.rename(old, new)
            was_moved = True
        return was_moved

    def delete(self, path: str) -> None:
        place = self._at(path)
        for _ in self._tries(place):
            self._world.remove(place)
            for file in [file for file in self._world.files if file.startswith(f"{place}/")]:
                self._world.step(file)
                self._world.remove(file)

    def delete_empty(self, path: str) -> None:
        """Does nothing: there are no empty folders."""

    def _tries(self, path: str) -> Iterator[None]:
        """A request is sent again if its answer is lost."""
        self._world.step(path)
        yield
        while self._world.happens(self._world.lost_rate):
            self._world.step(path)
            yield

    def _at(self, path: str) -> str:
        return f"{self.path}/{path.strip('/')}".rstrip("/")


class Rows(list):
    """Keys and versions, with the methods of a table of Arrow that ``Publisher`` needs."""

    def column(self, name: str) -> Any:
        assert name == "path"
        return SimpleNamespace(to_pylist=lambda: [key for key, _ in self])


class SimulatedKeys:
    """The keys that a run has published, in memory."""

    def __init__(self) -> None:
        self._keys: set[tuple[str, str]] = set()

    def add(self, kind: str, keys: Iterable[str]) -> set[str]:
        old = {key for key in keys if (kind, key) in self._keys}
        self._keys.update((kind, key) for key in keys)
        return old


class SimulatedPublisher(Publisher):
    def _rows(self, part: Part) -> Any:
        data = self._folder.read(part.name)
        if data is None:
            raise FileNotFoundError(part.name)
        return Rows(rows_of(data))

    def _rewritten(self, part: Part, old: set[str]) -> Any:
        rows = Rows(row for row in self._rows(part) if row[0] not in old)
        world().counts["rewritten parts"] += 1
        if rows:
            self._folder.write(part.name, json.dumps(rows).encode())
        else:
            self._folder.delete(part.name)
        return rows

    def _count(self, part: Part, rows: Any) -> None:
        pass

    def _is_whole(self, part: Part) -> bool:
        return True


class Paths(set):
    """Keys, with the method of a data frame that ``FolderTable`` needs."""

    def distinct(self) -> Paths:
        return self


class SimulatedTable(FolderTable):
    """A table whose keys are read without Spark."""

    def __init__(self, folder: FakeFolder) -> None:
        super().__init__(cast(Any, None), cast(Any, folder))

    def versions(self, folder: Any = None) -> Versions:
        """Returns the keys in the files of a folder, by default the table."""
        folder = folder or self._folder
        found: Versions = {}
        for place in _PLACES.values() if folder is self._folder else ("",):
            for name in folder.names(place, only_files=True):
                if name.endswith(".parquet"):
                    found.update(rows_of(self._content(folder, f"{place}{name}")))
        return found

    def _content(self, folder: Any, file: str) -> bytes:
        data = folder.read(file)
        if data is None:
            raise FileNotFoundError(file)
        return data

    def keys_among(self, parts: list[Part], run: str) -> set[str]:
        published, folder = self.versions(), self.run_folder(run)
        keys = {key for part in parts for key, _ in rows_of(self._content(folder, part.name))}
        return published.keys() & keys

    def _changed_paths(self, run: str) -> Any:
        folders = [self._changed(run).sub(kind) for kind in _PLACES]
        return Paths(key for folder in folders for key in self.versions(folder)) or None

    def _stage_without(self, paths: Any, run: str) -> tuple[list[str], list[str]]:
        old, new = [], []
        for kind, place in _PLACES.items():
            for name in self._parquet_files(place):
                rows = rows_of(self._content(self._folder, f"{place}{name}"))
                rest = [row for row in rows if row[0] not in paths]
                if len(rest) < len(rows):
                    old.append(f"{place}{name}")
                if 0 < len(rest) < len(rows):
                    staged = f"part-{world().random.getrandbits(64):x}.parquet"
                    self.work.write(f"staged/{run}/{kind}/{staged}", json.dumps(rest).encode())
                    new.append(f"{place}{staged}")
        return old, new


def _to_json(rows: pa.Table, task: Task) -> bytes:
    pairs = zip(rows.column("path").to_pylist(), rows.column("version").to_pylist(), strict=True)
    return json.dumps(list(pairs)).encode()


def _keys_in(folder: FakeFolder, name: str) -> list[str]:
    data = folder.read(name)
    return [] if data is None else [key for key, _ in rows_of(data)]


def _results(batches: Iterable[pa.RecordBatch], task: Task, extract: object) -> Iterator[pa.Table]:
    for batch in batches:
        world().wait(world().random.choice([0, 0, 1, 4]))
        if batch.num_rows:
            yield pa.Table.from_batches([batch])


def _batches(rows: Iterable[tuple[str, int, bool]]) -> Iterator[pa.RecordBatch]:
    for row in rows:
        yield _batch(*row)


@functools.cache
def _batch(key: str, version: int, is_changed: bool) -> pa.RecordBatch:
    bad = is_bad(key, version)
    columns: dict[str, pa.Array] = {
        "path": pa.array([key]),
        "version": pa.array([version]),
        "width": pa.array([None if bad else 8], pa.int32()),
        "error": pa.array(["empty: 0 bytes" if bad else None], pa.string()),
        CHANGED: pa.array([is_changed]),
    }
    return pa.RecordBatch.from_pydict(columns)


class FakeThread:
    def __init__(self, target: Callable[..., object], args: tuple[Any, ...], daemon: bool) -> None:
        self._start = functools.partial(target, *args)

    def start(self) -> None:
        here = getcurrent()
        assert isinstance(here, Actor)
        self._actor = world().start(here.process, self._start)

    def join(self) -> None:
        world().wait(float("inf"), lambda: self._actor.dead)


class FakeEvent:
    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def wait(self, seconds: float) -> bool:
        world().wait(seconds, lambda: self._is_set)
        return self._is_set


class FenceTime:
    CLOCK_BOOTTIME = 7

    def time(self) -> float:
        return world().now

    monotonic = time

    def clock_gettime(self, clock: int) -> float:
        return world().now

    def sleep(self, seconds: float) -> None:
        world().wait(seconds)


class TaskTime:
    """A clock that makes parts of a random number of rows."""

    def monotonic(self) -> float:
        return world().random.choice([0.0, 50.0])

    def time(self) -> float:
        return 1000.0  # long after the start of the run


def _this_process(run: str) -> bytes:
    here = getcurrent()
    assert isinstance(here, Actor)
    world().runs[run] = here.process
    me = Owner(run, "host", here.process.place, 1, "", here.process.name)
    return json.dumps(dataclasses.asdict(me)).encode()


def _has_ended(owner: Owner) -> bool:
    here, there = getcurrent(), world().runs[owner.run]
    assert isinstance(here, Actor)
    return here.process.place == there.place and not there.is_alive


_world: World | None = None


def world() -> World:
    assert _world is not None
    return _world


def hang(seconds: float) -> None:
    """Lets the process of this actor hang."""
    here = getcurrent()
    assert isinstance(here, Actor)
    here.process.hangs_until = world().now + seconds
    world().step()


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Replaces what the protocol uses of the outside."""
    replaced: dict[Any, dict[str, Any]] = {
        fence_module: {
            "BEAT_SECONDS": _BEAT_SECONDS,
            "STALE_SECONDS": _STALE_SECONDS,
            "threading": SimpleNamespace(Thread=FakeThread, Event=FakeEvent),
            "time": FenceTime(),
            "_this_process": _this_process,
            "_has_ended": _has_ended,
            "logger": mock.MagicMock(),
        },
        parts_module: {
            "time": TaskTime(),
            "to_parquet": _to_json,
            "_keys_in": _keys_in,
            "_results": _results,
        },
        folder_module: {"Publisher": SimulatedPublisher},
        publish_module: {"_Keys": SimulatedKeys, "logger": mock.MagicMock()},
    }
    with contextlib.ExitStack() as stack:
        for module, names in replaced.items():
            stack.enter_context(mock.patch.multiple(module, **names))
        yield


class Driver:
    """A run of ``extract``, from its start to its end."""

    def __init__(self, number: int, process: Process) -> None:
        self.run = f"{number:02x}"
        self.process = process
        self.error: Exception | None = None
        self.is_done = False

    def __call__(self) -> None:
        try:
            self._extract()
            self.is_done = True
        except (ImageVecError, FileNotFoundError) as error:
            self.error = error
            world().counts["errors"] += 1

    def _extract(self) -> None:
        table = SimulatedTable(FakeFolder(world(), DEST))
        fence = Fence(table.work, DEST, self.run)
        with fence.held():
            owners = [path for path in world().files if path.startswith(f"{_WORK}epochs/")]
            world().counts["takeovers"] += any(not path.endswith(".beat") for path in owners[:-1])
            try:
                table.recover(fence, self.run)
                self._add_missing(table, fence)
            except Exception:
                with contextlib.suppress(Exception), fence.kept_if_it_fails():
                    fence.check()
                    table.recover(fence, self.run)
                raise
            fence.check()
            table.remove_work(self.run)

    def _add_missing(self, table: SimulatedTable, fence: Fence) -> None:
        known, source = table.versions(), dict(world().source)
        pending = [
            (key, version, key in known)
            for key, version in source.items()
            if known.get(key) != version
        ]
        if pending:
            self._compute(pending, table, fence)
        table.finish(self.run, (), fence.check)

    def _compute(self, pending: list[Any], table: SimulatedTable, fence: Fence) -> None:
        publisher = SimulatedPublisher(table, fence, self.run)
        places = table.published_folders(self.run)
        task = Task(table.run_folder(self.run), self.run, places, {}, None, (), "none", 0.0)
        open_run(task)
        images = 0
        for _ in range(1 + world().happens(0.3)):  # a stage may run again
            images = Stage(pending, task).run(publisher.look)
        publisher.look()
        if images > publisher.published.images:
            raise ImageVecError(f"{images} images were computed, but not published")


class Stage:
    """The tasks of a job, with retries and speculation. The driver looks meanwhile."""

    def __init__(self, pending: list[Any], task: Task) -> None:
        self._task = task
        self._partitions: dict[int, list[Any]] = {}
        for row in pending:
            self._partitions.setdefault(world().random.randrange(2), []).append(row)
        self._done: dict[int, int] = {}
        self._attempts: dict[int, list[Actor]] = {}

    def run(self, look: Callable[[], object]) -> int:
        """Returns the number of images that the tasks report."""
        for partition in self._partitions:
            self._attempts[partition] = []
        while remaining := self._partitions.keys() - self._done.keys():
            for partition in sorted(remaining):
                attempts = self._attempts[partition]
                running = [a for a in attempts if not a.dead and a.process.is_alive]
                if not running or (len(running) < 2 and world().happens(0.3)):
                    attempts.append(self._start(partition))
            world().wait(world().random.choice([0.2, 1, 3]))
            look()
        return sum(self._done.values())

    def _start(self, partition: int) -> Actor:
        world().attempts = attempt = world().attempts + 1
        rows = self._partitions[partition]
        driver = getcurrent()

        def compute() -> None:
            images = write_parts(_batches(rows), self._task, partition, attempt, cast(Any, None))
            self._done.setdefault(partition, images)
            if not driver.process.is_alive:
                world().counts["zombie tasks"] += 1

        return world().start(Process(f"task {attempt}"), compute)


def simulate(seed: int) -> Counter[str]:
    """Runs one interleaving, and returns the number of crashes, and so on.

    Raises:
        BrokenPromiseError: A key is missing, or twice in the table, or not in its newest version.
    """
    global _world
    _world = World(seed)
    try:
        _interleave(_world)
    finally:
        _world.close()
    return _world.counts


def _interleave(world: World) -> None:
    for key in "abcdef"[: world.random.randint(2, 6)]:
        world.source[key] = 1
    _fill(world)
    for number in range(1, world.random.randint(2, 4) + 1):
        process = Process(f"driver {number}", world.random.choice("xy"))
        world.start(process, functools.partial(_start_late, number, process))
    world.start(Process("source", is_fragile=False), _change_source)
    world.act(lambda: not any(_is_driver(actor) for actor in world.actors))
    world.now += _STALE_SECONDS  # the user waits, as the error says
    last = Driver(0xFF, Process("the last driver", "z", is_fragile=False))
    world.start(last.process, last)
    world.act(lambda: last.is_done or last.error is not None)
    if last.error is not None:
        raise BrokenPromiseError(f"the last run failed: {last.error!r}") from last.error
    _check_end(world)
    world.act(bool)  # tasks of dead drivers go on
    _check_end(world)


def _is_driver(actor: Actor) -> bool:
    return not actor.process.name.startswith("task")


def _fill(world: World) -> None:
    """Puts some keys into the table, in an earlier version or in that of the source."""
    for number in range(world.random.randint(0, 2)):
        keys = [key for key in world.source if world.happens(0.5) and key not in dict(world.rows())]
        for kind, place in _PLACES.items():
            rows = [(key, world.random.randint(0, 1)) for key in keys]
            rows = [row for row in rows if is_bad(*row) == (kind == ERRORS)]
            if rows:
                world.put(f"{DEST}/{place}part-{number}.parquet", json.dumps(rows).encode())
            keys = [key for key in keys if key not in dict(world.rows())]


def _start_late(number: int, process: Process) -> None:
    """Starts a driver, and starts it again while it fails."""
    for again in range(3):
        world().wait(world().random.uniform(0, 10))
        driver = Driver(16 * number + again, process)
        driver()
        if driver.is_done:
            return


def _change_source() -> None:
    """New versions and new keys appear while runs are under way."""
    for _ in range(world().random.randint(0, 3)):
        world().wait(world().random.uniform(0, 10))
        key = world().random.choice("abcdefg")
        world().source[key] = world().source.get(key, 0) + 1


def _check_end(world: World) -> None:
    world.check()
    if dict(world.rows()) != world.source:
        raise BrokenPromiseError(f"the table has {dict(world.rows())}, not {world.source}")


def first_failure(seeds: Iterable[int], counts: Counter[str]) -> tuple[int, str] | None:
    """Returns the first seed whose interleaving breaks a promise, and how. Adds to the counts."""
    with simulated():
        for seed in seeds:
            try:
                counts.update(simulate(seed))
            except BrokenPromiseError as error:
                return seed, str(error)
            counts["interleavings"] += 1
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.runs)
    counts: Counter[str] = Counter()
    failure = first_failure(seeds, counts)
    print(f"seeds {seeds.start} to {seeds.stop - 1}")
    for name, count in counts.most_common():
        print(f"{count:10,} {name}")
    if failure:
        raise SystemExit(f"seed {failure[0]}: {failure[1]}")


if __name__ == "__main__":
    main()
