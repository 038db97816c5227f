"""The commands that need no Spark, and what all commands have in common."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import imagevec
from imagevec.cli import main
from imagevec.cli.doctor import _advice
from imagevec.spark.conf import ARROW_BYTES, ARROW_RECORDS
from tests.helpers.pipeline import run_python


def test_models_are_listed(capsys):
    assert main(["models", "--search", "resnet18", "--json"]) == 0
    (row, *rest) = json.loads(capsys.readouterr().out)["models"]
    assert (row["model"], row["num_features"], row["input_size"]) == ("resnet18", 512, 224)
    assert row["parameters"] == 11_689_512  # torchvision's own count
    assert row["weights_at_hand"] is False
    assert all("resnet18" in other["model"] for other in rest)
    assert any(other["model"] == "timm/resnet18" for other in rest)


def test_models_as_a_table(capsys):
    assert main(["models", "--search", "squeezenet1_1"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ["squeezenet1_1", "512", "224", "1.2", "M", "to", "download"]
    assert main(["models", "--search", "no such model"]) == 0
    assert capsys.readouterr().out == "no model has such a name\n"


def test_quiet_prints_nothing(capsys):
    assert main(["models", "--search", "squeezenet1_1", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_wrong_usage(capsys):
    for arguments in ([], ["extrakt"], ["extract", "src"]):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 2
    assert "usage: imagevec" in capsys.readouterr().err


def test_an_unknown_model_is_told_before_spark_starts(capsys):
    assert main(["extract", "src", "dest", "--model", "resnet5000"]) == 1
    message = capsys.readouterr().err
    assert "did you mean" in message and "Traceback" not in message


@pytest.mark.parametrize("size", ["0", "-3"])
def test_a_chunk_has_images(capsys, size):
    assert main(["extract", "src", "dest", "--chunk-size", size]) == 1
    assert f"chunk_size={size} is not valid" in capsys.readouterr().err


def test_the_module_runs():
    command = [sys.executable, "-m", "imagevec", "--version"]
    assert subprocess.check_output(command, text=True) == f"imagevec {imagevec.__version__}\n"


def test_help_is_quick_to_come():
    printed = run_python(
        "import sys; from imagevec.cli import _parser; _parser().format_help(); "
        "print({'torch', 'pyspark', 'rich'} & sys.modules.keys())"
    )
    assert printed.strip() == "set()"


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


def test_without_java_there_is_a_line_and_no_traceback(tmp_path):
    environment = {**os.environ, "JAVA_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "imagevec", "extract", str(tmp_path), str(tmp_path / "table")]
    command += ["--model", "squeezenet1_1", "--weights", "random", "--engine", "torch"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "imagevec: Spark did not start" in done.stderr
    assert "Traceback" not in done.stderr
    doctor = [sys.executable, "-m", "imagevec", "doctor"]
    done = subprocess.run(doctor, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Java        none" in done.stdout and "Java 17" in done.stdout
