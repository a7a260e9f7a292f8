"""ONNX's own backend tests of Cast, QuantizeLinear and DequantizeLinear.

``onnx_vectors.json`` was taken from the wheel of onnx 1.19.1 by ``extract_onnx_vectors.py``; newer wheels do not ship them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_engines import cast, decode, encode

from narrowcast.formats.kinds import Integer
from narrowcast.formats.table import element

CASES: dict[str, Any] = json.loads(Path(__file__).with_name("onnx_vectors.json").read_text())["cases"]
NAMES = {
    "FLOAT": "fp32",
    "DOUBLE": "fp64",
    "FLOAT16": "fp16",
    "BFLOAT16": "bf16",
    "FLOAT8E4M3FN": "e4m3fn",
    "FLOAT8E4M3FNUZ": "e4m3fnuz",
    "FLOAT8E5M2": "e5m2",
    "FLOAT8E5M2FNUZ": "e5m2fnuz",
    "FLOAT8E8M0": "e8m0",
    "FLOAT4E2M1": "e2m1",
} | {name.upper(): name for name in ("int4", "int8", "int16", "uint4", "uint8", "uint16")}


def codes_of(tensor: dict[str, Any]) -> np.ndarray:
    return np.array([int(code, 16) for code in tensor["codes"].split()], np.uint64).reshape(tensor["shape"])


def values_of(tensor: dict[str, Any]) -> np.ndarray:
    return decode(codes_of(tensor), NAMES[tensor["type"]])


def assert_codes(found: np.ndarray, case: dict[str, Any], lost: np.ndarray | None = None) -> None:
    """Compare codes; where a NaN went in (``lost``), any NaN will do, and any zero in a format without NaN."""
    name, wanted = NAMES[case["output"]["type"]], codes_of(case["output"])
    lost = np.zeros(found.shape, bool) if lost is None else lost
    assert found[~lost].tolist() == wanted[~lost].tolist()
    assert np.array_equal(decode(found[lost], name), decode(wanted[lost], name), equal_nan=True)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("cast_")])
def test_cast(name: str) -> None:
    case = CASES[name]
    x = values_of(case["inputs"][0])
    to, more = NAMES[case["output"]["type"]], {}
    if case["attributes"].get("saturate") == 0:
        more["overflow"] = "ieee"
    if isinstance(element(to), Integer):
        more["overflow"] = "wrap"  # Cast wraps; the convention is QuantizeLinear's
    assert_codes(encode(x, to, convention="onnx", **more), case, np.isnan(x))


def broadcast(parameter: np.ndarray, shape: tuple[int, ...], attributes: dict[str, Any]) -> np.ndarray:
    """Return a scale or zero point of ``QuantizeLinear`` for each element: per tensor, per axis or per block."""
    if parameter.size == 1:
        return np.broadcast_to(parameter.reshape(()), shape)
    axis = attributes.get("axis", 1)
    if attributes.get("block_size"):
        return np.repeat(parameter, attributes["block_size"], axis)
    return np.broadcast_to(parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("quantizelinear")])
def test_quantize_linear(name: str) -> None:
    case = CASES[name]
    x, scale, *zero = map(values_of, case["inputs"])
    scaled = (x / broadcast(scale, x.shape, case["attributes"])).astype(np.float32)
    to = NAMES[case["output"]["type"]]
    if isinstance(element(to), Integer):
        scaled = np.rint(scaled)  # before the zero point is added
    if zero:
        scaled = scaled + broadcast(zero[0], x.shape, case["attributes"])
    assert_codes(encode(scaled, to, convention="onnx"), case)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("dequantizelinear")])
def test_dequantize_linear(name: str) -> None:
    case = CASES[name]
    x, scale, *zero = map(values_of, case["inputs"])
    point = broadcast(zero[0], x.shape, case["attributes"]) if zero else 0.0
    y = (x - point) * broadcast(scale, x.shape, case["attributes"])
    assert_codes(encode(y, NAMES[case["output"]["type"]]), case)
    wanted = values_of(case["output"])
    assert np.array_equal(cast(y, NAMES[case["output"]["type"]]), wanted)


def test_the_vectors_are_all_there() -> None:
    kinds = [name.split("_")[0] for name in CASES]
    assert {kind: kinds.count(kind) for kind in kinds} == {"cast": 50, "dequantizelinear": 12, "quantizelinear": 11}
