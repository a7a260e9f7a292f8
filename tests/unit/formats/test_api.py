"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

import narrowcast.formats as nf


def test_what_is_exported_is_there_and_explained() -> None:
    assert list(nf.__all__) == sorted(nf.__all__, key=str)
    assert dir(nf) == sorted(nf.__all__)
    for name in nf.__all__:
        assert getattr(nf, name) is vars(nf)[name]
        assert name == "ElementFormat" or name == "Granularity" or vars(nf)[name].__doc__


def test_a_name_that_is_not_exported_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = nf.quantise  # type: ignore[attr-defined]


def test_no_other_large_library_is_loaded() -> None:
    script = (
        "import sys, narrowcast.formats as nf; nf.quantize([[1.0] * 64], 'nf4').dequantize(); "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'safetensors', 'pydantic'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
