"""An object store that is busy, and down for a while: no image is taken for a bad one."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow.dataset as ds
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from pyspark.sql import DataFrame, SparkSession
from werkzeug.serving import make_server

from imagevec import ImageVecError, ImageVectorizer, extract
from tests.helpers.clusters import session_of
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo

TINY: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}

BUCKET = "photos"
IMAGES = {f"2024/{number:02} ä@#.png": encode(photo(40, 30, seed=number)) for number in range(60)}
MISSING = [f"2024/missing-{number}.png" for number in range(3)]

BUSY_SHARE = 0.05  # of the objects
BUSY_SECONDS = 10.0  # from the first request for an object
DOWN_SECONDS = 20.0
DOWN_AT_REQUEST = 30  # the connections are cut from then on


class Trouble:
    """In front of a store: some objects are busy at first, and the store is down for a while."""

    def __init__(self, store: Callable[..., Iterable[bytes]]) -> None:
        self._store = store
        self._lock = threading.Lock()
        self.calm()

    def calm(self) -> None:
        with self._lock:
            self._busy: set[str] = set()
            self._down_at = 0
            self._down_until = 0.0
            self._first: dict[str, float] = {}
            self.answers: Counter[str] = Counter()

    def begin(self) -> None:
        self.calm()
        with self._lock:
            keys = random.Random(0).sample(sorted(IMAGES), round(BUSY_SHARE * len(IMAGES)))
            self._busy = {f"/{BUCKET}/{key}" for key in keys}
            self._down_at = DOWN_AT_REQUEST

    def __call__(self, request: dict[str, Any], respond: Callable) -> Iterable[bytes]:
        path = request["PATH_INFO"].encode("latin-1").decode()  # as WSGI has it
        answer = self._answer(path)
        if answer == "down":
            request["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError  # the server takes it that the client is gone
        if answer == "busy":
            respond("503 Slow Down", [("Content-Length", "0")])
            return []
        return self._store(request, respond)

    def _answer(self, path: str) -> str:
        with self._lock:
            now = time.monotonic()
            if self._down_at and self.answers.total() >= self._down_at:
                self._down_at, self._down_until = 0, now + DOWN_SECONDS
            first = self._first.setdefault(path, now)
            answer = "right"
            if now < self._down_until:
                answer = "down"
            elif path in self._busy and now < first + BUSY_SECONDS:
                answer = "busy"
            self.answers[answer] += 1
            return answer


@pytest.fixture(scope="module")
def store() -> Iterator[tuple[int, Trouble]]:
    """The port of an object store on loopback that has the images, and its trouble."""
    trouble = Trouble(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, trouble, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{server.server_port}",
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
    )
    client.create_bucket(Bucket=BUCKET)
    for key, image in IMAGES.items():
        client.put_object(Bucket=BUCKET, Key=key, Body=image)
    client.close()
    yield server.server_port, trouble
    server.shutdown()
    server.server_close()
    thread.join(30)


@pytest.fixture(scope="module")
def session(store: tuple[int, Trouble]) -> Iterator[SparkSession]:
    """Its workers, and this process, know the store by their environment."""
    port, _ = store
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    # A JVM of an earlier test, which goes on, has the environment that it was started with.
    conf = {f"spark__executorEnv__{name}": value for name, value in environment.items()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        for name, value in environment.items():
            patched.setenv(name, value)
        with session_of("local[2]", **conf) as spark:
            yield spark


@pytest.fixture(scope="module")
def expected() -> dict[str, list[float]]:
    vectorizer: Any = ImageVectorizer(**TINY)
    return {key: vectorizer.extract_features(image) for key, image in IMAGES.items()}


def uri(key: str, port: int) -> str:
    quoted = key.replace("#", "%23").replace(" ", "%20")
    return f"s3://{BUCKET}/{quoted}?endpoint_override=127.0.0.1:{port}&scheme=http"


def frame_of(session: SparkSession, folder: Path, paths: list[str]) -> DataFrame:
    frame = session.createDataFrame([(path,) for path in paths], "path string")
    frame.repartition(4).write.parquet(str(folder))
    return session.read.parquet(str(folder))


def rows(table: Path) -> dict[str, dict[str, Any]]:
    read = ds.dataset(table, format="parquet", ignore_prefixes=["_", "."]).to_table().to_pylist()
    by_path = {row["path"]: row for row in read}
    assert len(by_path) == len(read), "an image is there twice"
    return by_path


def test_trouble_that_passes_leaves_no_trace(session, store, expected, tmp_path):
    port, trouble = store
    keys = {uri(key, port): key for key in IMAGES}
    missing = [uri(key, port) for key in MISSING]
    table = tmp_path / "table"
    frame = frame_of(session, tmp_path / "images", [*keys, *missing])
    options = {"column": "path", "key": "path", **TINY}
    trouble.begin()
    report = extract(frame, table, **options)
    seen = trouble.answers
    assert seen["busy"] and seen["down"] and seen["right"] >= len(keys), seen
    assert (report.found, report.features) == (63, 60)
    assert (report.errors, report.nulls) == ({"unreadable_path": 3}, 0)
    found = rows(table)
    assert found.keys() == keys.keys()
    for path, key in keys.items():
        assert found[path]["features"] == pytest.approx(expected[key], rel=1e-4, abs=1e-6)
    errors = ds.dataset(table / "_errors").to_table().to_pylist()
    assert {row["path"] for row in errors} == set(missing)
    assert {row["error"].partition(":")[0] for row in errors} == {"unreadable_path"}

    trouble.calm()
    again = extract(frame, table, **options)
    assert (again.done_before, again.features, again.errors) == (63, 0, {})
    assert not trouble.answers, "what is done is not read again"


def test_a_folder_of_an_object_store(session, store, expected, tmp_path):
    _, trouble = store
    trouble.calm()
    report = extract(f"s3://{BUCKET}/2024", tmp_path / "table", **TINY)
    assert (report.found, report.features, report.errors) == (60, 60, {})
    sizes = {row["length"] for row in rows(tmp_path / "table").values()}
    assert sizes == {len(image) for image in IMAGES.values()}
    found = sorted(row["features"] for row in rows(tmp_path / "table").values())
    for ours, theirs in zip(found, sorted(expected.values()), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    again = extract(f"s3://{BUCKET}/2024/", tmp_path / "table", **TINY)
    assert (again.done_before, again.features) == (60, 0)


def test_a_store_that_stays_down_fails_the_job(session, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        path = uri("2024/a.png", taken.getsockname()[1])
    frame = frame_of(session, tmp_path / "images", [path])
    options = {"column": "path", "key": "path", "read_timeout_seconds": 3, **TINY}
    with pytest.raises(ImageVecError) as failed:
        extract(frame, tmp_path / "table", **options)
    assert str(failed.value).startswith(f"{path} cannot be read: ")
    assert list((tmp_path / "table").rglob("*.parquet")) == []
