"""The pages on number formats: their examples run, and every number written by hand is one that the package gives."""

from __future__ import annotations

import doctest
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import narrowcast.formats as nf
from narrowcast.formats.rules import CONVENTIONS
from narrowcast.models.loaders import load_module
from narrowcast.models.reference import ModelRef

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [*sorted((DOCS / "formats").glob("*.md")), DOCS / "corrections.md"]


def examples_of(page: Path) -> str:
    """Return the sessions of a page as one, so that later ones know the names of earlier ones."""
    return "\n".join(re.findall(r"^```pycon\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(examples_of(page), {}, page.stem, str(page), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out
    assert runner.tries == len(test.examples)


def test_pages_have_examples() -> None:
    assert sum("```pycon" in page.read_text(encoding="utf-8") for page in PAGES) >= 8


# What is generated ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def format_pages() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS / "_ext"))
        import format_pages

        yield format_pages
        del sys.modules["format_pages"]


def test_everything_that_pages_include_is_generated(format_pages: ModuleType, tmp_path: Path) -> None:
    format_pages.write(tmp_path)
    named = {name for page in PAGES for name in re.findall(r"generated/([\w.-]+)", page.read_text(encoding="utf-8"))}
    assert named == {file.name for file in tmp_path.iterdir()}


def test_every_format_is_in_a_family_and_drawn(format_pages: ModuleType) -> None:
    assert sorted(name for names in format_pages.FAMILIES.values() for name in names) == sorted(nf.names())
    for names in format_pages.FAMILIES.values():
        drawn, table = format_pages.layout(names), format_pages.formats_table(names)
        for name in names:
            assert f">{name}</text>" in drawn
            assert f"| {name} |" in table


def test_layouts_have_a_box_for_every_field(format_pages: ModuleType) -> None:
    drawn = format_pages.layout(["bf16", "e8m0"])
    boxes = re.findall(r'<rect class="(\w+)" x="[\d.]+" y="(\d+)" width="([\d.]+)" height="26"', drawn)
    assert [(kind, round(float(width) / 35)) for kind, _, width in boxes] == [
        ("sign", 1),
        ("exponent", 8),
        ("significand", 7),
        ("exponent", 8),
    ]


def test_special_codes_are_those_of_the_specifications(format_pages: ModuleType) -> None:
    rows = {line.split("|")[1].strip(): line for line in format_pages.special_codes().splitlines()}
    assert rows["`e4m3fn`"] == "| `e4m3fn` | 00, 80 | 01 | 08 | 7E | – | 7F, FF |"
    assert rows["`e5m2`"] == "| `e5m2` | 00, 80 | 01 | 04 | 7B | 7C, FC | 7D–7F, FD–FF |"
    assert rows["`e4m3fnuz`"].endswith("| 00 | 01 | 08 | 7F | – | 80 |")


def test_convention_tables_show_every_system(format_pages: ModuleType) -> None:
    assert set(format_pages.SYSTEMS) == set(CONVENTIONS)
    table = format_pages.convention_table("e4m3fn", (465.0, float("inf")))
    assert table.splitlines()[2:] == [
        "| 465 | 448 | 448 | 448 | **NaN** | 448 |",
        "| ∞ | NaN | **448** | **448** | NaN | **448** |",
    ]


# What is written by hand ------------------------------------------------------------------------------------------------


def table_of(page: str, heading: str) -> dict[str, list[str]]:
    """Return the first table below a heading: cells by the first one of their row."""
    text = (DOCS / page).read_text(encoding="utf-8")
    below = text[re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE).end() :]
    lines = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE).group().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    return {row[0]: row[1:] for row in rows}


def trained(name: str) -> np.ndarray:
    """Return the weights of a bundled model with two axes or more, without embeddings, one after another."""
    module = load_module(ModelRef.parse(f"bundled:{name}")).module
    weights = [
        parameter.detach().numpy().reshape(-1)
        for name, parameter in module.named_parameters()
        if parameter.ndim >= 2 and "embeddings" not in name and "pooler" not in name
    ]
    whole = np.concatenate(weights)
    return whole[: whole.size // 512 * 512]


DATA: dict[str, Callable[[], np.ndarray]] = {
    "Gaussian": lambda: nf.sample("gaussian", 1 << 20),
    "Laplace": lambda: nf.sample("laplace", 1 << 20),
    "EfficientNet-Lite0": lambda: trained("efficientnet-lite0"),
    "MiniLM": lambda: trained("minilm"),
}
STORED: dict[str, Callable[[np.ndarray], nf.QuantizedTensor]] = {
    "NF4, block 64": lambda x: nf.quantize(x, "nf4"),
    "NF4, block 64, double quantisation": lambda x: nf.quantize(x, "nf4", double_quant=True),
    "INT4, block 64": lambda x: nf.quantize(x, "int4", block=64),
    "E2M1, block 64": lambda x: nf.quantize(x, "e2m1", block=64),
    "MXFP4": lambda x: nf.quantize(x, "mxfp4"),
    "NVFP4": lambda x: nf.quantize(x, "nvfp4"),
}


@cache
def data(name: str) -> np.ndarray:
    return DATA[name]()


def measured(heading: str, name: str) -> dict[str, float]:
    """Return a column of a table on four bits."""
    x = data(name)
    if heading.startswith("What a block size costs"):
        return {str(cost.block): cost.relative_mse for cost in nf.block_costs(x)}
    if heading.startswith("Which table"):
        return nf.four_bit_errors(x)
    return {label: nf.error(x, quantised(x)).sqnr_db for label, quantised in STORED.items()}


FOUR_BITS = {"What a block size costs": 1e-4, "Which table fits best": 1e-4, "With scales as they are stored": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("heading", FOUR_BITS)
@pytest.mark.parametrize("name", DATA)
def test_the_numbers_on_four_bits(heading: str, name: str) -> None:
    table = table_of("formats/four-bits.md", heading)
    headings = next(iter(table.values()))
    column = headings.index(name)
    written = {label.strip("`"): float(cells[column].strip("*")) for label, cells in list(table.items())[1:]}
    found = measured(heading, name)
    assert written.keys() == found.keys()
    last_digit = FOUR_BITS[heading]
    for label, value in found.items():  # the last digit may be rounded otherwise on another processor
        assert abs(value - written[label]) < 0.6 * last_digit, f"{label}: {value}"


def test_the_bits_on_four_bits() -> None:
    costs = table_of("formats/four-bits.md", "What a block size costs")
    x = data("Gaussian")
    for cost in nf.block_costs(x):
        assert float(costs[str(cost.block)][0]) == cost.bits_per_element
    stored = table_of("formats/four-bits.md", "With scales as they are stored")
    for label, quantised in STORED.items():
        assert abs(float(stored[label][0]) - quantised(x).bits_per_element) < 0.0006, label


# What libraries were seen to do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "torch", "ml_dtypes"])
def test_the_versions_on_the_page_are_those_under_test(package: str) -> None:
    words = {"onnxruntime": "ONNX Runtime"}.get(package, package)
    page = (DOCS / "formats/conventions.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<!\w){words} (\d+\.\d+\.\d+)", page))
    assert named == {version(package).partition("+")[0]}, "run the page's statements again, and name the new version"


def casted(x: list[float], to: int, *, reference: bool = False, **attributes: int) -> list[float]:
    """Return what ONNX Runtime (or the reference evaluator) makes of numbers by Cast there and back."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["narrow"], to=to, **attributes),
            helper.make_node("Cast", ["narrow"], ["y"], to=TensorProto.FLOAT),
        ],
        "cast",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    feed = {"x": np.array(x, np.float32)}
    if reference:
        with np.errstate(all="ignore"):
            return ReferenceEvaluator(model).run(None, feed)[0].tolist()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0].tolist()


def test_casts_of_onnx_runtime_without_saturation() -> None:
    numbers = [448.0, 464.0, 465.0, 479.0, 480.0, 495.0, 496.0, 1e30, float("inf")]
    found = casted(numbers, TensorProto.FLOAT8E4M3FN, saturate=0)
    assert [n for n, value in zip(numbers, found, strict=True) if not np.isnan(value)] == [448, 464, 480, 495]
    wanted = casted(numbers, TensorProto.FLOAT8E4M3FN, saturate=0, reference=True)
    assert np.isnan(wanted).tolist() == [False] * 2 + [True] * 7
    found = casted([57344.0, 61439.0, 61440.0, 65535.0, 65536.0, 1e30], TensorProto.FLOAT8E5M2, saturate=0)
    assert found[:2] == [57344, 57344]
    assert np.isnan(found[2:4]).all()
    assert found[4:] == [float("inf")] * 2


def test_casts_to_int4() -> None:
    numbers = [1.5, 2.5, -1.5, 8.0, -9.0]
    assert casted(numbers, TensorProto.INT4) == [2, 3, -2, -8, 7]
    assert casted(numbers, TensorProto.INT4, reference=True) == [1, 2, -1, -8, 7]
    assert nf.cast(numbers, "int4", convention="ml_dtypes").tolist() == [1, 2, -1, -8, 7]


def test_nan_codes_of_torch() -> None:
    many = torch.full((64,), float("nan"))
    assert set(many.to(torch.bfloat16).view(torch.uint16).tolist()) == {0xFFFF}
    assert set(many.to(torch.float8_e5m2).view(torch.uint8).tolist()) == {0x7F}
    assert [int(nf.encode(np.nan, name)) for name in ("bf16", "e5m2")] == [0x7FC0, 0x7E]
