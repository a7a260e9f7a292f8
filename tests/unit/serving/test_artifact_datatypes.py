"""Artifacts whose tensors are texts or 16-bit numbers, in the server's process and in a worker's, over every protocol."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from onnx import TensorProto, helper

from narrowcast.artifacts.manifest import Manifest
from narrowcast.artifacts.store import save_artifact
from narrowcast.errors import DataError, RuntimeFailedError
from narrowcast.runtimes import get_runtime
from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.workers.sources import Placement

ELEMENTS = {"FP16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16, "BYTES": TensorProto.STRING}
#: As NVIDIA's clients give and take them: BF16 as FP32.
VALUES = {
    "FP16": np.array([[1.5, -65504.0], [2.0**-24, 0.0]], np.float16),
    "BF16": np.array([[1.5, -3.0e38], [1e-38, 0.0]], ml_dtypes.bfloat16).astype(np.float32),
    "BYTES": np.array([[b"", "Grüße".encode()], [b"a\0b", b"x" * 300]], object),
}


def write_graph(path: Path, element: int, operator: str = "Identity") -> Path:
    """Write a graph that applies one operator to a tensor [n, 2]."""
    values = [helper.make_tensor_value_info(name, element, ("n", 2)) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "g", values[:1], values[1:])
    path.parent.mkdir(exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path)
    return path


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.PROCESS])
def test_what_goes_in_comes_out(
    placement: Placement, serve: Any, manifest_of: Callable[..., Manifest], tmp_path: Path
) -> None:
    places: list[Path] = []
    for name, element in ELEMENTS.items():
        places.append(write_graph(tmp_path / name / "model.onnx", element).parent)
        save_artifact(places[-1], manifest_of())
    running = serve(None, tuple(places), Hosting(placement, settings=Settings(Batching(8))), grpc_port=0)
    for name, values in VALUES.items():
        # Numbers are written as FP32 is, with as many digits as tell one from the next.
        flat = (
            [text.decode() for text in values.flat]
            if name == "BYTES"
            else [float(str(v)) for v in np.float32(values).flat]
        )
        item = {"name": "x", "shape": [2, 2], "datatype": name, "data": flat}
        answer = running.infer(name, json.dumps({"inputs": [item]}).encode())
        assert answer.json["outputs"] == [{"name": "y", "datatype": name, "shape": [2, 2], "data": flat}]
        for module, address in ((triton_http, running.address), (triton_grpc, running.grpc_address)):
            tensor = module.InferInput("x", [2, 2], name)
            tensor.set_data_from_numpy(values)
            with module.InferenceServerClient(address) as client:
                assert client.infer(name, [tensor]).as_numpy("y").tolist() == values.tolist()
    metadata = running.ask("GET", "/v2/models/BYTES").json
    assert metadata["inputs"] == [{"name": "x", "datatype": "BYTES", "shape": [-1, 2]}]
    raw = b"".join(len(text).to_bytes(4, "little") + text for text in (b"\xff", b""))
    item = {"name": "x", "shape": [1, 2], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [item]}).encode()
    refused = running.infer("BYTES", head + raw, Inference_Header_Content_Length=str(len(head)))
    assert (refused.status, "UTF-8" in refused.error) == (400, True)


def test_a_bfloat16_graph_keeps_every_bit(tmp_path: Path) -> None:
    session = get_runtime("onnxruntime").load(write_graph(tmp_path / "model.onnx", TensorProto.BFLOAT16))
    codes = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 2)
    given = codes.view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(session.run({"x": given})["y"].view(np.uint16), codes)
    assert session.run({"x": given[:0]})["y"].shape == (0, 2)
    with pytest.raises(DataError, match="'x' is float32"):
        session.run({"x": np.zeros((1, 2), np.float32)})


def test_texts_may_be_bytes_or_text(tmp_path: Path) -> None:
    session = get_runtime("onnxruntime").load(write_graph(tmp_path / "model.onnx", TensorProto.STRING))
    assert session.run({"x": np.array([[b"a", "ü"]], object)})["y"].tolist() == [["a", "ü"]]
    with pytest.raises(DataError, match="no UTF-8"):
        session.run({"x": np.array([[b"a", b"\xff"]], object)})


def test_an_element_type_that_no_array_holds_is_refused_with_its_name(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "model.onnx", TensorProto.FLOAT8E4M3FN)
    with pytest.raises(RuntimeFailedError, match=r"'x' is tensor\(float8e4m3fn\)"):
        get_runtime("onnxruntime").load(path)
