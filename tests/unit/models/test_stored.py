"""Weights as they are stored: safetensors read by rows, ONNX initialisers, PyTorch modules."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

import narrowcast.formats as nf
from narrowcast.errors import ModelError
from narrowcast.models import checkpoint, stored
from narrowcast.models.stored import Weight, Weights, open_weights


def by_name(found: Weights) -> dict[str, Weight]:
    return {weight.name: weight for weight in found.weights}


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# safetensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "fp64"),
        (torch.float32, "fp32"),
        (torch.float16, "fp16"),
        (torch.bfloat16, "bf16"),
        (torch.float8_e4m3fn, "e4m3fn"),
        (torch.float8_e5m2, "e5m2"),
    ],
)
def test_every_float_of_safetensors_is_read_exactly(tmp_path: Path, dtype: torch.dtype, name: str):
    numbers = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"before": torch.arange(3), "w": numbers}, tmp_path / "m.safetensors")
    found = by_name(open_weights(str(tmp_path / "m.safetensors")))
    weight = found["w"]
    assert (weight.dtype, weight.shape, weight.matrix, weight.unreadable) == (name, (7, 5, 3), (7, 15), "")
    assert weight.nbytes == numbers.nbytes
    expected = numbers.to(torch.float64).reshape(7, 15).numpy()
    np.testing.assert_array_equal(np.concatenate([weight.rows(0, 2), weight.rows(2, 7)]), expected)
    assert weight.rows(0, 1).dtype == (np.float64 if name == "fp64" else np.float32)
    assert found["before"].unreadable == "int64, no floating-point numbers"


def test_vectors_and_single_numbers_are_told_apart(tmp_path: Path):
    save_file(
        {"bias": torch.ones(6), "token": torch.ones(1, 1, 6), "one": torch.tensor(1.0), "w": torch.ones(2, 3)},
        tmp_path / "m.safetensors",
    )
    found = by_name(open_weights(str(tmp_path / "m.safetensors")))
    assert {name for name, weight in found.items() if weight.is_vector} == {"bias", "token", "one"}
    assert found["bias"].matrix == (1, 6)
    assert found["bias"].rows(0, 1).shape == (1, 6)


GOOD = {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


@pytest.mark.parametrize(
    ("header", "size", "says"),
    [
        (GOOD, 12, "ends at byte"),
        ({"w": GOOD["w"] | {"shape": [2, 3]}}, 16, "takes 24"),
        ({"w": GOOD["w"] | {"data_offsets": [-16, 0]}}, 16, "ends at byte"),
        ({"w": GOOD["w"] | {"shape": [-2, -2]}}, 16, "shape"),
        ({"w": {"dtype": "F32"}}, 16, "is described by"),
        ({"w": 3}, 16, "is described by"),
        ({"w": GOOD["w"] | {"dtype": "F31"}}, 16, "F31"),
        ([], 16, "list"),
        (b"{", 16, "no JSON object"),
        (b'{"w": 1, "w": 2}', 16, "occurs twice"),
        (b"\xff\xfe", 16, "no JSON object"),
        (b"[" * 100_000, 16, "no JSON object"),
    ],
)
def test_a_damaged_file_is_a_typed_error(tmp_path: Path, header: Any, size: int, says: str):
    path = write(tmp_path / "bad.safetensors", header, bytes(size))
    with pytest.raises(ModelError, match=r"bad\.safetensors") as caught:
        open_weights(str(path))
    assert says in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 60), struct.pack("<Q", 100) + b"{}"])
def test_a_file_cut_in_its_header_is_a_typed_error(tmp_path: Path, content: bytes):
    (tmp_path / "cut.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="no complete safetensors file"):
        open_weights(str(tmp_path / "cut.safetensors"))


def test_a_file_that_shrinks_while_it_is_read_is_a_typed_error(tmp_path: Path):
    path = write(tmp_path / "m.safetensors", GOOD, bytes(16))
    weight = open_weights(str(path)).weights[0]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelError, match="ends within tensor 'w'"):
        weight.rows(0, 2)


def test_a_missing_file_is_a_typed_error():
    with pytest.raises(ModelError, match=r"nowhere.safetensors does not exist"):
        open_weights("nowhere.safetensors")


def test_a_folder_of_parts_is_one_model(tmp_path: Path):
    for number in range(3):
        save_file({f"w{number}": torch.full((2, 2), float(number))}, tmp_path / f"part-{number}.safetensors")
    assert list(by_name(open_weights(str(tmp_path)))) == ["w0", "w1", "w2"]
    index = {"weight_map": {"w0": "part-0.safetensors", "w2": "part-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(by_name(open_weights(str(tmp_path)))) == ["w0", "w2"]
    (tmp_path / "part-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"part-2.safetensors, which is not there"):
        open_weights(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="no index"):
        open_weights(str(tmp_path))


def test_two_models_in_a_folder_are_refused(tmp_path: Path):
    for name in ("a", "b"):
        save_file({"w": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match="both hold a tensor 'w'"):
        open_weights(str(tmp_path))


def test_scales_and_packed_codes_are_not_judged(tmp_path: Path):
    header = {
        "scales": {"dtype": "F8_E8M0", "shape": [4, 2], "data_offsets": [0, 8]},
        "codes": {"dtype": "F4", "shape": [4, 4], "data_offsets": [8, 16]},
    }
    found = by_name(open_weights(str(write(tmp_path / "mx.safetensors", header, bytes(16)))))
    assert found["scales"].unreadable == "scales of other tensors"
    assert "packed" in found["codes"].unreadable


def test_every_dtype_of_the_table_has_its_size():
    assert {name: bits for name, (bits, _) in checkpoint._DTYPES.items() if bits % 8} == {
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
    }
    for bits, name in checkpoint._DTYPES.values():
        if name in nf.names():
            assert nf.get(name).bits == bits


# PyTorch and ONNX -----------------------------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.up = torch.nn.ConvTranspose2d(3, 5, 2)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.narrow = torch.nn.Linear(4, 6).to(torch.bfloat16)
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("cache", torch.ones(2, 2), persistent=False)


def test_a_module_gives_parameters_and_buffers_tied_ones_once():
    module = Tied()
    found = {weight.name: weight for weight in stored._of_module(module)}
    assert list(found) == ["steps", "embed.weight", "up.weight", "up.bias", "narrow.weight", "narrow.bias"]
    assert found["narrow.weight"].dtype == "bf16"
    np.testing.assert_array_equal(found["narrow.weight"].rows(1, 3), module.narrow.weight[1:3].detach().float().numpy())
    # Output channels are a transposed convolution's second axis.
    assert (found["up.weight"].shape, found["up.weight"].matrix) == ((3, 5, 2, 2), (5, 12))
    expected = module.up.weight.detach().transpose(0, 1).reshape(5, 12).numpy()
    np.testing.assert_array_equal(found["up.weight"].rows(1, 4), expected[1:4])
    assert found["steps"].unreadable


def onnx_model(path: Path, *, external: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "matmul": rng.standard_normal((4, 6)).astype(np.float32),
        "gemm": rng.standard_normal((6, 3)).astype(np.float16).astype(np.float32),
        "gemm_b": rng.standard_normal((5, 3)).astype(np.float32),
    }
    constant = numpy_helper.from_array(rng.standard_normal((5, 2)).astype(ml_dtypes.bfloat16), "inner")
    nodes = [
        helper.make_node("MatMul", ["x", "matmul"], ["a"]),
        helper.make_node("Gemm", ["a", "gemm"], ["b"]),
        helper.make_node("Gemm", ["b", "gemm_b"], ["y"], transB=1),
        helper.make_node("Constant", [], ["unused"], value=constant),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        + [numpy_helper.from_array(np.arange(3), "ids")],
    )
    model = helper.make_model(graph)
    onnx.save(model, path, save_as_external_data=external, location="data.bin" if external else None, size_threshold=0)
    return arrays


@pytest.mark.parametrize("external", [False, True])
def test_onnx_weights_are_turned_to_output_channels(tmp_path: Path, external: bool):
    arrays = onnx_model(tmp_path / "m.onnx", external=external)
    found = by_name(open_weights(str(tmp_path / "m.onnx")))
    assert set(found) == {*arrays, "ids", "unused"}
    for name, expected in (("matmul", arrays["matmul"].T), ("gemm", arrays["gemm"].T), ("gemm_b", arrays["gemm_b"])):
        assert found[name].matrix == expected.shape
        np.testing.assert_array_equal(found[name].rows(1, 3), expected[1:3])
    assert found["unused"].dtype == "bf16"
    assert found["ids"].unreadable


def test_onnx_data_outside_the_folder_are_not_read(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    onnx_model(tmp_path / "inner" / "m.onnx", external=True)
    model = onnx.load(tmp_path / "inner" / "m.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../data.bin"
    (tmp_path / "inner" / "data.bin").rename(tmp_path / "data.bin")
    (tmp_path / "inner" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        open_weights(str(tmp_path / "inner" / "m.onnx"))


@pytest.mark.parametrize("content", [b"", b"no onnx at all"])
def test_what_is_no_onnx_is_a_typed_error(tmp_path: Path, content: bytes):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"m.onnx"):
        open_weights(str(tmp_path / "m.onnx"))
