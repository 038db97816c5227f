"""What all verbs have in common."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys

import pytest

import imagevec
from imagevec.cli import VERBS, main
from tests.helpers.pipeline import run_python


def test_quiet_prints_the_result(capsys):
    for more in ([], ["--json"]):
        command = ["models", "--search", "squeezenet1_1", *more]
        assert main(command) == 0
        result = capsys.readouterr().out
        assert main([*command, "--quiet"]) == 0
        assert capsys.readouterr() == (result, "")


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_a_module_with_three_functions(name):
    verb = importlib.import_module(f"imagevec.cli.{name}")
    (line,) = (verb.__doc__ or "").splitlines()
    assert line.endswith(".")
    parameters = [
        list(inspect.signature(getattr(verb, function)).parameters)
        for function in ("add_arguments", "run", "show")
    ]
    assert parameters == [["parser"], ["options"], ["result"]]


def test_wrong_usage(capsys):
    for arguments in ([], ["extrakt"], ["extract", "src"]):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 2
    assert "usage: imagevec" in capsys.readouterr().err


def test_the_module_runs():
    command = [sys.executable, "-m", "imagevec", "--version"]
    assert subprocess.check_output(command, text=True) == f"imagevec {imagevec.__version__}\n"


def test_help_is_quick_to_come():
    printed = run_python(
        "import sys; from imagevec.cli import parser; parser().format_help(); "
        "print({'torch', 'pyspark', 'rich', 'numpy'} & sys.modules.keys())"
    )
    assert printed.strip() == "set()"


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
