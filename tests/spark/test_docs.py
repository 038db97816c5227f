"""The code of README.md and of docs/ runs, and what docs/ state as facts of the code is true.

A block of ``python`` is run, one after the other on a page, as in a notebook; one of ``py`` needs
what is not here (a GPU, a server) and is compiled only.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyspark
import pytest
import torch
from pyspark.sql import DataFrame, SparkSession
from safetensors.torch import save_file

import imagevec
from benchmarks import report
from imagevec import ImageVectorizer, cli, errors, explain_pickle, plan
from imagevec.models.factory import FactorySource
from imagevec.models.features import example_input
from imagevec.models.layers import infer_num_features
from imagevec.models.open_clip import OpenClipSource, OpenClipTextSource
from imagevec.models.registry import find_source
from imagevec.models.source import REGISTERED, ModelSource
from imagevec.models.torchvision import TorchvisionSource
from imagevec.options import OPTIONS, RANDOM
from imagevec.spark import featurizer
from imagevec.table.schema import BOX_COLUMNS, OWN_COLUMNS
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.helpers.shared import ROOT
from tests.helpers.spark import Frame

DOCS = ROOT / "docs"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
ARTICLE_PAGE = DOCS / "spark-context-errors.md"
TEXT = ARTICLE_PAGE.read_text()
ARTICLE, EXPLAIN, FUNCTION, CLASS, IMAGEVEC = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
IMPORTS = """
import functools, io, torch, torchvision
from PIL import Image
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf
from pyspark.sql.types import ArrayType, FloatType
from torchvision.transforms.functional import pil_to_tensor
"""


def scope_after(code: str, **names: Any) -> dict[str, Any]:
    # As in a notebook: what is of "__main__" is pickled by value.
    scope = {"__name__": "__main__", **names}
    exec(IMPORTS + code, scope)
    return scope


@pytest.fixture
def photos(frame: Frame) -> Any:
    return frame([encode(photo(seed=1)), encode(photo(seed=2))])


def lengths(df: Any) -> list[int]:
    return [row[0] for row in df.selectExpr("size(features)").collect()]


def test_the_class_fails_as_quoted(spark: SparkSession, photos: Any) -> None:
    vectorizer = scope_after(ARTICLE)["ImageVectorizer"]()
    with pytest.raises(Exception, match="CONTEXT_ONLY_VALID_ON_DRIVER"):
        vectorizer.process_images(photos)
    assert "CONTEXT_ONLY_VALID_ON_DRIVER" in TEXT


def test_the_report_is_as_quoted(spark: SparkSession) -> None:
    vectorizer = scope_after(ARTICLE)["ImageVectorizer"]()
    report = str(explain_pickle(vectorizer.extract_features))
    quoted = [line.strip() for line in TEXT.splitlines() if line.startswith("  problem: ")]
    assert len(quoted) == 2
    assert all(line in report for line in quoted)
    assert "explain_pickle(vectorizer.extract_features)" in EXPLAIN


def test_solution_1_functions_of_a_module(
    spark: SparkSession, photos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photo_features.py").write_text(IMPORTS + FUNCTION)
    spark.sparkContext.addPyFile(str(tmp_path / "photo_features.py"))
    monkeypatch.syspath_prepend(tmp_path)
    assert lengths(importlib.import_module("photo_features").process_images(photos)) == [1000, 1000]


def test_solution_2_a_pickle_without_the_session(photos: Any) -> None:
    vectorizer = scope_after(CLASS)["Vectorizer"]()
    assert explain_pickle(vectorizer.extract_features).problems == ()
    assert lengths(vectorizer.process_images(photos)) == [1000, 1000]


def test_solution_3_imagevec(photos: Any) -> None:
    assert lengths(scope_after(IMAGEVEC, df=photos)["features"]) == [512, 512]


PAGES = sorted({ROOT / "README.md", CONTRIBUTING, *DOCS.glob("*.md")} - {ARTICLE_PAGE})
SPARK_PATH = r'\b(?:parquet|load|save|start)\(|"checkpointLocation", '  # of the JVM's folder
EXTRACT = re.compile(r"\bextract\([^()]*\)")
REAL = ("resnet18",)  # small, and of use where the nodes of a model matter


def blocks(page: Path, language: str) -> list[str]:
    """With the indentation of those in a list taken off."""
    found = re.findall(rf"^( *)```{language}\n(.*?)```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def name_of(page: Path) -> str:
    return page.stem


@pytest.fixture
def reader(
    spark: SparkSession, clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Someone who reads: a folder of photos, the weights of all models, and the session there is.

    Known names mean a tiny model, but for ``REAL``, which get random weights.
    """
    (tmp_path / "photos").mkdir()
    for seed in range(12):
        (tmp_path / "photos" / f"{seed}.png").write_bytes(encode(photo(seed=seed)))
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    write_other_sources(tmp_path)
    for name in ("lite0", "efficientnet_lite0"):
        save_file(tiny().state_dict(), tmp_path / f"{name}.safetensors")
    for module in (plan, featurizer):
        monkeypatch.setattr(module, "find_source", find_small_source)
    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(SparkSession.Builder, "getOrCreate", lambda builder: spark)
    monkeypatch.chdir(tmp_path)
    arrow_rows = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(arrow_rows)
    registered = dict(REGISTERED)
    yield tmp_path
    REGISTERED.clear()
    REGISTERED.update(registered)
    spark.conf.set(arrow_rows, str(before))


def write_other_sources(folder: Path) -> None:
    """A table with a column of images, a dataset of Hugging Face, and a shard of WebDataset."""
    for name in ("table", "huggingface", "shards"):
        (folder / name).mkdir()
    images = [encode(photo(seed=seed)) for seed in range(3)]
    table = {"id": [3, 5, 7], "image": images, "label": ["a", "b", "c"]}
    pq.write_table(pa.table(table), folder / "table" / "0.parquet")
    structs: list[dict[str, Any]] = [{"bytes": images[0], "path": "0.png"}]
    structs += [{"bytes": None, "path": str(folder / "photos" / "1.png")}]
    dataset = pa.table({"image": structs, "label": [0, 1]})
    pq.write_table(dataset, folder / "huggingface" / "train-00000-of-00001.parquet")
    with tarfile.open(folder / "shards" / "0.tar", "w") as shard:
        for key, image in enumerate(images):
            for extension, data in (("png", image), ("json", b"{}")):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


@dataclass(frozen=True)
class Untrained(TorchvisionSource):
    """A model of torchvision whose default weights are random ones."""

    identity = "content"  # its plans are not those of its name

    def weights(self, option: str) -> Path | torch.nn.Module | None:
        return super().weights(RANDOM if option == "DEFAULT" else option)


def seeded_tiny() -> torch.nn.Module:
    """A tiny model with the same weights in each plan."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny()


@dataclass(frozen=True)
class UntrainedClip(OpenClipSource):
    """The image tower of a small model, whose weights are random ones."""

    def weights(self, option: str) -> Path | torch.nn.Module | None:
        return super().weights(RANDOM)

    def text_source(self) -> OpenClipTextSource:
        return UntrainedClipText(self.clip_name)


class UntrainedClipText(UntrainedClip, OpenClipTextSource):
    """Its text tower."""


def find_small_source(model: Any) -> ModelSource:
    source = find_source(model)
    source.check("pooled")  # the real one must have it
    if isinstance(source, FactorySource):
        return source
    if isinstance(source, OpenClipSource):
        return UntrainedClip("tiny-vit")
    if source.name in REAL:
        return Untrained(source.name)
    return FactorySource(seeded_tiny, registered_name=source.name)


def in_folder(code: str, folder: Path) -> str:
    """Code whose relative paths, where Spark gets them, are of a folder."""
    code = re.sub(rf'((?:{SPARK_PATH})f?)"(?!\w+:)', rf'\1"{folder}/', code)
    return EXTRACT.sub(lambda call: re.sub(r'"([\w/]+/)"', rf'"{folder}/\1"', call[0]), code)


def run(page: Path, folder: Path, **names: Any) -> dict[str, Any]:
    """The variables that the page's blocks leave; each data frame of theirs can be computed."""
    scope = {"__name__": "__main__", **names}  # pickled by value, as in a notebook
    computed: list[Any] = []
    for code in blocks(page, "python"):
        exec(compile(in_folder(code, folder), f"{page.name}: {code}", "exec"), scope)
        for value in list(scope.values()):
            is_new = isinstance(value, DataFrame) and not any(value is df for df in computed)
            if is_new and not value.isStreaming:
                value.write.format("noop").mode("overwrite").save()
                computed.append(value)
    return scope


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_a_page_runs(spark: SparkSession, reader: Path, page: Path) -> None:
    names: dict[str, Any] = {"spark": spark}
    scope = run(page, reader, **names)
    CHECKS.get(page.stem, lambda scope, folder: None)(scope, reader)


def check_index(scope: dict[str, Any], folder: Path) -> None:
    written = scope["spark"].read.parquet(str(folder / "features"))
    assert written.where("features IS NOT NULL").count() == 12
    assert written.where("path LIKE '%broken.jpg' AND features IS NULL").count() == 1


def check_models(scope: dict[str, Any], folder: Path) -> None:
    texture = scope["photos"].where("length > 100").select(scope["texture"])
    assert len(texture.first().features) == 128
    assert scope["report"].held_out_images == 3


def check_tuning(scope: dict[str, Any], folder: Path) -> None:
    assert set(imagevec.recommended_conf(executor_gpus=1)) == {
        name for name in re.findall(r"`(spark\.[\w.]+)`", section("tuning", "Spark settings"))
    } - {"imagevec.spark.daemon"}
    value = scope["metrics"].value  # of two queries, the page's and ours
    told = re.findall(r"`([a-z.<>]+)`", "".join(table(section("tuning", "Metrics"))))
    assert {name.replace(".unsupported_format", ".<code>") for name in value} <= set(told)
    assert (value["rows"], value["images"], value["errors.unsupported_format"]) == (26, 24, 2)
    assert [len(row.prediction) for row in scope["predictions"].collect()] == 13 * [4]


def check_pipelines(scope: dict[str, Any], folder: Path) -> None:
    spark = scope["spark"]
    assert spark.read.parquet(str(folder / "stream_features")).count() == 13
    assert {row.prediction for row in scope["predictions"].collect()} <= {0.0, 1.0}
    assert scope["together"].count() == 2 * 13
    rows = scope["series"].to_frame().to_spark(index_col="path").collect()
    assert scope["series"].name == "features" and len(rows) == len({row.path for row in rows}) == 13
    assert [row.path.rpartition("/")[2] for row in rows if row.features is None] == ["broken.jpg"]
    assert {len(row.features) for row in rows if row.features is not None} == {512}


def check_extract(scope: dict[str, Any], folder: Path) -> None:
    """Every table of the page is there; the compacted one is whole, and known to be."""
    spark = scope["spark"]
    rows = {
        table.name: spark.read.parquet(str(table)).collect()
        for table in folder.iterdir()
        if table.name.endswith("features") or table.name == "compact"
    }
    assert {name: len(found) for name, found in rows.items()} == {
        "features": 12,
        "compact": 12,
        "table_features": 2,
        "box_features": 6,
        "small_features": 12,
        "path_features": 12,
        "huggingface_features": 2,
        "shard_features": 3,
        "png_features": 12,
    }
    assert [row.error.partition(":")[0] for row in scope["errors"].collect()] == [
        "unsupported_format"
    ]
    assert len(list((folder / "compact").glob("*.parquet"))) == 1
    assert sorted((row.path, row.label) for row in rows["table_features"]) == [
        ("3", "a"),
        ("5", "b"),
    ]
    assert {row.json for row in rows["shard_features"]} == {"{}"}
    assert len(scope["frame"]) == 12 and scope["samples"].count() == 3
    told = {cells(row)[0] for row in table(section("extract", "The result"))}
    assert set(re.findall(r"`(\w+)`", "".join(told))) - {"keep"} == set(OWN_COLUMNS)
    of_boxes = [cells(row)[0].strip("`") for row in table(section("extract", "Boxes"))]
    assert tuple(of_boxes) == BOX_COLUMNS
    compact = spark.read.parquet(str(folder / "compact"))
    assert imagevec.provenance(compact, "features").model == "resnet50"
    again = imagevec.extract(folder / "photos", folder / "compact")
    assert (again.done_before, again.features, again.errors) == (13, 0, {})
    if int(pyspark.__version__.partition(".")[0]) >= 4:
        catalog = section("extract", "Tables of a catalog")  # see tests/tables
        for code in blocks(DOCS / "extract.md", "py"):
            if code not in catalog:
                exec(in_folder(code, folder), scope)
        assert scope["samples"].count() == len(scope["sizes"]) // 4 == 3


def check_errors(scope: dict[str, Any], folder: Path) -> None:
    codes = {row.code for row in scope["codes"].collect()}
    assert codes == {None, "unsupported_format"}


def check_tutorial(scope: dict[str, Any], folder: Path) -> None:
    assert (scope["report"].done_before, scope["report"].features) == (13, 0)
    assert scope["neighbours"].count() == 2 * 4
    assert scope["result"].where("result.error IS NOT NULL").count() == 1


def check_text(scope: dict[str, Any], folder: Path) -> None:
    assert scope["vectors"].shape == (2, 32)
    assert scope["found"].count() == 2 * 5
    assert {row.label for row in scope["labelled"].collect()} <= {"shoe", "dress", "hat"}
    for name, tag, features in map(cells, table(section("text", "Which model"))):
        source = find_source(name.strip("`"))
        assert isinstance(source, OpenClipSource)
        assert source._tag(tag.strip("`"))
        assert source._config["embed_dim"] == int(features)


CHECKS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "index": check_index,
    "models": check_models,
    "tuning": check_tuning,
    "pipelines": check_pipelines,
    "errors": check_errors,
    "extract": check_extract,
    "text": check_text,
    "tutorial": check_tutorial,
}


@pytest.mark.filterwarnings("ignore:`to_list` loads all data")
def test_the_pandas_recipe_keeps_rows_and_index(spark: SparkSession, reader: Path) -> None:
    (code,) = (code for code in blocks(DOCS / "pipelines.md", "python") if "to_spark" in code)
    function = code.partition("\n\n\n")[0]
    scope: dict[str, Any] = {"__name__": "__main__", "features_udf": imagevec.features_udf}
    exec(function, scope)
    with_features = scope["with_features"]

    images = [encode(photo(seed=1)), b"no image", encode(photo(seed=2))]
    rows = list(zip([30, 10, 20], images, "abc", strict=True))
    frame = spark.createDataFrame(rows, "key long, content binary, name string").pandas_api("key")
    result = with_features(frame, model=tiny, weights="random").sort_index()
    assert result.index.name == "key"
    assert result.index.to_list() == [10, 20, 30]
    assert result["name"].to_list() == ["b", "c", "a"]
    expected = ImageVectorizer(model=tiny, weights="random")
    bad, *good = result["features"].to_list()
    assert bad is None
    for vector, image in zip(good, (images[2], images[0]), strict=True):
        assert list(vector) == pytest.approx(expected.extract_features(image), rel=1e-4, abs=1e-6)

    series = frame["content"]
    alone = with_features(series.to_frame("content"), model=tiny, weights="random")["features"]
    assert sorted(alone.index.to_list()) == [10, 20, 30]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_cannot_run_compiles(page: Path) -> None:
    for code in blocks(page, "py"):
        compile(code, page.name, "exec")


def section(page: str, heading: str) -> str:
    """The text under a heading, to the next one."""
    text = (DOCS / f"{page}.md").read_text()
    return re.split(r"^#+ ", text.partition(f"# {heading}\n")[2], flags=re.MULTILINE)[0]


def table(text: str) -> list[str]:
    """The rows of all tables in a text, without their headings."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    rules = [i for i, row in enumerate(rows) if set(row) <= set("|-: ")]
    return [row for i, row in enumerate(rows) if i not in rules and i + 1 not in rules]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row[1:-1].split("|")]


def test_the_codes_and_the_tree_are_those_of_the_module() -> None:
    rows = [cells(row) for row in table(section("errors", "Image errors"))]
    assert {code.strip("`"): meaning for code, meaning, _ in rows} == dict(errors.IMAGE_ERROR_CODES)
    assert (errors.__doc__ or "").partition("\n\n")[2].strip() in section("errors", "Exceptions")


def test_the_models_are_as_told() -> None:
    rows = [cells(row) for row in table(section("models", "Which one")) if row.count("|") == 4]
    assert len(rows) > 10
    for quoted, features, size in rows:
        source = find_source(quoted.strip("`"))
        preprocessing = source.preprocessing(None)
        input_size = preprocessing.input_size
        example = functools.partial(example_input, preprocessing)
        with torch.device("meta"):
            model = source.to_features(source.build(preprocessing), "pooled", False, example)
        num_features = int(features.replace(",", ""))
        assert infer_num_features(model, example(1).to("meta")) == (num_features,), quoted
        assert input_size == int(size), quoted


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


def flag_rows(verb: str) -> dict[str, list[str]]:
    """The rows of a command's flags, by flag."""
    text = (DOCS / "command-line.md").read_text().partition(f"\n## {verb}\n")[2]
    rows = [cells(row) for row in table(text.partition("\n## ")[0]) if row.startswith("| `-")]
    return {row[0].strip("`"): row for row in rows}


def test_the_command_line_is_as_told() -> None:
    text = (DOCS / "command-line.md").read_text()
    told = set(re.findall(r"--[a-z][a-z-]+", text))
    known = {"--version"}
    assert tuple(commands()) == cli.VERBS
    for name, parser in commands().items():
        assert f"## {name}\n" in text
        assert f"| [`{name}`](#{name}) |" in text
        known |= {option for action in parser._actions for option in action.option_strings}
    assert told == {option for option in known if option.startswith("--")}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_command_has_a_row_for_each_flag(verb: str) -> None:
    flags = {flag: a for a in commands()[verb]._actions for flag in a.option_strings}
    for common in ("--json", "--quiet", "--help", "-h"):
        del flags[common]
    rows = flag_rows(verb)
    assert rows.keys() == flags.keys()
    for flag, action in flags.items():
        told = " ".join(rows[flag])
        assert all(f"`{choice}`" in told for choice in action.choices or ()), flag


def test_the_defaults_of_extract_are_as_told() -> None:
    rows = flag_rows("extract")
    in_words = {"normalize": "off", "isolate": "off", "allowed_roots": "anywhere"}
    in_words |= {"formats": "all but the last two", "input_size": "the model's own"}
    in_words |= {"background": "none", "value_range": "none", "boxes": "none"}
    for option in OPTIONS:
        if option.name not in ("on_error", "output"):
            _, told, _ = rows[f"--{option.name.replace('_', '-')}"]
            assert told.replace(",", "") == in_words.get(option.name, f"`{option.default}`")


BENCH = "bench-avx512-bf16"  # the machine that the pages quote


def images_per_second(result: str, stage: str) -> dict[str, float]:
    """What approaches reached with two workers, by their names."""
    rows = json.loads((ROOT / f"benchmarks/results/{result}.json").read_text())["rows"]
    return {
        row["approach"]: row["images_per_second"]
        for row in rows
        if (row["stage"], row["workers"]) == (stage, 2)
    }


def test_the_sums_are_right() -> None:
    image_sets = {"500x375": "small", "1024x768": "web", "4000x3000": "camera"}
    models = {"ResNet-50": "resnet50", "MobileNetV3-Large": "mobilenet_v3_large"}
    models["ViT-B/16"] = "vit_b_16"
    rows = [cells(row) for row in table(section("scaling", "Cost of a million images"))]
    assert len(rows) == 8
    for model, size, precision, images, core_hours in rows:
        measured = images_per_second(BENCH, f"{models[model]}, {image_sets[size]}")
        expected = measured[f"features_udf, {precision}"]
        assert float(images) == pytest.approx(expected, abs=0.06), (model, size, precision)
        assert float(core_hours) == pytest.approx(2 * 1e6 / (expected * 3600), rel=0.03)
    for features, _, *told in (
        cells(row) for row in table(section("scaling", "Storage of vectors"))
    ):
        sizes = [4 * number_of(features) * number for number in (1e6, 1e8, 1e10)]
        units = {"GB": 1e9, "TB": 1e12}
        bytes_told = [float(cell.split()[0]) * units[cell.split()[1]] for cell in told]
        assert bytes_told == pytest.approx(sizes, rel=0.05)


def test_the_comparison_quotes_the_benchmarks() -> None:
    rows = [cells(row) for row in table(section("comparison", "Measured"))]
    assert len(rows) == 9
    results = {"Spark": BENCH, "peers": "peers"}
    for which, approach, images in rows:
        measured = images_per_second(results[which], "resnet50, small")
        assert float(images) == pytest.approx(measured[approach], abs=0.06), approach


def test_the_readme_quotes_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, rest = (ROOT / report.README).read_text().partition(report.BEGIN)
    quoted, _, _ = rest.partition(report.END)
    monkeypatch.chdir(ROOT)
    assert quoted.strip() == report.summaries(report.RESULTS)


def number_of(cell: str) -> float:
    return float(cell.replace(",", ""))


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "api.md").read_text()
    assert set(re.findall(r"^::: imagevec\.(\w+)$", text, re.MULTILINE)) == set(imagevec.__all__)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_two_entries_of_a_contents_list_are_equal(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    entries = re.findall(r"^(?:#+|::: imagevec\.) *(.+)$", text, re.MULTILINE)
    assert sorted(set(entries)) == sorted(entries)


def test_the_picture_of_the_house_is_what_the_linter_enforces() -> None:
    (picture,) = (code for code in blocks(CONTRIBUTING, "text") if "│" in code)
    drawn = [name for row in re.findall("│(.*?)│", picture) for name in re.findall(r"\w+", row)]
    parts = [path.stem for path in (ROOT / "imagevec").iterdir() if path.name != "py.typed"]
    package = [name for name in parts if not name.startswith("_")]
    assert sorted(drawn) == sorted(package)

    settings = (ROOT / "pyproject.toml").read_text()
    (layers,) = re.findall(r"^layers = \[(.*?)^\]", settings, re.MULTILINE | re.DOTALL)
    for layer in layers.strip().splitlines():
        names = set(re.findall(r"imagevec\.(\w+)", layer)) & set(package)
        assert set(drawn[: len(names)]) == names
        del drawn[: len(names)]
    assert not drawn


def test_every_make_target_that_is_told_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (*PAGES, ROOT / "benchmarks/README.md", ROOT / "CHANGELOG.md"):
        told = re.findall(r"`make ([a-z-]+)|^make ([a-z-]+) +#", page.read_text(), re.MULTILINE)
        assert {first or second for first, second in told} <= targets, page
