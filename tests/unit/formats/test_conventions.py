"""``convention=`` against the systems themselves, on every boundary and every special number.

From float32 (and float16): these libraries round float64 through float32, twice, and narrowcast does not.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from format_engines import decode, encode
from format_oracles import ML_DTYPES, ML_INTEGERS, NUMPY, TORCH, UNSIGNED, ml_codes, torch_codes
from format_values import FLOATS, INTEGERS, all_codes, assert_same, boundary_values
from onnx import TensorProto, helper
from onnx.numpy_helper import to_float8e8m0
from onnx.reference import ReferenceEvaluator

from narrowcast.errors import FormatError
from narrowcast.formats.rules import CONVENTIONS

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16"])
NANS = np.array([np.nan, -np.nan])
ONNX_FLOATS = {
    "fp64": TensorProto.DOUBLE,
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "e5m2": TensorProto.FLOAT8E5M2,
    "e4m3fn": TensorProto.FLOAT8E4M3FN,
    "e4m3fnuz": TensorProto.FLOAT8E4M3FNUZ,
    "e5m2fnuz": TensorProto.FLOAT8E5M2FNUZ,
    "e3m2": TensorProto.FLOAT6E3M2,
    "e2m3": TensorProto.FLOAT6E2M3,
    "e2m1": TensorProto.FLOAT4E2M1,
    "e8m0": TensorProto.FLOAT8E8M0,
}
ONNX_INTEGERS = {
    "int4": TensorProto.INT4,
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "uint4": TensorProto.UINT4,
    "uint8": TensorProto.UINT8,
    "uint16": TensorProto.UINT16,
}
# torch 2.15 gives the largest number for E4M3FN above 464, where older ones give NaN.
TORCH_SATURATES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15)


def inputs(name: str, dtype: str) -> np.ndarray:
    """Return the boundary values of a format; of a wide one, those of FP16. For E8M0, what float32 holds normally."""
    format = FLOATS.get(name) or INTEGERS[name]
    x = boundary_values(format if format.bits <= 16 else FLOATS["fp16"], dtype)
    return x[(np.abs(x) >= np.finfo(np.float32).tiny) | (x == 0)] if name == "e8m0" else x


def same_kind(found: np.ndarray, wanted: np.ndarray, name: str) -> bool:
    """Return whether codes of NaN stand for NaN in both; payloads differ between vector and scalar code of one library."""
    return bool((np.isnan(decode(found, name)) == np.isnan(decode(wanted, name))).all())


@pytest.mark.parametrize("name", [*ML_DTYPES, *NUMPY])
@DTYPES
def test_ml_dtypes(name: str, dtype: str) -> None:
    x = inputs(name, dtype)
    assert_same(encode(x, name, convention="ml_dtypes"), ml_codes(x, name), x)
    if FLOATS[name].has_nan:
        nan = NANS.astype(dtype)
        assert (encode(nan, name, convention="ml_dtypes") == ml_codes(nan, name)).all()


@pytest.mark.parametrize("name", ["e3m2", "e2m3", "e2m1"])
def test_ml_dtypes_turns_nan_to_zero_where_there_is_none(name: str) -> None:
    wanted = decode(ml_codes(NANS.astype(np.float32), name), name)
    assert (decode(encode(NANS, name, convention="ml_dtypes"), name) == wanted).all()
    assert (wanted == 0).all()
    assert np.signbit(wanted).tolist() == [True, False]  # ml_dtypes flips the sign of such a zero; narrowcast gives +0


@pytest.mark.parametrize("name", ["int8", "int16", "uint8", "uint16", *ML_INTEGERS])
def test_ml_dtypes_integers_are_cut_and_wrapped(name: str) -> None:
    x = inputs(name, "float32")
    x = x[np.abs(x) < 2.0**31]  # beyond, C leaves the conversion undefined, and processors differ
    with np.errstate(invalid="ignore"):
        wanted = x.astype(ML_INTEGERS.get(name, name)).view(all_codes(INTEGERS[name]).dtype)
    assert_same(encode(x, name, convention="ml_dtypes"), wanted & ((1 << INTEGERS[name].bits) - 1), x)


@pytest.mark.parametrize("name", TORCH)
@DTYPES
def test_torch(name: str, dtype: str) -> None:
    x = inputs(name, dtype)
    if name == "e4m3fn" and not TORCH_SATURATES:
        x = x[np.abs(x) <= 464]
    assert_same(encode(x, name, convention="torch"), torch_codes(x, name), x)
    nan = NANS.astype(dtype)
    assert same_kind(encode(nan, name, convention="torch"), torch_codes(nan, name), name)


def test_torch_rounds_float64_through_float32_and_narrowcast_does_not() -> None:
    for name in TORCH:
        if name in ("fp64", "fp32", "e8m0"):
            continue
        x = boundary_values(FLOATS[name], stride=5)
        with np.errstate(over="ignore"):
            single = x.astype(np.float32)
        finite = np.isfinite(single) & (np.abs(single) <= FLOATS[name].max)
        twice, once = torch_codes(x, name), encode(x, name, convention="torch")
        assert_same(encode(single, name, convention="torch")[finite], twice[finite], x[finite])
        assert (once != twice).any(), name


def onnx_cast(x: np.ndarray, to: int) -> np.ndarray:
    """Return the codes that the reference evaluator's Cast gives, with its default attributes."""
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=to)],
        "cast",
        [helper.make_tensor_value_info("x", kind, [None])],
        [helper.make_tensor_value_info("y", to, [None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    with np.errstate(all="ignore"):
        y = ReferenceEvaluator(model).run(None, {"x": x})[0]
    return y.view(UNSIGNED[8 * y.itemsize])


@pytest.mark.parametrize("name", ONNX_FLOATS)
@DTYPES
def test_onnx_cast(name: str, dtype: str) -> None:
    x = inputs(name, dtype)
    assert_same(encode(x, name, convention="onnx"), onnx_cast(x, ONNX_FLOATS[name]), x)
    nan = NANS.astype(dtype)
    if FLOATS[name].has_nan:
        assert same_kind(encode(nan, name, convention="onnx"), onnx_cast(nan, ONNX_FLOATS[name]), name)
    else:
        ours, theirs = encode(nan, name, convention="onnx"), onnx_cast(nan, ONNX_FLOATS[name])
        assert (
            decode(ours, name) == decode(theirs, name)
        ).all()  # zeros; onnx casts by ml_dtypes, which flips their sign


def onnx_quantize(x: np.ndarray, to: int) -> np.ndarray:
    """Return the codes that the reference evaluator's QuantizeLinear gives with a scale of 1."""
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale"], ["y"], output_dtype=to)],
        "quantize",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "scale")],
        [helper.make_tensor_value_info("y", to, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    y = ReferenceEvaluator(model).run(None, {"x": x, "scale": np.ones((), np.float32)})[0]
    return y.view(UNSIGNED[8 * y.itemsize])


@pytest.mark.parametrize("name", ONNX_INTEGERS)
def test_onnx_quantize_linear_of_integers(name: str) -> None:
    x = inputs(name, "float32")
    x = x[np.abs(x) < 2.0**31]  # onnx's reference goes through int32
    wanted = onnx_quantize(x, ONNX_INTEGERS[name]) & ((1 << INTEGERS[name].bits) - 1)
    assert_same(encode(x, name, convention="onnx"), wanted, x)


@pytest.mark.parametrize("name", ["e5m2", "e4m3fn", "e4m3fnuz", "e5m2fnuz", "e2m1"])
def test_onnx_quantize_linear_of_floats(name: str) -> None:
    x = inputs(name, "float32")
    assert_same(encode(x, name, convention="onnx"), onnx_quantize(x, ONNX_FLOATS[name]), x)


def test_e8m0_of_numbers_that_float32_holds_as_subnormal() -> None:
    """There the libraries read the exponent field and so round wrongly; narrowcast rounds what the number is worth."""
    x = np.array([1.125 * 2.0**-127, 1.25 * 2.0**-127, 1.5 * 2.0**-127], np.float32)
    assert ml_codes(x, "e8m0").tolist() == [1, 1, 1]
    assert encode(x, "e8m0", convention="ml_dtypes").tolist() == [0, 0, 1]
    assert encode(x, "e8m0", convention="torch").tolist() == [0, 0, 1]
    assert encode(x, "e8m0", convention="onnx").tolist() == [1, 1, 1]
    x = np.array([2.0**-127, 2.0**-130], np.float32)
    assert to_float8e8m0(x).view(np.uint8).tolist() == [1, 1]
    assert encode(x, "e8m0", convention="onnx").tolist() == [0, 0]


# CUDA 13 math API, type casting intrinsics: what the C++ constructors of __nv_fp8_e4m3 and its kin document.
CUDA = [
    ("e4m3fn", [448.0, 449.0, 464.0, 480.0, 1e6, np.inf, -np.inf, -500.0], [126, 126, 126, 126, 126, 126, 254, 254]),
    ("e5m2", [57344.0, 61440.0, 65536.0, np.inf, -np.inf], [0x7B, 0x7B, 0x7B, 0x7B, 0xFB]),
    ("e2m1", [6.0, 7.0, 100.0, np.inf, -np.inf, np.nan, -np.nan], [7, 7, 7, 7, 15, 7, 7]),
    ("e2m3", [7.5, 8.0, np.inf, -np.inf, np.nan, -np.nan], [0x1F, 0x1F, 0x1F, 0x3F, 0x1F, 0x1F]),
    ("e3m2", [28.0, 32.0, np.inf, -np.inf, np.nan, -np.nan], [0x1F, 0x1F, 0x1F, 0x3F, 0x1F, 0x1F]),
    ("e8m0", [1.0, 1.0000001, 1.5, 2.0, -3.0, 0.0, 2.0**-140, 1.5 * 2.0**127, np.inf, np.nan],
     [127, 128, 128, 128, 129, 0, 0, 254, 254, 255]),
    ("fp16", [65504.0, 65519.0, 65520.0, -np.inf], [0x7BFF, 0x7BFF, 0x7C00, 0xFC00]),
    ("bf16", [1.00390625, 3.4e38, np.inf], [0x3F80, 0x7F80, 0x7F80]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "codes"), CUDA, ids=[row[0] for row in CUDA])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cuda_as_documented(name: str, values: list[float], codes: list[int], dtype: str) -> None:
    assert encode(np.array(values, dtype), name, convention="cuda").tolist() == codes


def test_a_named_choice_goes_over_the_convention() -> None:
    assert encode([500.0], "e4m3fn", convention="torch").tolist() == [126]
    assert encode([500.0], "e4m3fn", convention="torch", overflow="ieee").tolist() == [127]
    assert encode([1.5], "e8m0", convention="onnx", rounding="down").tolist() == [127]


def test_every_convention_knows_what_its_system_has() -> None:
    assert set(CONVENTIONS) == {"ml_dtypes", "torch", "onnx", "cuda"}
    assert {*ML_DTYPES, *NUMPY, *ML_INTEGERS} <= set(CONVENTIONS["ml_dtypes"])
    assert set(TORCH) <= set(CONVENTIONS["torch"])
    assert {*ONNX_FLOATS, *ONNX_INTEGERS} <= set(CONVENTIONS["onnx"])


def test_an_unknown_convention_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(FormatError, match="'pytorch'") as caught:
        encode([1.0], "e4m3fn", convention="pytorch")
    assert "did you mean torch?" in caught.value.allowed


def test_the_versions_whose_conduct_is_recorded() -> None:
    """Their conduct changed before; where this fails, look at CONVENTIONS and at what it says was observed."""
    assert ml_dtypes.__version__.startswith("0.6.")
