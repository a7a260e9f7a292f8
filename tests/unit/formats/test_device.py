"""The codecs on other devices: the bits are the CPU's.

The torch operations run on any device, so they are held to NumPy's results on the CPU here. Triton's kernels run in its
interpreter, in a process of their own; on a GPU where there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from format_values import FLOATS, INTEGERS, OWN, SMALL, all_codes, boundary_values, extremes, overflows  # noqa: E402

from narrowcast import formats as nf  # noqa: E402
from narrowcast.errors import FormatError  # noqa: E402
from narrowcast.formats import device  # noqa: E402
from narrowcast.formats.kinds import Format  # noqa: E402
from narrowcast.formats.rules import Rounding, Rules  # noqa: E402
from narrowcast.formats.table import ELEMENTS  # noqa: E402

HERE = Path(__file__).parent
ALL = ELEMENTS | OWN


def numbers_of(format, dtype):
    if format.bits <= 16:
        return torch.from_numpy(boundary_values(format, dtype, stride=1 if format.bits <= 8 else 101))
    rng = np.random.default_rng(2)
    with np.errstate(over="ignore"):
        found = np.concatenate([extremes(), rng.standard_normal(500), rng.standard_normal(500) * 1e-40]).astype(dtype)
    return torch.from_numpy(found)


def with_nan(x):
    lost = torch.tensor([float("nan"), -float("nan"), 0.5], dtype=x.dtype)
    return torch.cat([x, lost])


def bits_of(x):
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(found, wanted):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert torch.equal(bits_of(found), bits_of(wanted))


def choices_of(format):
    """Return each overflow with the default rounding, and each rounding with the default overflow."""
    below = ["clamp"] if isinstance(format, Format) and not format.signed else [None]
    found = [{"overflow": name, "nan": nan} for name in overflows(format) for nan in ("zero", "max")]
    found += [{"rounding": name.value, "nan": "zero"} for name in Rounding]
    return [choice | {"below": name} for choice in found for name in below]


@pytest.mark.parametrize("name", ALL)
def test_torch_operations_encode_as_the_cpu_does(name):
    format = ALL[name]
    for dtype in ("float64", "float32", "float16"):
        x = with_nan(numbers_of(format, dtype))
        for choice in choices_of(format):
            rules = Rules.of(format, **choice)
            assert_same_bits(device.encode_exactly(x, format, rules, 9), nf.encode(x, format, **choice, seed=9))


@pytest.mark.parametrize("name", ALL)
def test_torch_operations_cast_as_the_cpu_does(name):
    format = ALL[name]
    for dtype in ("float64", "float32", "float16"):
        x = with_nan(numbers_of(format, dtype))
        for rounding in ("nearest_even", "stochastic"):
            choice = {"rounding": rounding, "nan": "zero"}
            if isinstance(format, Format) and not format.signed:
                choice["below"] = "magnitude"
            wanted = nf.cast(x, format, **choice, seed=4)
            assert_same_bits(device.cast_exactly(x, format, Rules.of(format, **choice), 4), wanted)


@pytest.mark.parametrize("name", SMALL)
def test_torch_operations_decode_as_the_cpu_does(name):
    format = SMALL[name]
    codes = torch.from_numpy(all_codes(format))
    assert_same_bits(device.decode_exactly(codes, format, "float64"), nf.decode(codes, format))


@pytest.mark.parametrize(("name", "width"), [("fp64", 64), ("fp32", 32), ("tf32", 19)])
def test_torch_operations_decode_wide_formats(name, width):
    format = FLOATS[name]
    codes = np.random.default_rng(0).integers(0, (1 << width) - 1, 3000, dtype=np.uint64, endpoint=True)
    codes = torch.from_numpy(codes.astype(np.uint64 if width == 64 else np.uint32))
    assert_same_bits(device.decode_exactly(codes, format, "float64"), nf.decode(codes, format))
    if width < 64:
        assert_same_bits(device.decode_exactly(codes, format, "float32"), nf.decode(codes, format, dtype="float32"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "bf16", "fp32", "int8", "nf4", "e8m0"])
def test_torch_operations_take_narrow_dtypes(name, dtype):
    width = torch.empty(0, dtype=dtype).element_size()
    codes = torch.arange(1 << 8 * width, dtype=torch.int32)
    x = codes.to(torch.uint8 if width == 1 else torch.int16).view(dtype)
    choice = {"nan": "zero"}
    rules = Rules.of(ELEMENTS[name], **choice)
    assert_same_bits(device.encode_exactly(x, ELEMENTS[name], rules, 0), nf.encode(x, name, **choice))
    assert_same_bits(device.cast_exactly(x, ELEMENTS[name], rules, 0), nf.cast(x, name, **choice))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_torch_operations_take_whole_numbers(dtype):
    x = torch.from_numpy(np.arange(-300, 300).astype(dtype))
    if dtype in ("uint32", "uint64"):
        x = torch.from_numpy(np.arange(600).astype(dtype))
    for format in (INTEGERS["int8"], FLOATS["e4m3fn"]):
        assert_same_bits(device.encode_exactly(x, format, Rules.of(format), 0), nf.encode(x, format))
        assert_same_bits(device.cast_exactly(x, format, Rules.of(format), 0), nf.cast(x, format))


def test_chunks_do_not_show(monkeypatch):
    x = torch.randn(7, 11, 3, generator=torch.Generator().manual_seed(0)).transpose(0, 2)
    format = FLOATS["e5m2"]
    wanted = nf.encode(x, format, rounding="stochastic", seed=3)
    monkeypatch.setattr(device, "_CHUNK", 10)
    assert_same_bits(device.encode_exactly(x, format, Rules.of(format, "stochastic"), 3), wanted)
    x[1, 2, 3] = float("nan")
    with pytest.raises(FormatError) as there:
        nf.encode(x, "e2m1")
    with pytest.raises(FormatError) as here:
        device.encode_exactly(x, FLOATS["e2m1"], Rules.of(FLOATS["e2m1"]), 0)
    assert str(here.value) == str(there.value)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_no_dimension_and_no_elements(shape):
    x = torch.full(shape, 1.5)
    format = FLOATS["e4m3fn"]
    codes = device.encode_exactly(x, format, Rules.of(format), 0)
    assert_same_bits(codes, nf.encode(x, format))
    assert_same_bits(device.cast_exactly(x, format, Rules.of(format), 0), x)
    assert_same_bits(device.decode_exactly(codes, format, "float32"), x)


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([1 << 60]),
        torch.tensor([-(1 << 60), 5]),
        torch.from_numpy(np.array([1, 1 << 63], np.uint64)),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2).to_sparse(),
    ],
    ids=["large", "far below zero", "beyond int64", "complex", "sparse"],
)
def test_what_is_refused_here_is_refused_there_in_the_same_words(x):
    format = FLOATS["e4m3fn"]
    with pytest.raises(FormatError) as there:
        nf.encode(x, format)
    with pytest.raises(FormatError) as here:
        device.encode_exactly(x, format, Rules.of(format), 0)
    assert str(here.value) == str(there.value)


@pytest.mark.parametrize(
    "codes", [torch.tensor([3, 300]), torch.tensor([-1, 2]), torch.tensor([1.0]), torch.tensor([True])]
)
def test_codes_that_are_none_are_refused_in_the_same_words(codes):
    with pytest.raises(FormatError) as there:
        nf.decode(codes, "e4m3fn")
    with pytest.raises(FormatError) as here:
        device.decode_exactly(codes, FLOATS["e4m3fn"], "float64")
    assert str(here.value) == str(there.value)


def test_kernels_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "interpreted_kernels.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert ran.stdout.startswith("compared "), ran.stdout


@pytest.mark.gpu
def test_the_gpu_gives_the_bits_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    script = HERE.parents[2] / "benchmarks" / "formats_gpu.py"
    ran = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
