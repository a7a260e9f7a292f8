"""Write onnx_vectors.json from a wheel of onnx that still ships its backend tests as data (1.19.1 does; 1.23 does not).

    python extract_onnx_vectors.py onnx-1.19.1-*.whl

Kept are the Cast, QuantizeLinear and DequantizeLinear cases (CastLike has the same ones again): each tensor as its element
type, its shape, and its codes in hexadecimal. onnx is under the Apache License 2.0.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FOLDER = "onnx/backend/test/data/node/"
KEPT = re.compile(FOLDER + r"test_((?:cast|quantizelinear|dequantizelinear)(?:_[^/]*)?)/model\.onnx")


def tensor(data: bytes) -> dict[str, Any]:
    proto = TensorProto.FromString(data)
    array = numpy_helper.to_array(proto)
    codes = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * array.itemsize}")
    kind = TensorProto.DataType.Name(proto.data_type)
    bits = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4}.get(kind, 8 * array.itemsize)
    width = -(-bits // 4)
    shown = " ".join(f"{int(code) & ((1 << bits) - 1):0{width}x}" for code in codes)
    return {"type": kind, "shape": list(array.shape), "codes": shown}


def case(wheel: zipfile.ZipFile, name: str) -> dict[str, Any]:
    folder = f"{FOLDER}test_{name}/"
    node = onnx.load_model_from_string(wheel.read(folder + "model.onnx")).graph.node[0]
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    files = sorted(file for file in wheel.namelist() if file.startswith(folder) and file.endswith(".pb"))
    return {
        "attributes": {key: value.decode() if isinstance(value, bytes) else value for key, value in attributes.items()},
        "inputs": [tensor(wheel.read(file)) for file in files if "/input_" in file],
        "output": tensor(wheel.read(next(file for file in files if "/output_" in file))),
    }


def main(path: str) -> None:
    with zipfile.ZipFile(path) as wheel:
        names = [found[1] for found in map(KEPT.fullmatch, wheel.namelist()) if found]
        cases = {name: case(wheel, name) for name in sorted(names)}
    lines = [f"{json.dumps(name)}: {json.dumps(item)}" for name, item in cases.items()]
    source = json.dumps(f"{Path(path).name.split('-cp')[0]}, {FOLDER}")
    text = '{"source": ' + source + ', "cases": {\n' + ",\n".join(lines) + "\n}}\n"
    Path(__file__).with_name("onnx_vectors.json").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
