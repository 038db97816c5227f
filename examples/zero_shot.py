"""Labels photos without training: each photo gets the label whose text is nearest to it.

    python examples/zero_shot.py FOLDER LABEL... [--model MODEL] [--weights WEIGHTS]

The weights must be trained on images and their captions. CLIP's authors report 63 % accuracy on
ImageNet's 1,000 classes with ViT-B/32, without any labelled image (Radford et al. 2021, Learning
Transferable Visual Models From Natural Language Supervision). ``--weights random`` works offline,
but gives meaningless labels.
"""

from __future__ import annotations

import argparse

from imagevec import features_udf, nearest, text_features_udf
from session import start_spark

PROMPT = "a photo of a {}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", help="folder of photos")
    parser.add_argument("labels", nargs="+", metavar="LABEL")
    parser.add_argument("--model", default="open_clip/ViT-B-32")
    parser.add_argument("--weights", default="laion2b_s34b_b79k", help="tag, file, or random")
    arguments = parser.parse_args()
    model = {"model": arguments.model, "weights": arguments.weights}

    spark = start_spark("imagevec zero-shot")
    files = spark.read.format("binaryFile").load(arguments.folder)
    photos = files.select("path", features_udf("content", **model)).cache()
    prompts = [(label, PROMPT.format(label)) for label in arguments.labels]
    texts = spark.createDataFrame(prompts, "path string, prompt string")
    labels = texts.select("path", text_features_udf("prompt", **model))
    for row in nearest(photos, labels, k=1).orderBy("query").collect():
        print(f"{row.cosine:7.4f}  {row.neighbour:<20}  {row.query.rpartition('/')[2]}")


if __name__ == "__main__":
    main()
