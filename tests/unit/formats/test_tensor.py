"""Quantised tensors: the kinds of array they come from, their files, their sizes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import narrowcast.formats as nf
from narrowcast.errors import FormatError

CASES = [
    ("nf4", {"double_quant": True}),
    ("nf3", {}),
    ("mxfp6_e2m3", {}),
    ("nvfp4", {}),
    ("int4", {"block": 32, "symmetric": False}),
    ("int16", {"granularity": nf.PerChannel(1)}),
    ("e4m3fn", {"granularity": nf.PerChannel(0)}),
    ("mxfp4", {"axis": 0, "pad": True}),
]


def sample() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_file_gives_the_same_tensor_back(name: str, options: dict[str, object], kind: str, tmp_path: Path) -> None:
    x = sample() if kind == "numpy" else torch.from_numpy(sample()).to(torch.bfloat16)
    quantized = nf.quantize(x, name, **options)  # type: ignore[arg-type]
    path = tmp_path / "tensor.safetensors"
    quantized.save(path)
    found = nf.QuantizedTensor.load(path, torch=kind == "torch")
    assert type(found.packed) is type(quantized.packed)
    assert found.scheme == quantized.scheme
    assert (found.shape, found.dtype) == (quantized.shape, quantized.dtype)
    assert found.nbytes == quantized.nbytes
    assert (found.dequantize() == quantized.dequantize()).all()
    assert found.dequantize().dtype == x.dtype
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_user_s_own_formats_survive_a_file(tmp_path: Path) -> None:
    own = {
        "codebook": nf.Codebook("mine", (-1.0, -0.25, 0.0, 0.5)),
        "float": nf.Format(3, 3, 2, name="mine", nan=nf.Nan.NONE),
        "integer": nf.Integer(5, signed=False),
    }
    tensors = {name: nf.quantize(sample(), format, block=32) for name, format in own.items()}
    nf.save(tensors, tmp_path / "own.safetensors")
    found = nf.load(tmp_path / "own.safetensors")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].scheme.element == own[name]
        assert (found[name].dequantize() == tensor.dequantize()).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["nf4", "int8", "mxfp4", "nvfp4"])
def test_torch_gets_what_numpy_gets(name: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(sample()).to(dtype)
    found = nf.quantize(x, name)
    numbers = x.double().numpy() if dtype == torch.float64 else x.float().numpy()
    wanted = nf.quantize(numbers, name)
    assert isinstance(found.packed, torch.Tensor)
    assert (found.packed.numpy() == wanted.packed).all()
    assert (found.scales.numpy() == wanted.scales).all()
    assert found.dequantize().dtype == dtype
    assert (found.dequantize() == torch.from_numpy(wanted.dequantize()).to(dtype)).all()
    assert found.dequantize("float64").dtype == torch.float64


def test_half_precision_of_numpy_and_ml_dtypes() -> None:
    half = sample().astype(np.float16)
    assert nf.quantize(half, "nf4").dequantize().dtype == np.float16
    brain = sample().astype(ml_dtypes.bfloat16)
    found = nf.quantize(brain, "nf4")
    assert (found.packed == nf.quantize(brain.astype(np.float32), "nf4").packed).all()
    assert found.dequantize().dtype == np.float32  # NumPy alone has no bfloat16


def test_layouts_in_memory_do_not_matter() -> None:
    x = sample()
    for other in (np.asfortranarray(x), x[::-1][::-1], np.repeat(x, 2, axis=1)[:, ::2], x.astype(">f4")):
        assert (nf.quantize(other, "nf4").packed == nf.quantize(x, "nf4").packed).all()
    turned = torch.from_numpy(np.ascontiguousarray(x.T)).T
    assert (nf.quantize(turned, "nf4").packed.numpy() == nf.quantize(x, "nf4").packed).all()


@pytest.mark.parametrize("name", ["nf4", "int8", "mxfp4", "nvfp4", "e4m3fn"])
@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), ()])
def test_empty_and_zero_dimensional_tensors(name: str, shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float32)
    found = nf.quantize(x, name, pad=True)
    assert found.dequantize().shape == shape
    assert (found.dequantize() == x).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("range", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_channels_without_elements(shape: tuple[int, ...], axis: int, range: str, symmetric: bool) -> None:
    found = nf.quantize(
        np.ones(shape, np.float32), "int8", granularity=nf.PerChannel(axis), range=range, symmetric=symmetric
    )
    assert found.scales.tolist() == [0.0] * shape[axis]
    assert found.dequantize().shape == shape


def test_many_pieces_and_odd_lengths() -> None:
    x = np.random.default_rng(0).standard_normal((3, 300_001)).astype(np.float32)
    for name in ("int8", "int4", "int3"):
        found = nf.quantize(x, name, granularity=nf.PerChannel(0))
        rows = [nf.quantize(row, name).dequantize() for row in x]
        assert (found.dequantize() == np.stack(rows)).all()


def test_sizes_are_of_what_is_stored() -> None:
    x = sample()
    found = nf.quantize(x, "int4", block=32, symmetric=False)
    assert found.packed.size == 50 * 64 // 2
    assert found.nbytes == 50 * 32 + 100 * 4 + 100 // 2  # codes, scales, zero points of four bits
    assert found.bits_per_element == 8 * found.nbytes / 3200


def test_a_dtype_that_cannot_come_back_is_refused() -> None:
    with pytest.raises(FormatError, match="'int8'"):
        nf.quantize(sample(), "nf4").dequantize("int8")
    with pytest.raises(FormatError, match="'bfloat16'"):
        nf.quantize(sample(), "nf4").dequantize("bfloat16")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        nf.load(tmp_path / "missing.safetensors")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match="holds no quantised tensors"):
        nf.load(tmp_path / "plain.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(FormatError, match="cannot be read"):
        nf.load(tmp_path / "broken.safetensors")
    nf.save({"a": nf.quantize(sample(), "nf4"), "b": nf.quantize(sample(), "int8")}, tmp_path / "two.safetensors")
    with pytest.raises(FormatError, match="a, b"):
        nf.QuantizedTensor.load(tmp_path / "two.safetensors")
    with pytest.raises(FormatError, match="without '/'"):
        nf.save({"a/b": nf.quantize(sample(), "nf4")}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="cannot be written"):
        nf.quantize(sample(), "nf4").save(tmp_path / "no" / "folder.safetensors")


@pytest.mark.parametrize("lost", ["tensor/packed", "tensor/scales"])
def test_a_file_whose_arrays_do_not_fit_is_damaged(lost: str, tmp_path: Path) -> None:
    path = tmp_path / "tensor.safetensors"
    nf.quantize(sample(), "nf4").save(path)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    save_file(arrays | {lost: arrays[lost].reshape(-1)[:-1]}, path, metadata)
    with pytest.raises(FormatError):
        nf.load(path)
    del arrays[lost]
    save_file(arrays, path, metadata)
    with pytest.raises(FormatError, match="damaged"):
        nf.load(path)
