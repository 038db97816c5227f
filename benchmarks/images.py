"""The images of a benchmark: files in a folder, or photo-like JPEGs that are generated once.

A generated image costs as much to decode as a photograph: it has a natural (1/f) spectrum,
occluding edges, and enough sensor noise to reach the same file size.
"""

from __future__ import annotations

import dataclasses
import io
import math
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CACHE = Path(".cache/benchmarks")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Recipe:
    """Parameters of a generated set. ``sizes`` maps (width, height) to its share of the images."""

    sizes: dict[tuple[int, int], int]
    median_bytes: int
    quality: int
    count: int


RECIPES = {
    "small": Recipe(
        {(500, 375): 8, (375, 500): 4, (500, 333): 2, (333, 500): 1, (640, 480): 1},
        median_bytes=107_000,
        quality=95,
        count=64,
    ),
    "web": Recipe({(1024, 768): 3, (768, 1024): 1}, median_bytes=230_000, quality=85, count=32),
    "camera": Recipe({(4000, 3000): 3, (3000, 4000): 1}, 3_500_000, quality=92, count=12),
}


@dataclass(frozen=True)
class ImageSet:
    """A set of image files."""

    name: str
    paths: tuple[Path, ...]

    def contents(self) -> list[bytes]:
        return [path.read_bytes() for path in self.paths]

    def summary(self) -> dict[str, Any]:
        """Describes the images for a result, without their paths."""
        sizes = []
        for path in self.paths:
            with Image.open(path) as image:
                sizes.append(image.size)
        by_area = sorted(sizes, key=math.prod)
        return {
            "name": self.name,
            "generated": self.name in RECIPES,
            "count": len(self.paths),
            "median_size": "{}x{}".format(*by_area[len(by_area) // 2]),
            "median_bytes": round(statistics.median(path.stat().st_size for path in self.paths)),
        }


def from_folder(folder: Path, count: int | None = None) -> ImageSet:
    """Returns the first images under a folder, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"{folder} contains no images ({', '.join(SUFFIXES)})")
    return ImageSet("folder", tuple(paths[:count]))


def generated(name: str, count: int | None = None) -> ImageSet:
    """Returns a set of ``RECIPES``. Image ``i`` does not depend on the count."""
    recipe = RECIPES[name]
    recipe = dataclasses.replace(recipe, count=count or recipe.count)
    folder = CACHE / "images" / name
    paths = tuple(folder / f"{index:04}.jpg" for index in range(recipe.count))
    for index, path in enumerate(paths):
        if not path.exists():
            _write(path, _jpeg(recipe, np.random.default_rng([index, recipe.median_bytes])))
    return ImageSet(name, paths)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    shutil.move(file.name, path)  # an interrupted run leaves no partial file


def _jpeg(recipe: Recipe, rng: np.random.Generator) -> bytes:
    shares = np.array(list(recipe.sizes.values()), dtype=float)
    width, height = list(recipe.sizes)[rng.choice(len(shares), p=shares / shares.sum())]
    typical_size = max(recipe.sizes, key=recipe.sizes.__getitem__)
    typical_area = math.prod(typical_size)
    target_bytes = recipe.median_bytes * width * height / typical_area * rng.lognormal(0, 0.25)
    scene = _scene(width, height, rng)
    noise = rng.standard_normal((height, width, 1), dtype=np.float32)
    low, high = 0.0, 40.0  # noise, in grey levels
    for _ in range(7):
        sigma = (low + high) / 2
        content = _encode(scene + sigma * noise, recipe.quality)
        low, high = (sigma, high) if len(content) < target_bytes else (low, sigma)
    return content


def _encode(pixels: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _scene(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Draws float32 ``(height, width, 3)``: overlapping shapes, side light and 1/f texture."""
    image = Image.new("RGB", (width, height), _colour(rng))
    draw = ImageDraw.Draw(image)
    # Power-law radii, large shapes first: a "dead leaves" model, with natural edges and spectrum.
    radii = np.sort(0.012 * (1 - rng.random(220)) ** -0.7)[::-1] * max(width, height)
    for radius in radii:
        _shape(draw, rng.random(2) * (width, height), min(radius, width), rng)
    leaves = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float32)
    light = np.linspace(rng.uniform(0.6, 1), rng.uniform(0.6, 1), width, dtype=np.float32)
    texture = _natural_texture(width, height, rng)
    return leaves * light[None, :, None] + 14 * texture[:, :, None]


def _shape(
    draw: ImageDraw.ImageDraw, centre: np.ndarray, radius: float, rng: np.random.Generator
) -> None:
    if rng.random() < 0.5:
        radii = radius * rng.uniform(0.4, 1, 2)
        draw.ellipse([*(centre - radii), *(centre + radii)], fill=_colour(rng))
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, 5))
        corners = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        draw.polygon([tuple(corner) for corner in corners], fill=_colour(rng))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """Returns a muted colour, as in most of a photograph: a grey level with small variations."""
    red, green, blue = np.clip(rng.uniform(30, 225) + rng.normal(0, 22, 3), 0, 255).astype(int)
    return int(red), int(green), int(blue)


def _natural_texture(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Returns float32 ``(height, width)`` with unit variance and amplitude 1/f."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency
    texture = np.fft.irfft2(spectrum, s=(height, width))
    return (texture / texture.std()).astype(np.float32)


def dealt(items: Sequence[Any], hands: int) -> list[list[Any]]:
    """Deals items into ``hands`` lists, like cards, so that all lists are similar."""
    return [list(items[start::hands]) for start in range(hands)]
