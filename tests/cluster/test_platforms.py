"""Workers, users and machines that lack what the driver has. Each script starts its session."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers.images import encode, photo
from tests.helpers.shared import ROOT

DAEMON = "spark.python.daemon.module=imagevec.spark.daemon"

JOB = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pyspark.sql import SparkSession
from imagevec import features_udf
from imagevec.errors import ImageVecError
from imagevec.spark.sessions import failures_in_words

builder = SparkSession.builder.master("local[1]")
for setting in sys.argv[1:]:
    name, _, value = setting.partition("=")
    builder = builder.config(name, value)
spark = builder.config("spark.ui.enabled", "false").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
rows = [({encode(photo())!r},)] * 16
df = spark.createDataFrame(rows, "content binary").coalesce(1)
options = eval(os.environ["OPTIONS"])
features = features_udf("content", model="resnet18", weights="random", **options)
try:
    with failures_in_words():
        print(len(df.select(features).collect()[0][0]))
except ImageVecError as error:
    print(error)
spark.stop()
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with all packages of this one, except imagevec, which is not among them."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "all.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


def run_job(cwd: Path, *settings: str, options: str = "{}", **environment: str) -> str:
    """Runs the job, and returns the last line that it prints."""
    command = [sys.executable, "-c", JOB, *settings]
    return last_line(command, cwd, OPTIONS=options, **environment)


def last_line(command: list[str], cwd: Path, **environment: str) -> str:
    variables = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", **environment}
    del variables["PYTHONPATH"]  # workers would find imagevec there
    done = subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=240
    )
    lines = (done.stdout or done.stderr).strip().splitlines()
    assert lines, done.stderr
    return lines[-1]


@pytest.mark.parametrize("settings", [[DAEMON], []], ids=["daemon", "plain"])
def test_workers_without_imagevec_are_named(
    bare: Path, tmp_path: Path, settings: list[str]
) -> None:
    message = run_job(tmp_path, *settings, PYSPARK_PYTHON=str(bare))
    assert message.startswith("the workers' Python has no module 'imagevec")
    assert "Install on the executors" in message


def test_extract_names_workers_without_imagevec(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(photo()))
    command = [sys.executable, "-m", "imagevec", "extract", "a.png", "table", "--quiet"]
    command += ["--model", "squeezenet1_1", "--weights", "random"]
    message = last_line(command, tmp_path, PYSPARK_PYTHON=str(bare))
    assert message.startswith("imagevec: the workers' Python has no module 'imagevec'")
    assert not list(tmp_path.glob("table/*.parquet"))


def test_a_worker_that_may_use_little_memory_says_so(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    limit = "spark.executor.pyspark.memory=700m"
    message = run_job(tmp_path, DAEMON, limit, options="{'batch_size': 16}")
    assert message.startswith("a worker has too little memory (")
    assert "spark.executor.pyspark.memory" in message


def test_a_home_that_does_not_exist(tmp_path: Path) -> None:
    """As in Spark's own Docker image."""
    environment = {"HOME": "/dev/null/home", "XDG_CACHE_HOME": "", "TMPDIR": str(tmp_path)}
    assert run_job(tmp_path, DAEMON, **environment) == "512"
    assert (tmp_path / f"imagevec-{os.getuid()}" / "files").is_dir()


@pytest.mark.skipif(not shutil.which("setpriv") or os.getuid() != 0, reason="needs root")
def test_a_user_without_a_name_is_told_what_hadoop_needs(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    read = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    command = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", *read]
    command += [sys.executable, "-m", "imagevec", "extract", str(tmp_path), str(tmp_path / "d")]
    message = last_line(command, tmp_path, HOME="/nonexistent", XDG_CACHE_HOME="")
    assert "user id has no name" in message


def test_extract_works_with_py_files(bare: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "imagevec"), "zip", ROOT, "imagevec")
    (tmp_path / "a.png").write_bytes(encode(photo()))
    command = [sys.executable, "-m", "imagevec", "extract", "a.png", "table", "--quiet"]
    command += ["--model", "squeezenet1_1", "--weights", "random"]
    arguments = f"--py-files {archive} pyspark-shell"
    message = last_line(command, tmp_path, PYSPARK_PYTHON=str(bare), PYSPARK_SUBMIT_ARGS=arguments)
    assert message.startswith("1 ")
    assert list(tmp_path.glob("table/*.parquet"))


def appears(jvm: psutil.Process) -> bool:
    return True


def runs_java(jvm: psutil.Process) -> bool:
    return jvm.num_threads() > 15


def listens(jvm: psutil.Process) -> bool:
    return any(connection.status == "LISTEN" for connection in jvm.net_connections())


def test_an_interrupt_during_the_fork_of_spark_is_not_lost() -> None:
    code = """
import os, signal
import psutil
from imagevec.cli.session import spark_session
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    with spark_session(None):
        print("started")
except KeyboardInterrupt:
    print("interrupted", psutil.Process().children())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "interrupted []\n"


@pytest.mark.parametrize("moment", [appears, runs_java, listens])
def test_an_interrupt_while_spark_starts_leaves_no_jvm(
    tmp_path: Path, moment: Callable[[psutil.Process], bool]
) -> None:
    code = "from imagevec.cli.session import spark_session\nwith spark_session(None): input()"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        driver = psutil.Process(process.pid)
        while not (jvms := driver.children()) or not moment(jvms[0]):
            assert process.poll() is None and time.monotonic() < deadline
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) != 0
        _, left = psutil.wait_procs(jvms, timeout=60)
        assert left == []
    finally:
        process.kill()
        process.communicate()
        for jvm in jvms:
            if jvm.is_running():
                jvm.kill()
