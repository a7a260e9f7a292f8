"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys

import narrowcast.formats as nf


def test_what_is_exported_is_there_and_explained() -> None:
    assert list(nf.__all__) == sorted(nf.__all__, key=str)
    for name in nf.__all__:
        assert vars(nf)[name] is not None
        assert name == "ElementFormat" or name == "Granularity" or vars(nf)[name].__doc__
    public = {name for name, value in vars(nf).items() if not name.startswith("_") and not _is_module(value)}
    assert public == set(nf.__all__)


def _is_module(value: object) -> bool:
    return type(value).__name__ == "module"


def test_no_other_large_library_is_loaded() -> None:
    script = (
        "import sys, narrowcast.formats as nf; nf.quantize([[1.0] * 64], 'nf4').dequantize(); "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'safetensors', 'pydantic'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
