"""Options of a wrong type are refused by their name, with what is allowed, before anything is looked up by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import narrowcast.formats as nf
from narrowcast.errors import FormatError

X = np.linspace(-3, 5, 64, dtype=np.float32)
E2M1, E8M0 = nf.get("e2m1"), nf.get("e8m0")
WORDS: list[Any] = [["nearest_even"], {}, np.array([1, 2]), 3, 1.5, b"floor", object()]
WHOLE: list[Any] = [[1], {}, "1", 1.5, True, np.float32(1), np.array([1, 2]), object()]
TRUTHS: list[Any] = [[], {}, "yes", 1, 0.0, float("nan"), np.array([True, False])]
REALS: list[Any] = [[99], {}, "99", b"99", True, np.array([1, 2]), object()]

Call = Callable[..., Any]


def quantize(**options: Any) -> Any:
    return nf.quantize(X, "int8", **options)


def block_format(**options: Any) -> Any:
    return nf.BlockFormat(**({"name": "own", "element": E2M1, "block": 16, "scale": E8M0} | options))


CALLS: dict[str, tuple[Call, str, list[Any]]] = {
    **{f"encode {name}": (lambda **o: nf.encode(X, "e4m3fn", **o), name, WORDS) for name in ("rounding", "convention")},
    **{f"cast {name}": (lambda **o: nf.cast(X, "e4m3fn", **o), name, WORDS) for name in ("overflow", "nan", "below")},
    "encode seed": (lambda **o: nf.encode(X, "e4m3fn", rounding="stochastic", **o), "seed", WHOLE),
    "decode dtype": (lambda **o: nf.decode([1], "e4m3fn", **o), "dtype", WORDS),
    **{f"quantize {name}": (quantize, name, WORDS) for name in ("range", "scale_rule", "rounding")},
    **{f"quantize {name}": (quantize, name, TRUTHS) for name in ("symmetric", "double_quant", "pad")},
    **{f"quantize {name}": (quantize, name, WHOLE) for name in ("block", "axis", "seed")},
    "quantize granularity": (quantize, "granularity", [[], {}, "PerTensor", 3, nf.PerBlock]),
    "quantize percentile": (lambda **o: quantize(range="percentile", **o), "percentile", REALS),
    "quantize tensor_max": (lambda **o: nf.quantize(X, "nvfp4", **o), "tensor_max", REALS),
    "PerChannel axis": (nf.PerChannel, "axis", WHOLE),
    "PerBlock axis": (lambda **o: nf.PerBlock(8, **o), "axis", WHOLE),
    "dequantize dtype": (nf.quantize(X, "nf4").dequantize, "dtype", [*WORDS, "", 0]),
    **{f"Format {name}": (lambda **o: nf.Format(4, 3, **o), name, TRUTHS) for name in ("signed", "has_zero")},
    "Format bias": (lambda **o: nf.Format(4, 3, **o), "bias", WHOLE),
    "Format name": (lambda **o: nf.Format(4, 3, **o), "name", WORDS),
    "Integer signed": (lambda **o: nf.Integer(8, **o), "signed", TRUTHS),
    "Codebook name": (lambda **o: nf.Codebook(values=(0.0, 1.0), **o), "name", WORDS),
    "BlockFormat element": (block_format, "element", ["e2m1", [], {}, 3]),
    "BlockFormat scale": (block_format, "scale", ["e8m0", [], {}, 3, nf.get("int8")]),
    "BlockFormat block": (block_format, "block", WHOLE),
    "BlockFormat tensor_scale": (block_format, "tensor_scale", TRUTHS),
    "pack order": (lambda **o: nf.pack(np.zeros(4, np.uint8), 4, **o), "order", WORDS),
    "pack bits": (lambda **o: nf.pack(np.zeros(4, np.uint8), **o), "bits", WHOLE),
    "unpack count": (lambda **o: nf.unpack(np.zeros(4, np.uint8), 4, **o), "count", WHOLE),
    "sample distribution": (lambda **o: nf.sample(count=4, **o), "distribution", WORDS),
    "sample count": (lambda **o: nf.sample("laplace", **o), "count", [*WHOLE, -1]),
    "sample seed": (lambda **o: nf.sample("laplace", 4, **o), "seed", [*WHOLE, -1]),
    "block_costs blocks": (lambda **o: nf.block_costs(X, **o), "blocks", [3, 1.5, None]),
    "four_bit_errors block": (lambda **o: nf.four_bit_errors(X, **o), "block", [*WHOLE, 0, -1]),
}


@pytest.mark.parametrize(("call", "name", "values"), CALLS.values(), ids=CALLS)
def test_an_option_of_a_wrong_type_is_refused_by_name(call: Call, name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(FormatError, match=name.replace("_", "[_ ]")) as caught:
            call(**{name: value})
        assert caught.value.allowed, value


@pytest.mark.parametrize("path", [[], 3, None, 1.5])
def test_a_path_that_is_none_is_refused(path: Any) -> None:
    for call in (nf.load, nf.QuantizedTensor.load, nf.quantize(X, "nf4").save):
        with pytest.raises(FormatError, match="path = "):
            call(path)


def test_what_is_saved_has_names(tmp_path: Path) -> None:
    for tensors in ([nf.quantize(X, "nf4")], nf.quantize(X, "nf4"), 3):
        with pytest.raises(FormatError, match="tensors = "):
            nf.save(tensors, tmp_path / "x.safetensors")  # type: ignore[arg-type]


def test_whole_numbers_of_numpy_do_and_can_be_saved(tmp_path: Path) -> None:
    plain = nf.quantize(X, "int8", block=16, axis=0)
    quantized = nf.quantize(X, "int8", block=np.int64(16), axis=np.int8(0))  # type: ignore[arg-type]
    assert quantized.scheme == plain.scheme
    quantized.save(tmp_path / "x.safetensors")
    assert nf.QuantizedTensor.load(tmp_path / "x.safetensors").scheme == plain.scheme
    seed = np.uint64(2**64 - 1)
    drawn = nf.encode(X, "e4m3fn", rounding="stochastic", seed=seed)  # type: ignore[arg-type]
    assert (drawn == nf.encode(X, "e4m3fn", rounding="stochastic", seed=2**64 - 1)).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8, 16])
def test_tensors_of_torch_are_packed_to_tensors_of_torch(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, 37)
    tensor = torch.from_numpy(codes).reshape(37, 1).T
    packed = nf.pack(tensor, bits)
    assert isinstance(packed, torch.Tensor)
    assert packed.numpy().tolist() == nf.pack(codes, bits).tolist()
    back = nf.unpack(packed, bits, 37)
    assert isinstance(back, torch.Tensor)
    assert back.numpy().tolist() == codes.tolist()
    assert nf.pack(torch.zeros(0, dtype=torch.uint8), bits).shape == (0,)


@pytest.mark.parametrize("codes", [[], ["a"], [0.5], np.array([True])], ids=str)
def test_what_is_no_code_is_not_packed(codes: Any) -> None:
    with pytest.raises(FormatError, match="codes of dtype"):
        nf.pack(codes, 4)
