"""What ``imagevec extract`` says, without an extraction."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
from rich.console import Console

import imagevec
from imagevec import MissingExtraError
from imagevec.cli import extract as verb
from imagevec.cli import main, parser

RESULT: dict[str, Any] = {
    "found": 1,
    "done_before": 0,
    "features": 1,
    "errors": {},
    "nulls": 0,
    "skipped": {},
    "seconds": 2.0,
    "fingerprint": "0123456789abcdef",
    "dest": "features",
    "src": "photos",
    "bad_images": "features/_errors",
}


def test_one_image() -> None:
    assert verb.show(RESULT).splitlines() == [
        "1 image found, 0 already done",
        "1 vector written to features (2.0 s, 0.5 images/s including startup)",
    ]


def test_several_images() -> None:
    counts = {"found": 3000, "done_before": 1000, "features": 1996, "nulls": 1}
    errors = {"corrupt": 2, "empty": 1}
    skipped = {"hidden": 2, "dangling link": 1}
    shown = verb.show({**RESULT, **counts, "errors": errors, "skipped": skipped})
    assert shown.splitlines() == [
        "3,000 images found, 1,000 already done",
        "1,996 vectors written to features (2.0 s, 1000.0 images/s including startup)",
        "3 bad images listed in features/_errors:",
        "  corrupt              2",
        "  empty                1",
        "1 null in features/_errors",
        "skipped in photos: hidden 2, dangling link 1",
    ]


def test_one_bad_image_and_two_nulls() -> None:
    counts = {"found": 3, "features": 0, "errors": {"empty": 1}, "nulls": 2}
    lines = verb.show({**RESULT, **counts}).splitlines()
    assert lines[1].startswith("0 vectors written")
    assert lines[2] == "1 bad image listed in features/_errors:"
    assert lines[-1] == "2 nulls in features/_errors"


def test_rate_counts_images_and_not_their_boxes() -> None:
    counts = {"found": 30, "done_before": 10, "features": 400, "nulls": 1}
    shown = verb.show({**RESULT, **counts, "errors": {"bad_box": 3, "empty": 1}})
    assert shown.splitlines() == [
        "30 images found, 10 already done",
        "400 vectors written to features (2.0 s, 10.0 images/s including startup)",
        "4 bad images and boxes listed in features/_errors:",
        "  bad_box              3",
        "  empty                1",
        "1 null in features/_errors",
    ]


def test_boxes_is_the_name_of_a_column() -> None:
    arguments = ["extract", "src", "dest", "--column", "content", "--boxes", "detections"]
    assert parser().parse_args(arguments).boxes == "detections"
    assert parser().parse_args(arguments[:3]).boxes is None


def test_nothing_to_do() -> None:
    lines = verb.show({**RESULT, "done_before": 1, "features": 0}).splitlines()
    assert lines == ["1 image found, 1 already done", "0 vectors written to features (2.0 s)"]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "give weights='<path>' or weights=\"random\"",
            "give --weights <path> or --weights random",
        ),
        ("overwrite=True replaces them", "--overwrite replaces them"),
        ("recursive=True includes subfolders", "--recursive includes subfolders"),
        ("batch_size=0 is not valid", "--batch-size 0 is not valid"),
        ("keep='path' is not valid", "--keep path is not valid"),
        ("input_size=(160, 96) is not valid", "--input-size 160x96 is not valid"),
        ("myweights=1 and x.weights = 2", "myweights=1 and x.weights = 2"),
    ],
)
def test_advice_in_flags(said: str, shown: str) -> None:
    assert verb._in_flags(said) == shown


def test_there_is_no_chunk_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["extract", "src", "dest", "--chunk-size", "4"])
    assert raised.value.code == 2
    assert "unknown option '--chunk-size'" in capsys.readouterr().err


def test_names_are_separated_by_commas() -> None:
    given = parser().parse_args(["extract", "src", "dest", "--keep", "label,split"])
    assert given.keep == ["label", "split"]
    assert not parser().parse_args(["extract", "src", "dest"]).keep


def test_version_without_a_column_is_that_of_imagevec(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["src", "dest", "--version"]):
        with pytest.raises(SystemExit) as raised:
            main(["extract", *arguments])
        assert raised.value.code == 0
        assert capsys.readouterr().out == f"imagevec {imagevec.__version__}\n"
    given = parser().parse_args(["extract", "src", "dest", "--version", "edition"])
    assert given.version == "edition"
    assert parser().parse_args(["extract", "src", "dest"]).version is None


def test_retry_errors_is_a_flag() -> None:
    assert parser().parse_args(["extract", "src", "dest", "--retry-errors"]).retry_errors
    assert not parser().parse_args(["extract", "src", "dest"]).retry_errors


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_the_bar_counts_what_is_committed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time left is that of the rate since the first tasks ended: workers start before."""
    clock = Clock()
    monkeypatch.setattr(verb, "time", clock)
    monkeypatch.setattr(
        "rich.console.Console", lambda **named: Console(**named, force_terminal=True, width=120)
    )
    shown: list[str] = []
    with verb._bar(quiet=False) as advance:
        for seconds, done, errors in ((0, 0, 0), (10, 10, 1), (12, 30, 2), (14, 50, 2)):
            clock.now = 100.0 + seconds
            advance(done, errors, 100)
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    shown = printed.replace("\r", "\n").strip().splitlines()
    assert "50 of 100 images" in shown[-1]
    assert "10.0 images/s" in shown[-1] and "2 errors" in shown[-1] and "0:00:05 left" in shown[-1]


def test_a_quiet_bar_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with verb._bar(quiet=True) as advance:
        advance(1, 0, 2)
    assert capsys.readouterr() == ("", "")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def extract(*_: Any, **__: Any) -> None:
        raise MissingExtraError("timm", "timm")

    monkeypatch.setattr("imagevec.cli.session.spark_session", lambda master: nullcontext())
    monkeypatch.setattr("imagevec.table.extract.extract", extract)
    assert main(["extract", "photos", "features", "--model", "timm/resnet18", "--quiet"]) == 1
    assert "timm is not installed: pip install 'imagevec[timm]'" in capsys.readouterr().err


def test_a_table_of_the_catalog() -> None:
    given = parser().parse_args(["extract", "src", "a.b.c", "--to", "table", "--staging", "s"])
    assert (given.to, given.staging) == ("table", "s")
    given = parser().parse_args(["extract", "src", "dest"])
    assert (given.to, given.staging) == ("folder", None)
    assert verb._in_flags("to='table' requires staging=...") == "--to table requires --staging ..."
    counts = {"errors": {"empty": 1}, "dest": "a.b.c", "bad_images": "a.b.c_errors"}
    assert "1 bad image listed in a.b.c_errors:" in verb.show({**RESULT, **counts})
