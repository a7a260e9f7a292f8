"""What encode, decode and cast take, in which shape and dtype it comes back, and what they refuse, with which words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from format_engines import ENGINES, cast, decode, encode, running_on
from format_oracles import ML_DTYPES, TORCH, UNSIGNED
from format_values import FLOATS, SMALL, all_codes, same_bits

import narrowcast.formats as nf
from narrowcast.errors import FormatError
from narrowcast.formats import codec, reference
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer
from narrowcast.formats.rules import Rules

NUMBERS = [-3.0, -0.75, 0.0, 0.3, 1.0, 2.5, 7.0]
SOME = pytest.mark.parametrize("name", ["e4m3fn", "bf16", "fp16", "fp32", "tf32", "int8", "int16", "nf4", "e2m1"])


def expected(numbers: list[float], name: str) -> list[int]:
    format = SMALL.get(name) or FLOATS[name]
    return [reference.encode(value, format) for value in numbers]


@SOME
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f2", ">f4", ">f8"])
def test_numpy_floats_of_every_width_and_byte_order(name: str, dtype: str) -> None:
    x = np.array(NUMBERS, dtype)
    codes = encode(x, name)
    assert codes.tolist() == expected(x.astype(np.float64).tolist(), name)
    rounded = cast(x, name)
    assert rounded.dtype == np.dtype(dtype).newbyteorder("=")
    assert rounded.tolist() == decode(codes, name).astype(rounded.dtype).tolist()


@SOME
@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool", ">i4"]
)
def test_whole_numbers(name: str, dtype: str) -> None:
    x = np.array([0, 1, 2, 7, 100], dtype)
    codes = encode(x, name)
    assert codes.tolist() == expected(x.astype(np.float64).tolist(), name)
    rounded = cast(x, name)
    assert rounded.dtype == np.float64
    assert rounded.tolist() == decode(codes, name).tolist()


@pytest.mark.parametrize("own", ML_DTYPES)
@pytest.mark.parametrize("name", ["fp16", "bf16", "e4m3fn", "e5m2", "int8"])
def test_arrays_of_ml_dtypes(own: str, name: str) -> None:
    values = decode(all_codes(FLOATS[own]), own)
    keep = np.isfinite(values) if name == "int8" else np.ones(len(values), bool)
    x = all_codes(FLOATS[own])[keep].view(ML_DTYPES[own])
    codes = encode(x, name)
    assert (codes == encode(values[keep], name)).all()
    rounded = cast(x, name)
    assert rounded.dtype == x.dtype
    with np.errstate(all="ignore"):
        wanted = cast(values[keep], own, nan=None) if name == own else decode(encode(decode(codes, name), own), own)
    assert same_bits(decode(rounded.view(all_codes(FLOATS[own]).dtype), own), wanted).all()


@pytest.mark.parametrize("own", TORCH)
@pytest.mark.parametrize("name", ["fp16", "bf16", "e4m3fn", "e2m1", "int8", "nf4"])
def test_torch_tensors_come_back_as_torch_tensors(own: str, name: str) -> None:
    x = torch.tensor([0.5, 1.0, 2.0, 4.0]).to(TORCH[own])
    codes = codec.encode(x, name)
    assert isinstance(codes, torch.Tensor)
    assert codes.numpy().tolist() == expected([0.5, 1.0, 2.0, 4.0], name)
    values = codec.decode(codes, name)
    assert isinstance(values, torch.Tensor)
    assert values.dtype == torch.float64
    rounded = codec.cast(x, name)
    assert isinstance(rounded, torch.Tensor)
    assert rounded.dtype == x.dtype
    wanted = decode(
        encode(values.numpy(), own), own
    )  # the tensor's own dtype may be too narrow for the format's numbers
    assert same_bits(rounded.to(torch.float64).numpy(), wanted).all()


def test_torch_tensors_of_any_layout_in_memory_and_with_gradients() -> None:
    x = torch.linspace(-4, 4, 60).reshape(5, 12)
    for tensor in (x.T, x[::2, 1::3], x.clone().requires_grad_(), torch.zeros(0, 3), torch.tensor(1.3)):
        codes = codec.encode(tensor, "e4m3fn")
        assert codes.shape == tensor.shape
        assert (codes.numpy() == encode(np.ascontiguousarray(tensor.detach().numpy()), "e4m3fn")).all()
    assert codec.encode(torch.tensor([1, 2, 3]), "int8").tolist() == [1, 2, 3]
    assert codec.encode(torch.tensor([True, False]), "fp16").tolist() == [0x3C00, 0]


@pytest.mark.parametrize("x", [1.5, 3, True, [1.5, -2.0], [[1, 2], [3, 4]], (0.25,), [], np.float32(2.5), np.int8(3)])
def test_python_numbers_and_lists(x: object) -> None:
    wanted = np.asarray(x, np.float64)
    codes = encode(x, "e4m3fn")
    assert isinstance(codes, np.ndarray)
    assert codes.shape == wanted.shape
    assert (codes == encode(wanted, "e4m3fn")).all()
    assert (decode(codes, "e4m3fn") == wanted).all()
    assert cast(x, "e4m3fn").shape == wanted.shape


@SOME
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_shapes_and_orders(name: str, dtype: str) -> None:
    x = np.random.default_rng(0).normal(size=(6, 5, 7)).astype(dtype)
    flat = encode(x.reshape(-1), name)
    assert (encode(x, name) == flat.reshape(x.shape)).all()
    assert (encode(np.asfortranarray(x), name) == flat.reshape(x.shape)).all()
    assert (encode(x.transpose(2, 0, 1), name) == flat.reshape(x.shape).transpose(2, 0, 1)).all()
    assert (encode(x[::2, ::-1, 1:6:2], name) == flat.reshape(x.shape)[::2, ::-1, 1:6:2]).all()
    assert encode(x[0, 0, 0], name).shape == ()
    for empty in ((0,), (3, 0), (0, 5, 0)):
        assert encode(np.zeros(empty, dtype), name).shape == empty
        assert cast(np.zeros(empty, dtype), name).shape == empty
        assert decode(np.zeros(empty, np.uint8), name).shape == empty
    codes = encode(x, name)
    assert (decode(np.asfortranarray(codes), name) == decode(codes, name)).all()
    assert (decode(codes[::2, ::-1], name) == decode(codes, name)[::2, ::-1]).all()


@pytest.mark.parametrize("name", ["e4m3fn", "bf16", "fp16", "int8", "nf4", "e2m1"])
@pytest.mark.parametrize("size", [1, 2, 3, 32_767, 32_768, 32_769, 300_001])
def test_sizes_of_several_chunks_and_odd_lengths(name: str, size: int) -> None:
    x = np.random.default_rng(size).normal(size=size).astype(np.float32)
    codes = encode(x, name)
    parts = np.concatenate([encode(x[start : start + 1000], name) for start in range(0, min(size, 5000), 1000)])
    assert (codes[: len(parts)] == parts[:size]).all()
    tail = encode(x[-501:], name)
    assert (codes[-501:] == tail).all()
    assert (cast(x, name) == decode(codes, name)).all()


def test_inputs_are_left_as_they_were() -> None:
    x = np.random.default_rng(0).normal(size=999).astype(np.float32)
    before = x.copy()
    for name in ("e4m3fn", "fp16", "int8", "nf4"):
        codes = encode(x, name)
        kept = codes.copy()
        cast(x, name)
        decode(codes, name)
        assert (codes == kept).all()
    assert (x == before).all()
    x.flags.writeable = False
    encode(x, "bf16")


@pytest.mark.parametrize("format", SMALL.values(), ids=SMALL)
def test_codes_have_the_smallest_unsigned_dtype(format: ElementFormat) -> None:
    width = next(width for width in UNSIGNED if format.bits <= width)
    assert encode([1.0], format).dtype == UNSIGNED[width]


def test_codes_may_come_in_any_whole_dtype() -> None:
    for dtype in ("int8", "uint8", "int16", "int32", "uint32", "int64", "uint64", ">u2"):
        assert decode(np.array([0, 56, 126], dtype), "e4m3fn").tolist() == [0.0, 1.0, 448.0]
    assert decode([0, 56], "e4m3fn").tolist() == [0.0, 1.0]
    assert decode(56, "e4m3fn").shape == ()
    assert decode(np.array([1 << 63], np.uint64), "fp64").tolist() == [0.0]


@pytest.mark.parametrize("alias", ["float8_e4m3fn", "FP8", "fp8-e4m3", "torch.float8_e4m3fn", " e4m3fn "])
def test_aliases(alias: str) -> None:
    assert encode([1.0], alias).tolist() == [56]


# --- what is refused ---------------------------------------------------------------------------------------------


def test_an_unknown_format_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(FormatError, match="'e4m3fnn'") as caught:
        codec.encode([1.0], "e4m3fnn")
    assert "did you mean e4m3fn or e4m3fnuz or e4m3?" in caught.value.allowed
    with pytest.raises(FormatError, match="mxfp8_e4m3 is a block format") as caught:
        codec.encode([1.0], "mxfp8_e4m3")
    assert "e4m3fn" in caught.value.allowed


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (np.array([1j]), "complex128"),
        (np.array(["1.5"]), "str"),
        (np.array([object()]), "object"),
        (np.array(["2020-01-01"], "datetime64[D]"), "datetime64"),
        (torch.tensor([1j]), "complex64"),
        (["1.5"], "str"),
        ("1.5", "str"),
        ([1j], "complex128"),
        (None, "object"),
        ([1.0, None], "object"),
        (object(), "object"),
        ([[1.0], [1.0, 2.0]], "list"),
    ],
)
def test_what_is_no_real_number_is_refused(x: object, named: str) -> None:
    for call in (codec.encode, codec.cast):
        with pytest.raises(FormatError, match=named) as caught:
            call(x, "e4m3fn")
        assert "float32" in caught.value.allowed


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (np.array([1, 2**53 + 1]), str(2**53 + 1)),
        (np.array([-(2**53) - 1]), str(2**53 + 1)),
        (np.array([2**64 - 1], np.uint64), str(2**64 - 1)),
        (torch.tensor([2**53 + 1]), str(2**53 + 1)),
    ],
    ids=str,
)
def test_whole_numbers_that_float64_does_not_hold_are_refused(x: object, named: str) -> None:
    with pytest.raises(FormatError, match=named):
        codec.encode(x, "fp32")
    assert encode(np.array([2**53]), "fp64").view(np.float64).tolist() == [2.0**53]


def test_python_whole_numbers_that_float64_does_not_hold_are_refused() -> None:
    with pytest.raises(FormatError, match=str(2**53 + 1)):
        codec.encode([1, 2**53 + 1], "fp32")


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "int8", "uint4", "int16", "nf4"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("place", [0, 7, 69_999])
@pytest.mark.parametrize("engine", ENGINES)
def test_nan_without_a_place_to_go_is_refused_by_its_position(name: str, dtype: str, place: int, engine: str) -> None:
    x = np.zeros(70_000, dtype)
    x[place:] = np.nan
    for call in (codec.encode, codec.cast):
        with running_on(engine), pytest.raises(FormatError, match=rf"position {place}, and {name} has none") as caught:
            call(x, name)
        assert "nan='zero'" in caught.value.next_step


@pytest.mark.parametrize(
    ("codes", "name", "named"),
    [
        ([256], "e4m3fn", "256"),
        ([-1], "e4m3fn", "-1"),
        (np.array([16], np.uint8), "e2m1", "16"),
        (np.array([64]), "e3m2", "64"),
        (np.array([1 << 16]), "fp16", "65536"),
        (np.array([1 << 19], np.uint32), "tf32", "524288"),
        (np.array([-1]), "fp64", "-1"),
        (torch.tensor([300]), "int8", "300"),
    ],
    ids=str,
)
def test_codes_out_of_range_are_refused(codes: object, name: str, named: str) -> None:
    with pytest.raises(FormatError, match=named) as caught:
        codec.decode(codes, name)
    assert "0 to" in caught.value.allowed


def test_a_code_beyond_the_end_of_a_codebook_is_refused() -> None:
    with pytest.raises(FormatError, match="6"):
        codec.decode([6], Codebook("six", (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)))


@pytest.mark.parametrize(
    "codes", [np.array([1.0]), [0.5], np.array(["a"]), torch.tensor([1.0]), np.array([True])], ids=str
)
def test_codes_that_are_no_whole_numbers_are_refused(codes: object) -> None:
    with pytest.raises(FormatError, match="codes of dtype"):
        codec.decode(codes, "e4m3fn")


def test_float32_is_refused_where_it_would_round() -> None:
    for name in ("fp64", Format(9, 4, name="wide"), Codebook("fine", (0.0, 0.1))):
        with pytest.raises(FormatError, match="in float32 would be rounded"):
            codec.decode([0], name, dtype="float32")
    for dtype in ("float16", ["float32"], None):
        with pytest.raises(FormatError, match="float64, float32"):
            codec.decode([0], "e4m3fn", dtype=dtype)  # type: ignore[arg-type]
    for name in ("fp32", "tf32", "bf16", "e8m0", "int16", "nf4"):
        assert decode([0], name, dtype="float32").dtype == np.float32


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ({"rounding": "nearest_evn"}, "nearest_evn"),
        ({"overflow": "saturated"}, "saturated"),
        ({"nan": "nothing"}, "nothing"),
        ({"below": "zero"}, "'zero'"),
        ({"convention": "onxx"}, "onxx"),
        ({"overflow": "wrap"}, "wrap"),
    ],
    ids=str,
)
def test_unknown_and_impossible_choices_are_refused(choices: dict[str, str], named: str) -> None:
    for call in (codec.encode, codec.cast):
        with pytest.raises(FormatError, match=named) as caught:
            call([1.0], "e4m3fn", **choices)
        assert caught.value.allowed


@pytest.mark.parametrize("name", ["e2m1", "int8", "nf4"])
def test_overflow_to_nan_needs_nan(name: str) -> None:
    with pytest.raises(FormatError, match=f"overflow = 'nan' with {name}"):
        Rules.of(SMALL[name], overflow="nan")


@pytest.mark.parametrize("name", [None, 8, np.float16, np.dtype("float32"), torch.bfloat16], ids=str)
def test_what_is_neither_a_name_nor_a_format_is_refused(name: object) -> None:
    for call in (nf.get, lambda format: nf.encode([1.0], format), lambda format: nf.quantize([1.0], format)):
        with pytest.raises(FormatError, match="is no number format"):
            call(name)  # type: ignore[arg-type]


def test_a_list_for_a_format_is_refused_like_any_other_thing() -> None:
    for call in (nf.encode, nf.decode, nf.cast, nf.quantize):  # which look up what they were given before
        with pytest.raises(FormatError, match="is no number format"):
            call([1], ["bf16"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("f16", "fp16"),
        ("F8_E5M2", "e5m2"),
        ("i16", "int16"),
        ("u3", "uint3"),
        ("Half", "fp16"),
        ("fp4", "e2m1"),
        ("F8_E4M3", "e4m3fn"),
        ("F8_E8M0", "e8m0"),
        ("F6_E2M3", "e2m3"),
        ("F4", "e2m1"),
    ],
)
def test_what_people_type_is_understood(alias: str, name: str) -> None:
    assert nf.get(alias) is nf.get(name)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: nf.encode(x, "bf16"),
        lambda x: nf.cast(x, "int8"),
        lambda x: nf.decode(x, "e4m3fn"),
        lambda x: nf.quantize(x, "mxfp4"),
        lambda x: nf.error(x, x),
        lambda x: nf.pack(x, 8),
        lambda x: nf.unpack(x, 8, 3),
        lambda x: nf.four_bit_errors(x),
    ],
)
def test_tensors_that_hold_no_numbers_are_refused(call: Callable[[torch.Tensor], object]) -> None:
    for dtype in (torch.float32, torch.uint8):
        with pytest.raises(FormatError, match="meta device"):
            call(torch.empty(64, dtype=dtype, device="meta"))


def test_below_to_nan_needs_nan() -> None:
    with pytest.raises(FormatError, match="below = 'nan'"):
        codec.encode([1.0], Format(5, 3, signed=False, nan="none"), below="nan")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Format(0, 3), "exponent_bits = 0"),
        (lambda: Format(12, 3), "exponent_bits = 12"),
        (lambda: Format(4, -1), "mantissa_bits = -1"),
        (lambda: Format(4, 53), "mantissa_bits = 53"),
        (lambda: Format(4, 0), "no significand bits"),
        (lambda: Format(4, 3, nan="some"), "nan = 'some'"),
        (lambda: Format(4, 3, signed=False, nan="negative_zero"), "negative_zero"),
        (lambda: Format(4, 3, has_zero=False, nan="negative_zero"), "negative_zero"),
        (lambda: Format(4, 3, 1100), "smallest exponent -1099"),
        (lambda: Format(4, 3, -1100), "largest exponent 1114"),
        (lambda: Format(1, 2), "no normal number"),
        (lambda: Format("4", 3), "exponent_bits = '4'"),  # type: ignore[arg-type]
        (lambda: Format(4, 3, 7.5), "bias = 7.5"),  # type: ignore[arg-type]
        (lambda: Integer(8.0), "bits = 8.0"),  # type: ignore[arg-type]
        (lambda: Codebook("words", ("a", "b")), "could not convert"),  # type: ignore[arg-type]
        (lambda: Integer(1), "bits = 1"),
        (lambda: Integer(17), "bits = 17"),
        (lambda: Integer(0, signed=False), "bits = 0"),
        (lambda: Integer(8, fraction_bits=-1), "fraction_bits = -1"),
        (lambda: Integer(8, fraction_bits=65), "fraction_bits = 65"),
        (lambda: Codebook("one", (1.0,)), "1 values"),
        (lambda: Codebook("twice", (1.0, 1.0)), "1.0 after 1.0"),
        (lambda: Codebook("falling", (1.0, 0.5)), "0.5 after 1.0"),
        (lambda: Codebook("open", (0.0, float("inf"))), "inf after 0.0"),
        (lambda: Codebook("nan", (float("nan"), 1.0)), "1.0 after nan"),
    ],
)
def test_formats_that_contradict_themselves_are_refused(make: object, named: str) -> None:
    with pytest.raises(FormatError, match=named):
        make()  # type: ignore[operator]


# --- what formats say of themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ML_DTYPES)
def test_limits_are_those_of_ml_dtypes(name: str) -> None:
    format, info = FLOATS[name], ml_dtypes.finfo(ML_DTYPES[name])
    assert format.max == float(info.max)
    assert format.min == float(info.min)
    assert format.bits == info.bits
    assert format.smallest_normal == float(info.smallest_normal)
    assert format.smallest_subnormal == float(info.smallest_subnormal)
    assert format.mantissa_bits == info.nmant
    if name not in ("e2m3", "e8m0"):  # one ulp at 1 is a subnormal of E2M3 there, and E8M0's next number is 2
        assert format.eps == float(info.eps)


@pytest.mark.parametrize("name", TORCH)
def test_limits_are_those_of_torch(name: str) -> None:
    format, info = FLOATS[name], torch.finfo(TORCH[name])
    assert (format.max, format.min, format.smallest_normal, format.bits) == (
        info.max,
        info.min,
        info.smallest_normal,
        info.bits,
    )


def test_importing_the_formats_imports_no_torch() -> None:
    script = (
        "import sys, narrowcast.formats as formats\n"
        "codes = formats.encode([1.0, 2.0], 'e4m3fn'); formats.decode(codes, 'e4m3fn'); formats.cast([1.0], 'nf4')\n"
        "found = {'torch', 'onnx', 'ml_dtypes', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_scalar_reference_needs_no_numpy() -> None:
    script = (
        "import sys; sys.modules['numpy'] = None\n"
        "from narrowcast.formats import reference, reference_blocks\n"
        "from narrowcast.formats.granularity import PerBlock\n"
        "from narrowcast.formats.scheme import Scheme\n"
        "from narrowcast.formats.table import ELEMENTS\n"
        "assert reference.encode(0.1, ELEMENTS['bf16']) == 0x3DCD\n"
        "assert reference.decode(0, ELEMENTS['nf4']) == -1.0\n"
        "scheme = Scheme(ELEMENTS['e2m1'], PerBlock(32), ELEMENTS['e8m0'])\n"
        "assert reference_blocks.block_scale([3.0, -0.1], scheme) == 0.5\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_format_of_one_s_own_may_bear_a_known_name() -> None:
    own = nf.Format(4, 3, 7, name="fp16")
    known = nf.Format(4, 3, 7, name="e4m3")
    codes = np.arange(256, dtype=np.uint8)
    values = nf.decode(codes, own, dtype="float32")
    assert np.array_equal(values, nf.decode(codes, known, dtype="float32"), equal_nan=True)
    numbers = np.linspace(-300, 300, 1001, dtype=np.float32)
    assert (nf.encode(numbers, own) == nf.encode(numbers, known)).all()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("e5m2", "float8_e5m2")])
def test_torch_s_convention_gives_a_tensor_torch_s_own_codes(name: str, dtype: str) -> None:
    x = torch.tensor([0.1, -3.0, 1e9, float("inf"), float("nan"), -float("nan"), 1e-9] * 9)
    wanted = x.to(getattr(torch, dtype))
    found = nf.encode(x, name, convention="torch")
    assert torch.equal(found, wanted.view(found.dtype))
