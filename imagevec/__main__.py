"""Runs the command line for ``python -m imagevec``."""

from __future__ import annotations

import sys

from imagevec.cli import main

if __name__ == "__main__":
    sys.exit(main())
