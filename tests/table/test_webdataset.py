"""Shards of WebDataset: whole, cut off at any place, and mended."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import webdataset
from pyspark.sql import SparkSession

from imagevec import OptionError, ReadError, WebDatasetSource, extract
from imagevec.table import webdataset as shards_module
from imagevec.table.webdataset import batches, shards
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo

OPTIONS: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}
MEMBERS = ("json", "cls", "txt")


def sample(number: int, prefix: str = "sample") -> dict[str, Any]:
    return {
        "__key__": f"{prefix}{number:03}",
        "jpg" if number % 2 else "png": encode(photo(20, 16, seed=number), "PNG"),
        "json": {"number": number},
        "cls": number,
        **({"txt": f"größe {number}"} if number % 3 else {}),
    }


def write_shard(path: Path, samples: list[dict[str, Any]]) -> Path:
    """By the package that people use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=encoded) as writer:
        for one in samples:
            writer.write(one)
    return path


def encoded(one: dict[str, Any]) -> dict[str, Any]:
    texts: dict[str, Callable[[Any], str]] = {"json": json.dumps, "cls": str, "txt": str}
    return {
        name: texts[name](value).encode() if name in texts else value for name, value in one.items()
    }


def rows(
    shard: Path, members: tuple[str, ...] = MEMBERS, images: bool = True, **options: int
) -> list[dict]:
    found = (batch.to_pylist() for batch in batches(str(shard), members, images, **options))
    return list(itertools.chain.from_iterable(found))


def row_of(number: int, shard: Path) -> dict[str, Any]:
    one = encoded(sample(number))
    return {
        "__key__": one["__key__"],
        "__url__": str(shard),
        "image": one.get("jpg", one.get("png")),
        "error": None,
        **{name: one[name].decode() if name in one else None for name in MEMBERS},
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the package's
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_samples_of_the_package(tmp_path: Path, name: str) -> None:
    shard = write_shard(tmp_path / name, [sample(number) for number in range(200)])
    assert rows(shard) == [row_of(number, shard) for number in range(200)]
    keys = [row["__key__"] for row in rows(shard, images=False)]
    assert keys == [f"sample{number:03}" for number in range(200)]
    assert all(row["image"] is None for row in rows(shard, images=False))
    package = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
    assert keys == [one["__key__"] for one in package]


def tar_of(members: list[tuple[str, bytes]], mode: Any = "w", **options: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def test_names_of_members(tmp_path: Path) -> None:
    long = "d" * 60 + "/" + "e" * 150
    members = [
        ("a/x.y/1.JPG", b"1"),
        ("a/x.y/1.seg.png", b"mask"),
        ("./2.json", b"{}"),
        ("./2.webp", b"2"),
        ("./2.png", b"not the first"),
        ("__meta__.json", b"{}"),
        (".DS_Store", b""),
        ("._2.png", b"of a Mac"),
        ("README", b"no extension"),
        (f"{long}.png", b"3"),
        ("4.txt", b"no image"),
    ]
    shard = tmp_path / "a.tar"
    shard.write_bytes(tar_of(members))
    images = {row["__key__"]: row["image"] for row in rows(shard)}
    assert images == {"a/x.y/1": b"1", "./2": b"2", long: b"3", "4": None}
    assert [row["seg.png"] for row in rows(shard, ("seg.png",))] == ["mask", None, None, None]


def small_tar(mode: str) -> bytes:
    members: list[tuple[str, bytes]] = []
    for number in range(4):
        members.append((f"s{number}.jpg", bytes([number]) * (700 + 512 * number)))
        members.append((f"s{number}.json", b'{"number": %d}' % number))
    members.append(("s4.png", b"4" * 512))
    return tar_of(members, mode)


@pytest.mark.parametrize(("mode", "step"), [("w", 64), ("w:gz", 1)])
def test_a_shard_that_is_cut_off(tmp_path: Path, mode: str, step: int) -> None:
    """What is read is what was there, and what is not is reported: by both passes alike."""
    data = small_tar(mode)
    shard = tmp_path / "a.tar"
    shard.write_bytes(data)
    whole = rows(shard)
    assert [row["__key__"] for row in whole] == [f"s{number}" for number in range(5)]
    lengths = set()
    for length in range(0, len(data), step):
        shard.write_bytes(data[:length])
        found = rows(shard)
        samples = [row for row in found if row["__key__"]]
        assert samples == whole[: len(samples)]
        if len(found) > len(samples):
            error = found[-1]["error"]
            reported = {**dict.fromkeys(whole[0]), "__url__": str(shard), "error": error}
            assert found[-1] == reported
            assert error.startswith(f"corrupt: {shard} is damaged after {len(samples)} samples: ")
        else:
            assert samples == whole  # what is missing is padding
        keys = [(row["__key__"], row["error"]) for row in rows(shard, images=False)]
        assert keys == [(row["__key__"], row["error"]) for row in found]
        lengths.add(len(samples))
    assert lengths == set(range(6)) if mode == "w" else lengths <= set(range(6))


def test_a_shard_with_damage_in_its_middle(tmp_path: Path) -> None:
    data = bytearray(small_tar("w"))
    header = data.index(b"s2.jpg")
    data[header + 150] ^= 0xFF  # of its checksum
    (tmp_path / "a.tar").write_bytes(data)
    *samples, error = rows(tmp_path / "a.tar")
    assert [row["__key__"] for row in samples] == ["s0"]  # of s1, nobody knows whether it is whole
    assert "is damaged after 1 samples" in error["error"]


@pytest.mark.parametrize(
    "content", [b"", b"x", b"no tar" * 1000, b"\x1f\x8b", b"\x1f\x8b\x08" + b"x" * 99]
)
def test_a_file_that_is_no_shard(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    (row,) = rows(tmp_path / "a.tar")
    assert row["__key__"] is None
    assert "a.tar is damaged after 0 samples" in row["error"]


def test_an_empty_shard(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([]))
    assert rows(tmp_path / "a.tar") == []


class Endless(io.RawIOBase):
    """A tar file without an end."""

    def __init__(self) -> None:
        self._member = tar_of([("0.jpg", b"x" * 5000)])[: 512 + 5120]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset if whence == 0 else self._at + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        start = self._at % len(self._member)
        repeated = self._member * (2 + size // len(self._member))
        self._at += size
        return repeated[start : start + size]


def test_a_shard_is_read_a_few_samples_at_a_time() -> None:
    members = shards_module._members_of(Endless(), (), True, 10_000)
    numbered = ((f"{n}", *member[1:]) for n, member in enumerate(members))
    samples = shards_module._samples(numbered, ())
    assert [next(samples)["__key__"] for _ in range(1000)] == [f"{n}" for n in range(1000)]


def test_batches_are_small(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(number) for number in range(200)])
    sizes = [batch.num_rows for batch in batches(str(shard))]
    assert sum(sizes) == 200 and max(sizes) == 64
    large = tar_of([(f"{n}.jpg", bytes(5 << 20)) for n in range(4)])
    shard.write_bytes(large)
    assert [batch.num_rows for batch in batches(str(shard))] == [2, 2]


SPARSE_BYTES = 4 << 60


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytearray:
    """Returns the header of a member in GNU format, in which a size may be any 95-bit number."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return bytearray(member.tobuf(tarfile.GNU_FORMAT))


def checked(block: bytearray) -> bytes:
    """Sets the checksum of a header."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def sparse(name: str, size: int, extended: bool = False) -> bytes:
    """Returns an old GNU sparse member of 512 bytes of data and a large hole."""
    block = header(name, 512, tarfile.GNUTYPE_SPARSE)
    block[386:410] = b"%011o\0%011o\0" % (0, 512)
    block[482] = extended
    block[483:495] = b"\x80" + size.to_bytes(11, "big")
    return checked(block) + b"x" * 512


def pax_sparse(name: str, size: int) -> bytes:
    """Returns a sparse member in pax format 1.0."""
    fields = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
    fields["GNU.sparse.realsize"] = str(size)
    member = tarfile.TarInfo("sparse.tmp")
    member.size, member.pax_headers = 1024, fields
    return member.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n512\n".ljust(512, b"\0") + b"x" * 512


def written(shard: Path, *members: bytes) -> Path:
    """Writes a tar file of members, and a sample ``last`` at its end."""
    shard.write_bytes(b"".join(members) + tar_of([("last.jpg", b"last")]))
    return shard


def keys_and_errors(shard: Path) -> list[tuple[str | None, str]]:
    found = [(row["__key__"], (row["error"] or "").partition(":")[0]) for row in rows(shard)]
    without = [
        (row["__key__"], (row["error"] or "").partition(":")[0])
        for row in rows(shard, images=False)
    ]
    assert found == without
    return found


@pytest.mark.parametrize("make", [sparse, pax_sparse])
def test_sparse_members_are_error_rows(tmp_path: Path, make: Callable[[str, int], bytes]) -> None:
    shard = written(tmp_path / "a.tar", make("a.jpg", SPARSE_BYTES), make("b.png", 5000))
    assert keys_and_errors(shard) == [
        ("a", "too_large"), ("b", "unsupported_format"), ("last", "")
    ]  # fmt: skip
    first, second, last = rows(shard)
    assert first["image"] is second["image"] is None and last["image"] == b"last"
    assert f"a.jpg has {SPARSE_BYTES} bytes" in first["error"]
    assert "b.png is sparse" in second["error"]


def test_members_above_the_limit_are_error_rows(tmp_path: Path) -> None:
    members = [
        ("a.jpg", bytes(1000)),
        ("b.jpg", bytes(1001)),
        ("c.jpg", b"c"),
        ("c.txt", bytes(1001)),
        ("d.bin", bytes(5000)),
    ]
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
        (tmp_path / name).write_bytes(tar_of(members, mode))
        shard_rows = rows(tmp_path / name, max_bytes=1000)
        found = [(row["__key__"], row["error"], row["image"]) for row in shard_rows]
        assert found == [
            ("a", None, bytes(1000)),
            ("b", "too_large: b.jpg has 1001 bytes, max_bytes=1000", None),
            ("c", "too_large: c.txt has 1001 bytes, max_bytes=1000", None),
            ("d", None, None),
        ]


PAX_HEADER = checked(header("pax", 13, tarfile.XHDTYPE)) + b"13 comment=x\n".ljust(512, b"\0")

HOSTILE_MEMBERS = {
    "size 4 EiB": checked(header("a.jpg", SPARSE_BYTES)),
    "size 2^80": checked(header("a.txt", 2**80)),
    "size -1024": checked(header("a.txt", -1024)),
    "name of 4 EiB": checked(header("name", SPARSE_BYTES, tarfile.GNUTYPE_LONGNAME)),
    "pax header of 4 EiB": checked(header("pax", SPARSE_BYTES, tarfile.XHDTYPE)),
    "many pax headers": PAX_HEADER * 5000,
    "sparse map without numbers": pax_sparse("a.jpg", 5000).replace(b"1\n0\n", b"1\nx\n"),
}


@pytest.mark.parametrize("name", HOSTILE_MEMBERS)
def test_headers_that_lie_are_damage(name: str, tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(tar_of([("first.jpg", b"1"), ("second.jpg", b"2")])[:2048])
    with shard.open("ab") as file:
        file.write(HOSTILE_MEMBERS[name] + tar_of([("last.jpg", b"last")]))
    first, *_, damage = keys_and_errors(shard)
    assert (first, damage) == (("first", ""), (None, "corrupt"))


class Repeated(Endless):
    """Endless copies of a block."""

    def __init__(self, start: bytes, block: bytes) -> None:
        super().__init__()
        self._start, self._member = start, block

    def read(self, size: int = -1) -> bytes:
        start = self._start[self._at : self._at + size]
        self._at += len(start)
        return start + super().read(size - len(start)) if len(start) < size else start


def test_a_header_without_an_end_is_damage() -> None:
    endless_map = b"00000000001\0" * 42 + b"\1".ljust(8, b"\0")
    with pytest.raises(tarfile.ReadError, match="a header of more than"):
        list(
            shards_module._members_of(
                Repeated(sparse("a.jpg", 1, True)[:512], endless_map), (), True, 10_000
            )
        )


def test_global_headers_do_not_pile_up(tmp_path: Path) -> None:
    members = []
    for number in range(400):
        comment = tarfile.TarInfo.create_pax_global_header({f"comment{number}": "x" * 50_000})
        members.append(comment + tar_of([(f"{number}.jpg", b"")])[:512])
    shard = written(tmp_path / "a.tar", *members)
    tracemalloc.start()
    try:
        assert sum(batch.num_rows for batch in batches(str(shard))) == 401
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


def test_texts_count_as_bytes_of_a_batch(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([(f"{n}.txt", b"x" * (5 << 20)) for n in range(4)]))
    sizes = [batch.num_rows for batch in batches(str(tmp_path / "a.tar"), ("txt",))]
    assert sizes == [2, 2]


def test_a_shard_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"gone\.tar cannot be read"):
        rows(tmp_path / "gone.tar")


def test_sources_without_shards(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="does not exist"):
        shards(str(tmp_path / "nothing"))
    with pytest.raises(OptionError, match=r"has no shards: their names must end in \.tar"):
        shards(str(tmp_path))
    with pytest.raises(OptionError, match="needs a path"):
        shards("")


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    write_shard(folder / "0.tar", [sample(number) for number in range(6)])
    write_shard(folder / "1.tar.gz", [sample(number) for number in range(6, 10)])
    (folder / "notes.txt").touch()
    return folder


def test_the_data_source(spark: SparkSession, two_shards: Path) -> None:
    found = WebDatasetSource.read(spark, str(two_shards), members=MEMBERS)
    assert found.rdd.getNumPartitions() == 2
    assert [len(part) for part in found.select("__key__").rdd.glom().collect()] == [6, 4]
    by_read = sorted(tuple(row) for row in found.collect())
    names = {row["__key__"]: row for row in (one.asDict() for one in found.collect())}
    url = f"file:{two_shards / '0.tar'}"
    image = names["sample003"].pop("image")
    assert bytes(image) == sample(3)["jpg"]
    assert names["sample003"] == {
        "__key__": "sample003", "__url__": url, "error": None,
        "json": '{"number": 3}', "cls": "3", "txt": None,
    }  # fmt: skip
    if not hasattr(spark, "dataSource"):
        return  # Spark 3.5
    spark.dataSource.register(WebDatasetSource)
    reader = spark.read.format("webdataset").option("members", "json, cls,txt")
    by_source = reader.load(str(two_shards))
    assert by_source.rdd.getNumPartitions() == 2
    assert sorted(tuple(row) for row in by_source.collect()) == by_read


def table(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows by path. A table without errors has no folder for them."""
    if not folder.exists():
        return {}
    found = ds.dataset(folder, format="parquet", ignore_prefixes=["_", "."]).to_table().to_pylist()
    by_path = {row["path"]: row for row in found}
    assert len(by_path) == len(found)
    return by_path


@pytest.fixture
def extracted(spark: SparkSession, two_shards: Path, tmp_path: Path) -> Iterator[Callable]:
    """Extracts the shards once more."""

    def run() -> Any:
        options = {**OPTIONS, "format": "webdataset", "keep": ["json", "cls"]}
        return extract(str(two_shards), tmp_path / "dest", spark=spark, **options)

    yield run


def test_a_damaged_shard_is_reported_and_then_mended(
    extracted: Callable[[], Any], two_shards: Path, tmp_path: Path
) -> None:
    dest, shard = tmp_path / "dest", two_shards / "0.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    first = extracted()
    assert first.errors == {"corrupt": 1} and first.nulls == 0
    assert 4 < first.features < 10 and first.found == first.features + 1
    (error,) = table(dest / "_errors").values()
    assert error["path"] == f"file:{shard}"
    assert f"is damaged after {first.features - 4} samples" in error["error"]
    again = extracted()
    assert (again.done_before, again.features, again.errors) == (first.found, 0, {})

    shard.write_bytes(whole)
    mended = extracted()
    assert (mended.found, mended.errors, mended.features) == (10, {}, 6)
    done = table(dest)
    assert set(done) == {f"sample{number:03}" for number in range(10)}
    assert done["sample003"]["json"] == '{"number": 3}' and done["sample003"]["cls"] == "3"
    assert table(dest / "_errors") == {}
    assert extracted().features == 0


def test_a_shard_that_was_damaged_from_its_start(
    extracted: Callable[[], Any], two_shards: Path, tmp_path: Path
) -> None:
    """No sample of it was done, so that its error is all that there is to take out."""
    shard = two_shards / "0.tar"
    whole = shard.read_bytes()
    shard.write_bytes(b"")
    assert extracted().errors == {"corrupt": 1}
    shard.write_bytes(whole)
    assert extracted().features == 6
    assert table(tmp_path / "dest" / "_errors") == {}


def test_a_sample_without_an_image_is_a_null(spark: SparkSession, tmp_path: Path) -> None:
    samples = [sample(0), {"__key__": "text", "txt": "no image"}]
    write_shard(tmp_path / "shards" / "a.tar", samples)
    report = extract(
        tmp_path / "shards", tmp_path / "dest", spark=spark, format="webdataset", **OPTIONS
    )
    assert (report.found, report.features, report.nulls, report.errors) == (2, 1, 1, {})


def test_formats_that_are_accepted_if_named(spark: SparkSession, tmp_path: Path) -> None:
    image = encode(photo(), "JPEG2000")
    write_shard(tmp_path / "shards" / "a.tar", [{"__key__": "scan", "jp2": image}])
    options: dict[str, Any] = {"spark": spark, "format": "webdataset", **OPTIONS}
    report = extract(tmp_path / "shards", tmp_path / "refused", **options)
    assert (report.features, report.errors) == (0, {"unsupported_format": 1})
    report = extract(tmp_path / "shards", tmp_path / "dest", formats="JPEG2000", **options)
    assert (report.features, report.errors) == (1, {})


def test_a_member_that_is_not_read_is_an_error(spark: SparkSession, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shard(folder / "a.tar", [sample(0)])
    written(folder / "b.tar", sparse("hole.jpg", SPARSE_BYTES))
    for new in (3, 0):
        report = extract(folder, tmp_path / "dest", spark=spark, format="webdataset", **OPTIONS)
        assert report.found == 3 and report.features + sum(report.errors.values()) == new
    errors = table(tmp_path / "dest" / "_errors")
    assert errors["hole"]["error"].startswith("too_large: hole.jpg has ")
    source = {"spark": spark, "format": "webdataset", "max_bytes": 10, **OPTIONS}
    assert extract(folder, tmp_path / "limited", **source).errors["too_large"] == 2
    assert "max_bytes=10" in table(tmp_path / "limited" / "_errors")["sample000"]["error"]


def test_keys_that_are_there_twice(spark: SparkSession, tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / "shards" / name, [sample(0)])
    with pytest.raises(OptionError, match="the key 'sample000' occurs 2 times"):
        extract(tmp_path / "shards", tmp_path / "dest", spark=spark, format="webdataset", **OPTIONS)


def test_members_that_cannot_be_kept(spark: SparkSession, two_shards: Path, tmp_path: Path) -> None:
    for name in ("jpg", "path"):
        with pytest.raises(OptionError, match=f"keep='{name}' is not valid"):
            options = {**OPTIONS, "format": "webdataset", "keep": name}
            extract(two_shards, tmp_path / "dest", spark=spark, **options)
