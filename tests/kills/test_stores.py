"""Extractions to S3 and Azure that are killed, with speculation and two drivers at each start."""

from __future__ import annotations

import functools
import io
import json
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from obstore.store import AzureStore, ObjectStore, S3Store
from pyarrow import parquet

from imagevec import ImageVectorizer
from tests.cluster.extract_job import MASTER, OPTIONS
from tests.cluster.kills import (
    NO_IMAGE,
    WAIT_SECONDS,
    Files,
    Reader,
    start,
    strike,
    wait_for,
    write_images,
)
from tests.cluster.slow import PART_SECONDS, PAUSE, SLOW
from tests.helpers.clusters import kill_tree
from tests.helpers.object_store import (
    AZURE_ACCOUNT,
    AZURE_KEY,
    TEST_KEYS,
    azure_server,
    s3_server,
)

BUCKET = "kills"
IMAGES = 160
SEED = 5
VICTIMS = ["worker"] * 7 + ["tree", "driver", "jvm"]
BUSY_SHARE = 0.05  # of the requests
LONGEST_DELAY_SECONDS = 2.0
CLUSTER = "local-cluster[2,2,1024]"  # Spark does not speculate in local mode
SETTINGS = {
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.executor.memory": "512m",
    "spark.python.daemon.module": "imagevec.spark.daemon",
    "spark.task.maxFailures": "20",
    "spark.speculation": "true",
    "spark.speculation.interval": "100ms",
    "spark.speculation.minTaskRuntime": "500ms",
    "spark.speculation.multiplier": "1.2",
    "spark.speculation.quantile": "0.1",
}


class Busy:
    """In front of a store: it answers 503 to some requests, half of which it carries out."""

    def __init__(self, store: Callable[..., Iterable[bytes]]) -> None:
        self.answers: Counter[str] = Counter()
        self._store = store
        self._chance = random.Random(SEED)
        self._lock = threading.Lock()

    def __call__(self, request: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            number = self._chance.random()
            is_busy, is_done = number < BUSY_SHARE, number < BUSY_SHARE / 2
            self.answers["busy" if is_busy else "right"] += 1
        if not is_busy:
            return self._store(request, respond)
        length = int(request.get("CONTENT_LENGTH") or 0)
        request["wsgi.input"] = io.BytesIO(request["wsgi.input"].read(length))
        if is_done:
            for _ in self._store(request, lambda *_: None):
                pass
        respond("503 Slow Down", [("Content-Length", "0")])
        return []


class Place(NamedTuple):
    """A store that drivers write.

    Attributes:
        dest: The URI of the table.
        environment: The variables with which drivers and workers reach it.
        table: The objects of the table, through a client that is never refused.
        busy: The answers of the store, if it is one that refuses requests.
    """

    dest: str
    environment: dict[str, str]
    table: Table
    busy: Busy | None


@contextmanager
def busy_s3() -> Iterator[Place]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    with s3_server() as (endpoint, client):
        client.create_bucket(Bucket=BUCKET)
        busy = Busy(DomainDispatcherApplication(create_backend_app))
        server = make_server("127.0.0.1", 0, busy, threaded=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        environment = {
            **TEST_KEYS,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        }
        store = S3Store(
            BUCKET,
            endpoint=endpoint,
            region="us-east-1",
            access_key_id="test",
            secret_access_key="test",
            client_options={"allow_http": True},
        )
        try:
            yield Place(f"s3://{BUCKET}/table", environment, Table(store), busy)
        finally:
            server.shutdown()
            server.server_close()
            thread.join(30)


@contextmanager
def azure() -> Iterator[Place]:
    with azure_server(BUCKET) as connection:
        store = AzureStore(
            BUCKET,
            account_name=AZURE_ACCOUNT,
            account_key=AZURE_KEY,
            endpoint=connection.partition("BlobEndpoint=")[2],
            client_options={"allow_http": True},
        )
        environment = {"AZURE_STORAGE_CONNECTION_STRING": connection}
        yield Place(f"az://{BUCKET}/table", environment, Table(store), None)


class Table:
    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def objects(self, folder: str) -> Files:
        """Returns the names and ETags of the objects in a folder, in one answer of the store."""
        found = self._store.list(folder).collect()
        assert len(found) < 1000
        return {one["path"]: str(one["e_tag"]) for one in found}

    def files(self) -> Files:
        work = "table/_imagevec/"
        return {k: tag for k, tag in self.objects("table/").items() if not k.startswith(work)}

    def content(self, name: str) -> bytes:
        return bytes(self._store.get(name).bytes())

    def rows(self, name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(self.content(name))).to_pylist()
        return rows

    def keys(self, name: str) -> list[str]:
        return [row["path"] for row in self.rows(name)]

    def owner(self) -> dict[str, Any]:
        """Returns the run and the process that have the last epoch, or nothing."""
        epochs = [name for name in self.objects("table/_imagevec/epochs/") if name[-1].isdigit()]
        owner: dict[str, Any] = json.loads(self.content(max(epochs))) if epochs else {}
        return owner


class Drivers:
    """Starts drivers in pairs. Of each pair, one is refused, and the other one runs.

    Args:
        source: The folder of images.
        place: Where the table is.
        log: The file of their output.
        environment: Further variables of their environment.
    """

    def __init__(self, source: Path, place: Place, log: Path, environment: dict[str, str]) -> None:
        self._source = source
        self._place = place
        self._log = log
        self._environment = environment

    def one(self, **environment: str) -> subprocess.Popen[bytes]:
        variables = {**self._place.environment, **self._environment, **environment}
        return start(self._source, self._place.dest, self._log, **variables)

    def winner(self, last_run: str | None) -> tuple[subprocess.Popen[bytes], str]:
        """Starts two, and returns the one that comes after another run, with its run."""
        pair = [self.one(**{PAUSE: "0.25", SLOW: "4", PART_SECONDS: "2"}) for _ in range(2)]
        owner: dict[str, Any] = {}

        def is_decided() -> bool:
            owner.update(self._place.table.owner())
            is_new = owner.get("run") not in (None, last_run)
            return is_new and any(process.poll() is not None for process in pair)

        try:
            deadline = time.monotonic() + WAIT_SECONDS
            while not is_decided():
                assert time.monotonic() < deadline, self._log.read_text()[-3000:]
                time.sleep(0.05)
            first, second = sorted(pair, key=lambda process: process.pid != owner["process"])
            assert second.wait(WAIT_SECONDS) == 1
            assert first.poll() is None
        except BaseException:
            for process in pair:
                kill_tree(process)
            raise
        return first, owner["run"]


def has_written(table: Table, run: str) -> bool:
    """Returns whether a task of the run has written a part, published or not."""
    return any(f"part-{run}-" in name for name in table.objects("table/"))


def ten_kills(drivers: Drivers, table: Table) -> None:
    chance = random.Random(SEED)
    process, run = None, None
    for victim in chance.sample(VICTIMS, len(VICTIMS)):
        if process is None:
            process, run = drivers.winner(run)
            wait_for(process, functools.partial(has_written, table, run))
        time.sleep(chance.uniform(0, LONGEST_DELAY_SECONDS))
        strike(process, victim, chance)
        if victim != "worker":
            kill_tree(process)
            process = None
    if process is not None:
        kill_tree(process)


@pytest.mark.parametrize("store", [busy_s3, azure])
def test_kills_with_speculation(
    tmp_path: Path, store: Callable[[], AbstractContextManager[Place]]
) -> None:
    source, log = tmp_path / "source", tmp_path / "log"
    write_images(source, IMAGES)
    settings = " ".join(f"--conf {name}={value}" for name, value in SETTINGS.items())
    with store() as place:
        table = place.table
        environment = {
            "SPARK_LOCAL_IP": "127.0.0.1",
            MASTER: CLUSTER,
            "PYSPARK_SUBMIT_ARGS": f"--master {CLUSTER} {settings} pyspark-shell",
        }
        drivers = Drivers(source, place, log, environment)
        reader = Reader(table.files, table.keys)
        with reader.looking():
            ten_kills(drivers, table)
            done = sum(len(table.keys(name)) for name in table.files())
            assert 0 < done < IMAGES
            last = drivers.one()
            try:
                assert last.wait(WAIT_SECONDS) == 0, log.read_text()[-3000:]
            finally:
                kill_tree(last)
        assert reader.looks > 0 and not reader.wrong
        assert place.busy is None or place.busy.answers["busy"] > 10
        bad = Counter(f"file:{p}" for p in source.iterdir() if p.read_bytes() == NO_IMAGE)
        files = table.files()
        found = {name: Counter(table.keys(name)) for name in files}
        errors = sum((found[name] for name in files if "/_errors/" in name), Counter[str]())
        assert errors == bad
        everything = Counter(f"file:{path}" for path in source.iterdir())
        assert sum(found.values(), Counter[str]()) == everything
        assert not table.objects("table/_imagevec/")
        vectorizer = ImageVectorizer(**OPTIONS)
        for row in table.rows(max(files))[:5]:
            image = Path(row["path"].removeprefix("file:")).read_bytes()
            expected = vectorizer.extract_features(image)
            assert row["features"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
