"""The demo's files: photos from two Python packages, four variants of each, and a broken file."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from PIL import Image, ImageOps

# Paths in scikit-image and scikit-learn, and the licences stated there.
PHOTOS = {
    "skimage/data/astronaut.png": "public domain, NASA",
    "skimage/data/brick.png": "CC0, CC0Textures",
    "skimage/data/camera.png": "CC0, Lav Varshney",
    "skimage/data/chelsea.png": "CC0, Stefan van der Walt",
    "skimage/data/clock_motion.png": "public domain, Stefan van der Walt",
    "skimage/data/coffee.png": "CC0, Rachel Michetti",
    "skimage/data/coins.png": "no known copyright restrictions, Brooklyn Museum",
    "skimage/data/grass.png": "CC0, linolafett",
    "skimage/data/gravel.png": "CC0, CC0Textures",
    "skimage/data/hubble_deep_field.jpg": "public domain, NASA",
    "skimage/data/ihc.png": "no known copyright restrictions, CMMI",
    "skimage/data/retina.jpg": "CC0, Mikael Häggström",
    "skimage/data/rocket.jpg": "public domain, SpaceX",
    "skimage/data/text.png": "public domain, Wikipedia",
    "sklearn/datasets/images/china.jpg": "CC BY 2.0, danielbuechele on Flickr",
    "sklearn/datasets/images/flower.jpg": "CC BY 2.0, vultilion on Flickr",
}


def write_photos(folder: Path) -> None:
    """Writes ``<photo>.<ext>``, its variants ``<photo>-<variant>.<ext>``, and ``broken.jpg``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for place in PHOTOS:
        photo = file_of(place)
        shutil.copy(photo, folder)
        _write_variants(photo, folder)
    (folder / "broken.jpg").write_text("This .jpg file contains no image.\n")


def _write_variants(file: Path, folder: Path) -> None:
    photo = Image.open(file).convert("RGB")
    width, height = photo.size
    inner = (width // 10, height // 10, width * 9 // 10, height * 9 // 10)
    stem = folder / file.stem
    photo.crop(inner).save(f"{stem}-crop.png")
    photo.resize((width // 2, height // 2)).save(f"{stem}-resize.webp")
    photo.save(f"{stem}-recompress.jpg", quality=15)
    ImageOps.mirror(photo).save(f"{stem}-flip.jpg", quality=90)


def file_of(place: str) -> Path:
    """Returns the path of one of ``PHOTOS``."""
    package, _, inside = place.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: run make setup")
    return Path(spec.origin).parent / inside
