"""``imagevec extract`` and ``similar``: resumed, killed, with files that come, change and go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import torch
import webdataset
from torchvision.models import squeezenet1_1

from imagevec import ImageVectorizer, quantize
from imagevec.cli import main
from imagevec.cli.doctor import show
from tests.helpers.clusters import session_of
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import saved

MODEL = ["--model", "squeezenet1_1", "--weights", "random", "--engine", "torch"]
WAIT_SECONDS = 240


@pytest.fixture(scope="module", autouse=True)
def on_loopback() -> Iterator[None]:
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    yield
    del os.environ["SPARK_LOCAL_IP"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images, some with names that look like globs, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    names = ["a b.png", "a[1] {x}.png", "star*.png", "100%.png"]
    names += [f"{number}.png" for number in range(4)] + ["sub/x.png", "sub/y.png"]
    for seed, name in enumerate(names):
        (folder / name).write_bytes(encode(photo(seed=seed)))
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    """A command that succeeds, by its JSON."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


def extract(capsys: pytest.CaptureFixture[str], photos: Path, table: Path, *more: object) -> dict:
    options = (*MODEL, "--recursive", "--master", "local[2]")
    return run(capsys, "extract", photos, table, *options, *more)


def rows(table: Path) -> dict[str, list[float]]:
    read = ds.dataset(table, format="parquet", ignore_prefixes=["_", "."]).to_table().to_pylist()
    by_path = {row["path"]: row for row in read}
    assert len(by_path) == len(read), "a file is there twice"
    return {path: row["features"] for path, row in by_path.items()}


def uri(path: Path) -> str:
    return f"file:{path}"


def test_a_folder_becomes_a_table_and_is_kept_up(capsys, photos, tmp_path):
    table = tmp_path / "my table"
    result = extract(capsys, photos, table)
    assert (result["found"], result["done_before"]) == (11, 0)
    assert result["features"] == 10
    assert result["errors"] == {"unsupported_format": 1}
    vectors = rows(table)
    good = [path for path in photos.rglob("*.png") if path.name != "bad.png"]
    assert set(vectors) == {uri(path) for path in good}
    vectorizer = ImageVectorizer(model="squeezenet1_1", weights="random", engine="torch")
    for path in good:
        expected = vectorizer.extract_features(path.read_bytes())
        assert vectors[uri(path)] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    (error,) = ds.dataset(table / "_errors").to_table().to_pylist()
    assert error["path"] == uri(photos / "bad.png")
    assert error["error"].startswith("unsupported_format:")
    assert not (table / "_imagevec").exists()

    again = extract(capsys, photos, table)
    assert (again["done_before"], again["features"], again["errors"]) == (11, 0, {})

    (photos / "new.png").write_bytes(encode(photo(seed=20)))
    (photos / "0.png").write_bytes(encode(photo(90, 60, seed=21)))
    (photos / "bad.png").write_bytes(encode(photo(seed=22)))
    (photos / "1.png").unlink()
    kept_up = extract(capsys, photos, table)
    assert (kept_up["found"], kept_up["features"], kept_up["errors"]) == (11, 3, {})
    later = rows(table)
    assert set(later) == {*vectors, uri(photos / "new.png"), uri(photos / "bad.png")}
    changed = {path for path in vectors if later[path] != vectors[path]}
    assert changed == {uri(photos / "0.png")}
    assert not (table / "_errors").exists()
    assert extract(capsys, photos, table)["features"] == 0


def test_a_pattern_without_subfolders(capsys, photos, tmp_path):
    options = (*MODEL, "--pattern", "a*.png", "--master", "local[2]")
    result = run(capsys, "extract", photos, tmp_path / "table", *options)
    assert (result["found"], result["features"]) == (2, 2)


def test_other_features_are_refused_or_replaced(capsys, photos, tmp_path):
    table = tmp_path / "table"
    first = extract(capsys, photos, table)
    arguments = ["extract", str(photos), str(table), *MODEL, "--recursive", "--master", "local[2]"]
    assert main([*arguments, "--normalize"]) == 1
    message = capsys.readouterr().err
    assert "normalize False and True" in message and "--overwrite" in message
    assert "Traceback" not in message
    nowhere = ["extract", str(photos / "nowhere"), *arguments[2:], "--overwrite"]
    assert main(nowhere) == 1
    assert len(rows(table)) == 10
    replaced = extract(capsys, photos, table, "--normalize", "--overwrite")
    assert replaced["features"] == 10
    assert replaced["fingerprint"] != first["fingerprint"]


def test_overwrite_spares_what_is_no_table_of_features(capsys, photos, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    arguments = [
        "extract",
        str(photos),
        str(tmp_path),
        *MODEL,
        "--overwrite",
        "--master",
        "local[2]",
    ]
    assert main(arguments) == 1
    assert "has no features" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_source_that_is_not_there(capsys, tmp_path):
    """It is looked at before the model."""
    arguments = ["extract", str(tmp_path / "nothing"), str(tmp_path / "table")]
    assert main([*arguments, "--model", "resnet5000", "--master", "local[2]"]) == 1
    assert capsys.readouterr().err == f"imagevec: {tmp_path / 'nothing'} does not exist\n"


@pytest.mark.parametrize("dest", ["", "table", "sub/table"])
def test_a_table_among_its_images_is_refused(capsys, photos, dest):
    before = set(photos.rglob("*"))
    assert main(["extract", str(photos), str(photos / dest), *MODEL, "--master", "local[1]"]) == 1
    assert "DEST is inside SRC" in capsys.readouterr().err
    assert set(photos.rglob("*")) == before


def test_what_spark_prints(tmp_path):
    """Nothing; of an error one line, without a stack trace."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.parquet").write_bytes(b"no table")
    (tmp_path / "images" / "1.png").write_bytes(encode(photo()))
    command = [sys.executable, "-m", "imagevec", "extract", "images", "table", *MODEL]
    command += ["--master", "local[1]", "--quiet"]
    done = subprocess.run(
        [*command, "--pattern", "*.png"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("1 image found")
    assert done.stderr == ""
    done = subprocess.run(
        [*command, "--column", "content"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "0.parquet" in done.stderr.splitlines()[-1]
    assert "\tat " not in done.stderr and "Traceback" not in done.stderr


SESSION = """
import sys
from pyspark.sql import SparkSession
from imagevec import extract

spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
extract(sys.argv[1], "donn\\u00e9es", spark=spark, model="squeezenet1_1", weights="random")
"""


@pytest.mark.parametrize("is_command", [True, False], ids=["command", "session"])
def test_dest_that_is_not_ascii_in_the_posix_locale(photos, tmp_path, is_command):
    """Also in a session whose JVM has started in that locale: it does not access DEST."""
    environment = {**os.environ, "LC_ALL": "POSIX"}
    options: Any = {"env": environment, "capture_output": True, "text": True}
    command = [sys.executable, "-c", SESSION, str(photos)]
    if is_command:
        command = [sys.executable, "-m", "imagevec", "extract", str(photos), "données", *MODEL]
        command += ["--master", "local[1]"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, **options)
        assert done.returncode == 0, done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"photos", "données"}
        assert len(rows(tmp_path / "données")) == 8


def test_a_table_of_images(capsys, tmp_path):
    images: list[Any]
    images = [(f"id{number}", encode(photo(seed=number)), number) for number in range(5)]
    images.append(("none", None, 5))
    with session_of("local[2]") as spark:
        frame = spark.createDataFrame(images, "id string, jpeg binary, number int")
        frame.write.parquet(str(tmp_path / "images"))
    options = ("--column", "jpeg", "--key", "id", *MODEL, "--master", "local[2]")
    command = ("extract", tmp_path / "images", tmp_path / "table", *options)
    where = ("--where", "id <> 'id4'", "--keep", "id,number")
    result = run(capsys, *command, *where)
    assert (result["found"], result["features"], result["nulls"]) == (5, 4, 1)
    assert set(rows(tmp_path / "table")) == {f"id{number}" for number in range(4)}
    (null,) = ds.dataset(tmp_path / "table" / "_errors").to_table().to_pylist()
    assert (null["path"], null["error"], null["number"]) == ("none", None, 5)
    result = run(capsys, *command, "--keep", "id,number")
    assert (result["done_before"], result["features"], result["nulls"]) == (5, 1, 0)
    assert main(["extract", str(tmp_path / "images"), "t", "--column", "jpg", *MODEL]) == 1
    assert "did you mean 'jpeg'" in capsys.readouterr().err


MANY = 300  # so that the job is not over when its first part is in the table


def many(folder: Path) -> Path:
    folder.mkdir()
    for seed in range(MANY):
        (folder / f"{seed}.png").write_bytes(encode(photo(seed=seed)))
    return folder


def job(photos: Path, table: Path) -> subprocess.Popen[bytes]:
    """The command, with tasks of a few files, in a process group of its own."""
    program = (
        "import sys; from imagevec.cli import main; from imagevec.table import sources;"
        "sources._TASK_BYTES = 4 * sources._LEAST_BYTES; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "extract", str(photos), str(table), *MODEL]
    command += ["--master", "local[2]"]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)


def wait_for_parts(process: subprocess.Popen[bytes], table: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not list(table.glob("part-*.parquet")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended too early"
        time.sleep(0.02)


def test_a_run_that_is_killed_goes_on(capsys, tmp_path):
    photos, table = many(tmp_path / "photos"), tmp_path / "table"
    process = job(photos, table)
    wait_for_parts(process, table)
    os.killpg(process.pid, signal.SIGKILL)  # this process, its JVM, its workers
    process.communicate()
    survived = rows(table)
    assert 0 < len(survived) < MANY
    result = extract(capsys, photos, table)
    assert len(survived) <= result["done_before"]  # what was written and not yet moved, too
    assert result["features"] == MANY - result["done_before"]
    assert len(rows(table)) == MANY
    assert not (table / "_imagevec").exists()


def test_a_run_that_is_interrupted_goes_on(capsys, tmp_path):
    photos, table = many(tmp_path / "photos"), tmp_path / "table"
    process = job(photos, table)
    wait_for_parts(process, table)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    printed = process.communicate(timeout=WAIT_SECONDS)[1].decode()
    assert process.returncode == 130, printed
    assert printed.splitlines()[-1] == "imagevec: interrupted"
    for word in ("py4j", "KeyboardInterrupt", "ERROR", "java."):
        assert word not in printed, printed
    survived = rows(table)
    assert 0 < len(survived) < MANY
    result = extract(capsys, photos, table)
    assert len(survived) <= result["done_before"]  # a task may have written while it was ended
    assert result["features"] == MANY - result["done_before"]
    assert len(rows(table)) == MANY


def test_advice_is_given_as_flags(capsys, photos, tmp_path):
    """Where a person types it, and not as Python has it."""
    arguments = ["extract", str(photos), str(tmp_path / "table"), "--master", "local[1]"]
    assert main([*arguments, "--model", "resnet18"]) == 1
    message = capsys.readouterr().err
    assert "--weights" in message and "weights=" not in message


def test_shards(capsys, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
            for number in range(3):
                image = encode(photo(seed=number))
                writer.write({"__key__": f"{shard}-{number}", "png": image, "cls": number})
    options = ("--format", "webdataset", "--keep", "cls", *MODEL, "--master", "local[2]")
    result = run(capsys, "extract", folder, tmp_path / "table", *options)
    assert (result["found"], result["features"], result["errors"]) == (6, 6, {})
    read = ds.dataset(tmp_path / "table", format="parquet", ignore_prefixes=["_", "."]).to_table()
    assert dict(zip(read["path"].to_pylist(), read["cls"].to_pylist(), strict=True)) == {
        f"{shard}-{number}": str(number) for shard in range(2) for number in range(3)
    }


def test_the_doctor(capsys):
    facts = run(capsys, "doctor", "--master", "local[2]")
    assert facts["java"] and facts["versions"]["pyspark"] and facts["cores"] >= 1
    assert facts["spark"]["spark.sql.execution.arrow.maxRecordsPerBatch"] == 10_000
    assert facts["spark"]["spark.sql.execution.arrow.maxBytesPerBatch"] == 64 << 20
    assert "spark.sql.execution.arrow.maxBytesPerBatch" in show(facts)


def test_similar(capsys, photos, tmp_path):
    """By a model of one's own weights, which the table knows by their digest alone."""
    table, weights = tmp_path / "table", tmp_path / "weights.pth"
    saved(squeezenet1_1, weights)
    options = ("--model", "squeezenet1_1", "--weights", weights, "--recursive")
    run(capsys, "extract", photos, table, *options, "--master", "local[2]")
    weights.unlink()
    query = photos / "2.png"
    copy = tmp_path / "copy.png"
    copy.write_bytes(query.read_bytes())
    queries = ("--query", copy, "--query", query, "--query", photos / "3.png")
    found = run(capsys, "similar", table, *queries, "-k", 10)["queries"]
    assert run(capsys, "similar", table, "--format", "parquet", *queries)["queries"] == found
    copied, own, other = found
    assert [copied["query"], own["query"]] == [str(copy), str(query)]
    of_copy, of_table = copied["neighbours"], own["neighbours"]
    assert len(other["neighbours"]) == len(of_table) == 9
    assert of_copy[0]["path"] == uri(query)
    assert of_copy[0]["cosine"] == pytest.approx(1, abs=1e-3)
    assert [row["path"] for row in of_copy[1:]] == [row["path"] for row in of_table]
    assert uri(query) not in [row["path"] for row in of_table]
    assert main(["similar", str(tmp_path / "nothing"), "--query", str(query)]) == 1
    assert main(["similar", str(table), "--query", str(photos / "nothing.png")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def int8_model(folder: Path) -> Path:
    pytest.importorskip("nncf")
    images = [encode(photo(64 + i, 64, seed=i)) for i in range(10)]
    quantize(images, output=folder / "int8", model=tiny, weights="random", normalize=True)
    return folder / "int8"


def exported_model(folder: Path) -> Path:
    images = torch.zeros(2, 3, 32, 32)
    batch = torch.export.Dim("batch")
    program = torch.export.export(tiny().eval(), (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "model.pt2")
    return folder / "model.pt2"


@pytest.mark.parametrize("make", [int8_model, exported_model])
def test_a_model_that_is_a_file(capsys, photos, tmp_path, make):
    model, table, copy = make(tmp_path), tmp_path / "table", tmp_path / "copy.png"
    options = ("--model", model, "--recursive", "--master", "local[2]")
    assert run(capsys, "extract", photos, table, *options)["features"] == 10
    copy.write_bytes((photos / "2.png").read_bytes())
    assert main(["similar", str(table), "--query", str(copy)]) == 1
    assert "give it as --model" in capsys.readouterr().err
    found = run(capsys, "similar", table, "--query", copy, "--model", model, "-k", 1)
    assert found["queries"][0]["neighbours"][0]["path"] == uri(photos / "2.png")
