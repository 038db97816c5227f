"""Measures how precision and ``decode="scaled"`` change vectors, with real photos and weights.

``python -m benchmarks.fidelity SHARED`` reads a folder that contains
``weights/squeezenet1_1.pth``, the retrieval split ``data/clothing/{gallery,query}/<class>/*.jpg``
and larger photos in ``data/hostile/exif-orientation``. It requires the extras ``demo`` and
``quantize``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn

from benchmarks.machine import machine, versions
from examples.lite0 import write_weights
from imagevec import ImageVectorizer, quantize

RESULTS = Path("benchmarks/results")
NEIGHBOURS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    shared = parser.parse_args().shared
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure(shared, Path(folder)))
    result = {"machine": machine(), "versions": versions(), "rows": rows}
    (RESULTS / "fidelity.json").write_text(json.dumps(result, indent=1) + "\n")
    table = markdown(rows)
    (RESULTS / "fidelity.md").write_text(table)
    print(table)


def measure(shared: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields one row per model and way of computing its vectors."""
    gallery = sorted((shared / "data/clothing/gallery").glob("*/*.jpg"))
    queries = sorted((shared / "data/clothing/query").glob("*/*.jpg"))
    large = sorted((shared / "data/hostile/exif-orientation").glob("*.jpg"))
    weights = {
        "squeezenet1_1": shared / "weights/squeezenet1_1.pth",
        "timm/tf_efficientnet_lite0": write_weights(folder / "lite0.safetensors"),
    }
    for model, path in weights.items():
        options: dict[str, Any] = {"model": model, "weights": str(path)}
        quantized = folder / path.stem
        quantize(map(str, gallery), output=quantized, min_median_cosine=0, **options)
        ways: dict[str, dict[str, Any]] = {
            "float32": options,
            "bfloat16": {**options, "precision": "bfloat16"},
            "int8": {"model": str(quantized)},
        }
        if model == "squeezenet1_1":
            reference = reference_vectors(path, queries)
            yield row(model, "float32 vs. torchvision", vectors(options, queries), reference)
        exact = {"gallery": vectors(options, gallery), "query": vectors(options, queries)}
        for name, way in ways.items():
            of_queries = vectors(way, queries)
            accuracy = knn_accuracy(vectors(way, gallery), gallery, of_queries, queries)
            yield {**row(model, name, of_queries, exact["query"]), "accuracy": accuracy}
        scaled = vectors({**options, "decode": "scaled"}, large)
        yield row(model, "float32, scaled decode (large photos)", scaled, vectors(options, large))


def vectors(options: dict[str, Any], paths: list[Path]) -> np.ndarray:
    """Returns float32 ``(N, D)``."""
    vectorizer = ImageVectorizer(on_error="raise", **options)
    return np.array([vectorizer.extract_features(str(path)) for path in paths], np.float32)


def reference_vectors(weights: Path, paths: list[Path]) -> np.ndarray:
    """Computes vectors with torchvision's SqueezeNet 1.1 and preset; Pillow decodes the images."""
    model = torchvision.models.squeezenet1_1().eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.classifier = nn.AdaptiveAvgPool2d(1)
    preset = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    images = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths]
    with torch.inference_mode():
        return np.concatenate([model(preset(image)[None]).numpy() for image in images])


def row(model: str, way: str, found: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    cosines = (unit(found) * unit(exact)).sum(axis=1)
    return {
        "model": model,
        "way": way,
        "images": len(found),
        "lowest_cosine": float(cosines.min()),
        "median_cosine": float(np.median(cosines)),
    }


def knn_accuracy(
    gallery: np.ndarray, gallery_paths: list[Path], queries: np.ndarray, query_paths: list[Path]
) -> float:
    """Returns the share of queries whose 5 nearest vote for their class; ties go to the nearer."""
    classes = np.array([path.parent.name for path in gallery_paths])
    nearest = np.argsort(-unit(queries) @ unit(gallery).T, axis=1, kind="stable")[:, :NEIGHBOURS]
    votes = [max(names, key=lambda name: (names == name).sum()) for names in classes[nearest]]
    classes_of_queries = np.array([path.parent.name for path in query_paths])
    return float((np.array(votes) == classes_of_queries).mean())


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | vectors | images | lowest cosine | median cosine | 5-NN accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        accuracy = f"{r['accuracy']:.3f}" if "accuracy" in r else ""
        lines.append(
            f"| {r['model']} | {r['way']} | {r['images']} | {r['lowest_cosine']:.5f} "
            f"| {r['median_cosine']:.5f} | {accuracy} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
