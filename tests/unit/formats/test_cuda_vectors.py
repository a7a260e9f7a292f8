"""``convention="cuda"`` against the headers of CUDA.

``cuda_vectors.json`` holds what the constructors of the C++ types made of numbers on and beside the boundaries between codes;
``extract_cuda_vectors.py`` wrote it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from format_engines import decode, encode

VECTORS = json.loads(Path(__file__).with_name("cuda_vectors.json").read_text())
CASES: dict[str, dict[str, str]] = VECTORS["cases"]


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_the_headers(case: str) -> None:
    name, dtype = case.split()
    x = np.array([int(bits, 16) for bits in CASES[case]["x"].split()], dtype.replace("float", "uint")).view(dtype)
    codes = bytes.fromhex(CASES[case]["codes"])
    wanted = np.frombuffer(codes, f"<u{len(codes) // len(x)}")
    found = encode(x, name, convention="cuda")
    number = ~np.isnan(decode(wanted, name))
    assert found[number].tolist() == wanted[number].tolist()
    assert np.isnan(decode(found[~number], name)).all()  # payloads of NaN differ between FP32 and FP64 in CUDA, too
    assert np.isnan(x[~number]).all()


def test_the_vectors_are_all_there() -> None:
    assert VECTORS["source"] == "headers of CUDA 13.2, compiled for a processor"
    formats = ("e4m3fn", "e5m2", "e8m0", "e2m3", "e3m2", "e2m1", "fp16", "bf16")
    assert set(CASES) == {f"{name} {dtype}" for name in formats for dtype in ("float32", "float64")}
    assert min(len(case["x"].split()) for case in CASES.values()) > 200
