from __future__ import annotations

import os

from imagevec.cli.doctor import _advice
from imagevec.spark.conf import ARROW_BYTES, ARROW_RECORDS


def test_the_doctor_says_what_to_change(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    well = {
        "spark.master": "local[2]",
        ARROW_RECORDS: 10_000,
        ARROW_BYTES: 64 << 20,
        "spark.python.worker.reuse": True,
        "spark.task.cpus": 1,
        "cores of Spark": 2,
        "OMP_NUM_THREADS": "not set",
    }
    assert _advice(well) == []
    assert _advice({**well, ARROW_RECORDS: 160, ARROW_BYTES: "no limit before Spark 4"}) == []
    for name, value, part in (
        (ARROW_BYTES, 256 << 20, "Arrow batches of images should be some 16 MB"),
        (ARROW_BYTES, "no limit before Spark 4", f"{ARROW_RECORDS}=10000"),
        ("spark.python.worker.reuse", False, "set true"),
        ("OMP_NUM_THREADS", "2", "unset it"),
        ("cores of Spark", 4, "use local[2]"),
    ):
        (sentence,) = _advice({**well, name: value})
        assert part in sentence
