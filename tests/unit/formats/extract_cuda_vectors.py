"""Write cuda_vectors.json: what the C++ types of CUDA's headers make of numbers, computed by the headers on a processor.

    python extract_cuda_vectors.py INCLUDE_FOLDER

The folder is that of a CUDA toolkit, or the one that the package nvidia-cuda-runtime installs. The headers hold the
conversions for processors beside those for GPUs; a C++ compiler is needed, a GPU is not. Kept are the numbers that went in and
the codes that came out, both in hexadecimal.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from format_values import FLOATS, boundary_values

#: The type of each format, and what holds its code.
TYPES = {
    "e4m3fn": ("__nv_fp8_e4m3", "__x", "unsigned char"),
    "e5m2": ("__nv_fp8_e5m2", "__x", "unsigned char"),
    "e8m0": ("__nv_fp8_e8m0", "__x", "unsigned char"),
    "e2m3": ("__nv_fp6_e2m3", "__x", "unsigned char"),
    "e3m2": ("__nv_fp6_e3m2", "__x", "unsigned char"),
    "e2m1": ("__nv_fp4_e2m1", "__x", "unsigned char"),
    "fp16": ("__half", "", "unsigned short"),
    "bf16": ("__nv_bfloat16", "", "unsigned short"),
}
KINDS = {"float32": "float", "float64": "double"}
#: Numbers kept of a format that has more boundaries, drawn at random.
KEPT = 700


def program() -> str:
    """Return C++ with a function per format and dtype that encodes an array."""
    lines = [f"#include <cuda_{name}.h>" for name in ("fp16", "bf16", "fp8", "fp6", "fp4")] + ["#include <cstring>"]
    for name, (kind, field, code) in TYPES.items():
        for dtype, number in KINDS.items():
            store = f"out[i] = made.{field};" if field else "std::memcpy(&out[i], &made, 2);"
            lines.append(
                f'extern "C" void {name}_{dtype}(const {number}* x, {code}* out, long n) '
                f"{{ for (long i = 0; i < n; ++i) {{ {kind} made(x[i]); {store} }} }}"
            )
    return "\n".join(lines)


def compiled(include: Path, folder: Path) -> ctypes.CDLL:
    """Return the program as a library."""
    source, library = folder / "cuda_codes.cpp", folder / "cuda_codes.so"
    source.write_text(program())
    command = ["c++", "-O2", "-w", "-std=c++17", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def codes(library: ctypes.CDLL, name: str, x: np.ndarray) -> np.ndarray:
    """Return the headers' codes of float32 or float64 numbers, shape [n]."""
    out = np.empty(x.shape, {"unsigned char": np.uint8, "unsigned short": np.uint16}[TYPES[name][2]])
    library[f"{name}_{x.dtype}"](
        ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_long(x.size)
    )
    return out


def inputs(name: str, dtype: str) -> np.ndarray:
    """Return numbers on and beside every boundary between two codes, the special ones, and two NaN."""
    found = np.unique(boundary_values(FLOATS[name], dtype).view(dtype.replace("float", "uint"))).view(dtype)
    if found.size > KEPT:
        found = np.random.default_rng(0).choice(found, KEPT, replace=False)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, np.finfo(dtype).max, -np.finfo(dtype).tiny]
    return np.ascontiguousarray(np.concatenate([found, np.array(special, dtype)]))


def main(include: str) -> None:
    version = re.search(r"CUDART_VERSION\s+(\d+)", (Path(include) / "cuda_runtime_api.h").read_text())
    assert version is not None
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(include), Path(folder))
        vectors = {
            f"{name} {dtype}": {
                "x": x.view(dtype.replace("float", "uint")).tolist(),
                "codes": codes(library, name, x).tobytes().hex(),
            }
            for name in TYPES
            for dtype in KINDS
            for x in [inputs(name, dtype)]
        }
    lines = [
        f'"{key}": {{"x": "{" ".join(f"{bits:x}" for bits in item["x"])}", "codes": "{item["codes"]}"}}'
        for key, item in vectors.items()
    ]
    number = int(version[1])
    source = json.dumps(f"headers of CUDA {number // 1000}.{number % 1000 // 10}, compiled for a processor")
    text = '{"source": ' + source + ', "cases": {\n' + ",\n".join(lines) + "\n}}\n"
    Path(__file__).with_name("cuda_vectors.json").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
