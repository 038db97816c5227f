"""Data next to the project's folder, not in every clone; ``shared/README.md`` describes it."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
CLOTHING = SHARED / "data" / "clothing"
HOSTILE = SHARED / "data" / "hostile"
SQUEEZENET_WEIGHTS = SHARED / "weights" / "squeezenet1_1.pth"

needs_shared = pytest.mark.skipif(
    not (CLOTHING.is_dir() and HOSTILE.is_dir() and SQUEEZENET_WEIGHTS.is_file()),
    reason="the folder ../shared with images and weights does not exist",
)
