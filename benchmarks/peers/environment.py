"""A second virtual environment, so that peers do not change the versions of the project's."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from benchmarks.images import CACHE

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def peers_python() -> Path:
    """Returns its interpreter, creating it if needed. The project's packages are visible in it."""
    folder = (CACHE / "peers").absolute()
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        print("installing Ray Data and Daft", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = Path(subprocess.check_output([python, "-c", query], text=True).strip())
        (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", REQUIREMENTS], check=True, stdout=sys.stderr)
        done.touch()
    return python
