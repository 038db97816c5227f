"""What all verbs have in common."""

from __future__ import annotations

import importlib
import inspect
import os
import re
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


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    printed, complaints = capsys.readouterr()
    assert printed.startswith("usage: imagevec COMMAND [options]\n")
    assert all(re.search(rf"^ +{verb}\b", printed, re.MULTILINE) for verb in VERBS)
    assert complaints == ""


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("extrct a b", "imagevec: unknown command 'extrct': did you mean 'extract'?"),
        ("x", "imagevec: unknown command 'x': choose one of 'cache', 'doctor', "),
        ("--vers", "imagevec: unknown option '--vers': did you mean '--version'"),
        ("--json", "imagevec: unknown option '--json': "),
        ("extract a", "imagevec extract: the following arguments are required: DEST"),
        ("extract a b c", "imagevec extract: unknown argument 'c'"),
        ("extract a b --recursve", "imagevec extract: unknown option '--recursve': did you mean"),
        ("extract a b --recurs", "imagevec extract: unknown option '--recurs': did you mean"),
        ("extract a b --batch=4", "imagevec extract: unknown option '--batch': did you mean"),
        ("similar f -k x", "imagevec similar: argument -k: invalid int value: 'x'"),
    ],
)
def test_wrong_usage_is_three_lines(arguments, error, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments.split())
    assert raised.value.code == 2
    usage, said, hint = capsys.readouterr().err.splitlines()
    command = error.partition(":")[0]
    assert usage.startswith(f"usage: {command} ")
    assert said.startswith(error)
    assert hint == f"run {command} --help for help"


def test_the_usage_of_a_command_names_its_arguments(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["extract", "--help"])
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: imagevec extract SRC DEST [options]\n")
    assert "--recursive" in printed


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
