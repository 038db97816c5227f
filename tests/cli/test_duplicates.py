"""What ``imagevec duplicates`` says, without a search."""

from __future__ import annotations

import re
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from imagevec.cli import duplicates as verb

RESULT: dict[str, Any] = {
    "images": 67,
    "groups": 18,
    "extra": 49,
    "extra_bytes": 5_200_000,
    "out": "groups",
    "min_cosine": 0.9,
}


def test_groups_and_what_is_extra() -> None:
    said = "67 images in 18 groups written to groups\n49 extra%s: all but one image of each group"
    assert verb.show(RESULT) == said % " (5.2 MB)"
    assert verb.show({**RESULT, "extra_bytes": None}) == said % ""
    none = {**RESULT, "images": 0, "groups": 0, "extra": 0}
    assert verb.show(none) == "no two images have a cosine of 0.9 or more"


class Spark:
    """Two stages, one after the other; a look at them takes 20 seconds."""

    def __init__(self) -> None:
        self.sparkContext = self
        self.now = 0.0
        self.looks = 0
        self.is_seen = threading.Event()

    def statusTracker(self) -> Spark:
        return self

    def perf_counter(self) -> float:
        return self.now

    def getActiveStageIds(self) -> list[int]:
        self.looks += 1
        if self.looks > 3:
            self.is_seen.set()
        self.now = min(60.0, 20.0 * self.looks)
        return [min(self.looks, 3)]

    def getStageInfo(self, stage: int) -> Any:
        completed, total = [(1, 1), (1, 1), (2, 6)][stage - 1]
        return SimpleNamespace(numTasks=total, numCompletedTasks=completed)


def test_the_bar_goes_on_after_a_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spark: Any = Spark()
    monkeypatch.setattr(verb, "time", spark)
    monkeypatch.setattr(verb, "_LOOK_EVERY_SECONDS", 0)
    monkeypatch.setattr(
        "rich.console.Console", lambda **named: Console(**named, force_terminal=True, width=100)
    )
    with verb._bar(spark, quiet=False):
        assert spark.is_seen.wait(60)
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    line = printed.replace("\r", "\n").strip().splitlines()[-1]
    assert "near-duplicates" in line and line.rstrip().endswith("2 of 6 tasks 0:01:00")


def test_a_quiet_bar_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    spark: Any = Spark()
    with verb._bar(spark, quiet=True):
        pass
    assert capsys.readouterr() == ("", "")
