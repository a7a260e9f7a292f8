"""The loops over vector registers where vectors go wrong: rests, unaligned starts, other processors, kept machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from format_engines import running_on
from format_values import all_codes, boundary_values, same_bits

import narrowcast.formats as nf
from narrowcast.formats import compiled, portable, reference, vectors
from narrowcast.formats.arrays import code_dtype
from narrowcast.formats.kinds import Format
from narrowcast.formats.rules import Rules
from narrowcast.formats.table import ELEMENTS
from narrowcast.formats.tables import by_arithmetic, decoded_by_arithmetic, special_codes, values_of

# Formats with float32's own bias, of its lowest and highest exponents, and of one digit beside those of the table.
OWN = [
    Format(8, 1, name="e8m1"),
    Format(8, 2, name="e8m2"),
    Format(8, 7, nan="none", bias=128, name="beyond_float32"),
    Format(5, 10, bias=127, name="lowest_exponents"),
    Format(5, 10, bias=117, name="just_normal_in_float32"),
    Format(5, 10, bias=118, name="subnormals_of_float32"),
    Format(4, 3, bias=-100, nan="all_ones", name="highest_exponents"),
    Format(2, 1, nan="none", name="e2m1_again"),
]
FORMATS = [item for item in (*ELEMENTS.values(), *OWN) if by_arithmetic(item)]
EVERY = pytest.mark.parametrize("format", FORMATS, ids=lambda item: item.name)
OVERFLOWS = ("ieee", "saturate", "clamp", "nan")


def rules_of(format: Format) -> list[Rules]:
    overflows = OVERFLOWS if format.has_nan else OVERFLOWS[:3]
    nans = ["error"] if format.has_nan else ["zero", "max"]
    return [Rules.of(format, overflow=overflow, nan=nan) for overflow in overflows for nan in nans]


def encoded(loops: object, x: np.ndarray, format: Format, rules: Rules) -> np.ndarray:
    codes = np.empty(x.shape, code_dtype(format.bits))
    loops.rounded_to_nearest(x, format, special_codes(format, rules), codes)  # type: ignore[attr-defined]
    return codes


def test_formats_that_arithmetic_cannot_do_are_known() -> None:
    names = {item.name for item in FORMATS}
    assert {"fp16", "bf16", "e4m3fn", "e5m2", "e2m1", "lowest_exponents", "highest_exponents", "e8m1"} <= names
    assert not {"beyond_float32", "subnormals_of_float32"} & names
    assert not any(by_arithmetic(ELEMENTS[name]) for name in ("e8m0", "int8", "nf4"))


@pytest.fixture(params=["own conversions", "arithmetic"])
def conversions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """FP16 and BF16 by loops of their own, and by the arithmetic that serves every format."""
    if request.param == "arithmetic":
        monkeypatch.setattr(vectors, "converts_half", lambda: False)
        monkeypatch.setattr(compiled, "_is_cut", lambda _: False)
    return request.param


@EVERY
@pytest.mark.usefixtures("conversions")
def test_every_rule_of_overflow_and_nan_is_as_the_reference_says(format: Format) -> None:
    x = boundary_values(format, "float32", max(len(all_codes(format)) // 64, 1) | 1)
    nan = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0xFFFFFFFF, 0x7FABCDEF, 0xFFABCDEF], np.uint32).view(np.float32)
    huge = np.array([3.4028235e38, -3.4028235e38, np.inf, -np.inf, 1e-45, -1e-45, -0.0, 0.0], np.float32)
    x = np.concatenate([x[~np.isnan(x)], huge])
    for rules in rules_of(format):
        wanted = [reference.encode(value, format, rules) for value in x.astype(np.float64).tolist()]
        assert encoded(compiled, x, format, rules).tolist() == wanted, rules
        both = np.concatenate([nan, x])
        assert (encoded(compiled, both, format, rules) == encoded(portable, both, format, rules)).all(), rules
        for value, code in zip(nan, encoded(compiled, nan, format, rules).tolist(), strict=True):
            sign = format.sign_bit * bool(np.signbit(value))
            if not format.has_nan:
                assert code == (format.max_code if rules.nan == "max" else 0)
            elif format.has_inf:
                payload = int(value.view(np.uint32)) >> (23 - format.mantissa_bits) & (1 << format.mantissa_bits) - 1
                assert code == sign | format.nan_code | payload
            else:
                assert code == sign | format.nan_code


@pytest.mark.parametrize("format", [f for f in FORMATS if decoded_by_arithmetic(f)], ids=lambda item: item.name)
@pytest.mark.usefixtures("conversions")
def test_every_code_decodes_as_the_reference_says(format: Format) -> None:
    codes = all_codes(format)
    found = np.empty(codes.shape, np.float32)
    assert compiled.decoded_floats(codes, format, found)
    wanted = values_of(format, "float32").single
    assert same_bits(found, wanted).all()
    sample = codes[:: max(len(codes) // 512, 1)].tolist()
    exact = np.array([reference.decode(code, format) for code in sample])
    assert same_bits(found[sample].astype(np.float64), exact).all()
    lost = found[np.isnan(found)].view(np.uint32)
    assert (lost & 0x400000).all()  # a NaN is quiet, and keeps its sign and payload
    assert (lost == wanted[np.isnan(wanted)].view(np.uint32)).all()
    wide = np.empty(codes.shape, np.float64)
    assert compiled.decoded_floats(codes, format, wide)
    assert (wide.view(np.uint64) == values_of(format, "float64").single.view(np.uint64)).all()


def test_float64_is_narrowed_to_odd_numbers_of_float32() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 64, 20_000, dtype=np.uint64).view(np.float64)  # of all exponents, some NaN
    near = rng.standard_normal(20_000) * np.exp2(rng.integers(-160, 124, 20_000))
    halves = near.astype(np.float32).astype(np.float64)
    x = np.concatenate([x, near, halves, np.nextafter(halves, 0), [np.inf, -np.inf, 0.0, -0.0, 5e-324, 1e39, -1e39]])
    found = compiled.narrowed_to_odd(x)
    assert (found.view(np.uint32) == portable.narrowed_to_odd(x).view(np.uint32)).all()
    wanted = nf.encode(x, "fp32", rounding="to_odd").view(np.float32)
    assert (found.view(np.uint32) == wanted.view(np.uint32)).all()


@pytest.mark.parametrize("name", ["fp16", "bf16", "e5m2", "e4m3fn"])
def test_rests_and_unaligned_starts(name: str) -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 32, 600, dtype=np.uint32)
    with running_on("portable"):
        codes = nf.encode(words.view(np.float32), name)
        values = nf.decode(codes, name, dtype="float32")
    with running_on("compiled"):
        for start in range(5):
            for length in (0, 1, 7, 15, 16, 17, 31, 33, 63, 65, 127, 255, 500):
                part = slice(start, start + length)
                assert (nf.encode(words.view(np.float32)[part], name) == codes[part]).all()
                assert same_bits(nf.decode(codes[part], name, dtype="float32"), values[part]).all()
        odd = np.frombuffer(b"." + words.tobytes(), np.float32, offset=1)  # begins between two numbers
        assert not odd.flags.aligned
        assert (nf.encode(odd, name) == codes).all()
        assert (nf.encode(words.view(np.float32)[::-3], name) == codes[::-3]).all()


NIBBLE_ROWS = pytest.mark.parametrize("length", [2, 6, 14, 16, 18, 30, 32, 34, 48, 62, 64, 66, 100, 128, 130])


def nibbles(length: int, dtype: str) -> tuple[np.ndarray, np.ndarray, portable.Values, np.ndarray]:
    """Return 17 rows: packed codes (which begin at an odd address), scales, values, and what they decode to."""
    rng = np.random.default_rng(length)
    packed = rng.integers(0, 256, 17 * length // 2 + 1, dtype=np.uint8)[1:]
    scales = (rng.standard_normal(17) * np.exp2(rng.integers(-130, 120, 17))).astype(dtype)
    scales[:3] = np.nan, 0.0, np.inf
    values = portable.Values(rng.standard_normal(16).astype(dtype))
    values.single[0] = 0.0
    codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(17, length)
    with np.errstate(all="ignore"):
        return packed, scales, values, values.single[codes] * scales[:, None]


@NIBBLE_ROWS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("in_registers", [True, False])
def test_packed_codes_of_every_length_of_row(
    length: int, dtype: str, in_registers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_registers:  # as on a processor without permutations
        monkeypatch.setattr(vectors, "permutes", lambda: False)
    packed, scales, values, wanted = nibbles(length, dtype)
    for loops in (compiled, portable):
        guarded = np.full(wanted.size + 32, 7.0, dtype)
        out = guarded[15:-17].reshape(wanted.shape)
        loops.decoded_nibbles(packed, scales, values, out)
        assert same_bits(out, wanted).all()
        assert (guarded[:15] == 7).all()  # nothing beside the rows is written
        assert (guarded[-17:] == 7).all()


@pytest.mark.skipif(not vectors.permutes(), reason="this processor has no permutation to test")
@pytest.mark.parametrize(
    ("features", "instruction"), [("+avx,+avx2", "avx2.permps"), ("+avx2,+avx512f", "avx512.permvar")]
)
def test_each_permutation_gives_the_same(features: str, instruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "+avx512f" in features and "+avx512f" not in vectors.features_of_target():
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(vectors, "features_of_target", lambda: features.split(","))
    decode = numba.njit(error_model="numpy")(vectors.decode_nibbles.py_func)
    for length in (16, 48, 64):
        packed, scales, values, wanted = nibbles(length, "float32")
        out = np.empty(wanted.shape, np.float32)
        decode(packed, scales, values.single, out)
        assert same_bits(out, wanted).all()
    assert instruction in decode.inspect_llvm(decode.signatures[0])


@pytest.mark.parametrize("name", ["nf4", "mxfp4", "nvfp4", "int4"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_four_bit_tensors_dequantise_alike(name: str, dtype: str) -> None:
    x = np.random.default_rng(4).standard_normal((5, 192)).astype(np.float32)
    found = []
    for engine in ("portable", "compiled"):
        with running_on(engine):
            found.append(nf.quantize(x, name).dequantize(dtype))
    assert found[0].dtype == dtype
    assert same_bits(found[1], found[0]).all()


@pytest.mark.parametrize("name", ["nf4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_outputs_are_the_float32_ones_rounded(name: str, dtype: str) -> None:
    x = torch.randn(3, 208 if name == "nvfp4" else 192, generator=torch.Generator().manual_seed(0))
    q = nf.quantize(x.to(getattr(torch, dtype)), name)
    assert torch.equal(q.dequantize(), q.dequantize("float32").to(getattr(torch, dtype)))


CHILD = """
import hashlib, numpy as np
import narrowcast.formats as nf
from narrowcast.formats import vectors
x = np.arange(1 << 16, dtype=np.uint32) * np.uint32(65521)
x = nf.encode(x.view(np.float32), "e5m2"), nf.quantize(np.linspace(-3, 5, 4096, dtype=np.float32), "nf4").dequantize()
loops = (vectors.encode_nearest, vectors.decode_nibbles, vectors.decode_pairs)
hits = sum(sum(loop.stats.cache_hits.values()) for loop in loops)
print(hashlib.sha256(b"".join(part.tobytes() for part in x)).hexdigest(), hits)
"""


@pytest.mark.exhaustive
def test_kept_machine_code_is_used_again_but_not_by_another_processor(tmp_path: Path) -> None:
    def run(**settings: str) -> tuple[str, int]:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(nf.__file__).parents[2])}
        made = subprocess.run(
            [sys.executable, "-c", CHILD], env=environment | settings, capture_output=True, text=True, check=True
        )
        digest, hits = made.stdout.split()
        return digest, int(hits)

    first, compiled_first = run()
    assert compiled_first == 0
    assert run() == (first, 2)
    assert run(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == (first, 0)
    assert run() == (first, 2)
