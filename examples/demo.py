"""Extracts features of 80 photos, finds neighbours and duplicates, and draws what it found.

It runs the commands of the command line one after the other, with a real model and without a
network. The model's weights and the photos come from Python packages.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
from lite0 import write_weights
from pyarrow import parquet

from contact_sheet import draw_contact_sheet
from imagevec.cli import main as imagevec
from photos import write_photos

OUTPUT = Path("demo_output")
PHOTOS, FEATURES, GROUPS = (OUTPUT / name for name in ("photos", "features", "groups"))
NEIGHBOURS = 5  # a photo has 4 variants: the fifth shows how far away a stranger is


def main() -> None:
    os.environ["PYSPARK_PYTHON"] = sys.executable  # else the workers run the python3 of PATH
    for folder in (FEATURES, GROUPS):
        shutil.rmtree(folder, ignore_errors=True)
    write_photos(PHOTOS)
    weights = write_weights(OUTPUT / "efficientnet_lite0.safetensors")

    model = ["--model", "timm/tf_efficientnet_lite0", "--weights", str(weights)]
    run("extract", str(PHOTOS), str(FEATURES), *model)
    run("duplicates", str(FEATURES), "--out", str(GROUPS), "--min-cosine", "0.9")
    pages = {"neighbours.html": [], "duplicates.html": ["--groups", str(GROUPS)]}
    for name, options in pages.items():
        run("gallery", str(FEATURES), "--out", str(OUTPUT / name), *options)

    neighbours = find_neighbours(FEATURES)
    report_neighbours(neighbours)
    draw_contact_sheet(neighbours, PHOTOS, OUTPUT / "contact_sheet.png")
    print(f"\nFeatures:         {FEATURES}")
    print(f"Contact sheet:    {OUTPUT / 'contact_sheet.png'}")
    print(f"Pages to open:    {', '.join(str(OUTPUT / name) for name in pages)}")


def run(*arguments: str) -> None:
    """Runs a command as a shell would."""
    print(f"\n$ imagevec {' '.join(arguments)}", flush=True)
    status = imagevec([*arguments])
    if status:
        sys.exit(status)


def find_neighbours(table: Path) -> dict[str, list[tuple[str, float]]]:
    """Each photo's file name to the names and cosines of its nearest neighbours, nearest first."""
    rows = parquet.read_table(table, columns=["path", "features"]).sort_by("path")
    names = [Path(path).name for path in rows["path"].to_pylist()]
    features = np.array(rows["features"].to_pylist())  # (N, D)
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = units @ units.T  # (N, N)
    np.fill_diagonal(cosines, -1)  # no one is their own neighbour
    nearest = np.argsort(-cosines)[:, :NEIGHBOURS]  # (N, NEIGHBOURS)
    return {
        name: [(names[other], cosines[index, other]) for other in nearest[index]]
        for index, name in enumerate(names)
        if "-" not in name  # a photo, not a variant
    }


def report_neighbours(neighbours: dict[str, list[tuple[str, float]]]) -> None:
    print(f"\nThe {NEIGHBOURS} nearest neighbours of each photo, with cosines:")
    found = 0
    for name, near in neighbours.items():
        photo = Path(name).stem
        cells = [f"{Path(n).stem.removeprefix(f'{photo}-')} {cosine:.2f}" for n, cosine in near]
        print(f"  {photo:18}", *(f"{cell:16}" for cell in cells))
        found += all(other.startswith(f"{photo}-") for other, _ in near[:4])
    print(f"\n{found} of {len(neighbours)} photos have their 4 variants as their 4 nearest.")


if __name__ == "__main__":
    main()
