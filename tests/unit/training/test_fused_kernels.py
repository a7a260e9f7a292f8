"""The Triton kernels of FusedAdamW: in the interpreter here, on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

HERE = Path(__file__).parent


def test_kernels_in_tritons_interpreter_give_the_reference():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "adamw_kernels.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert ran.stdout.startswith("compared "), ran.stdout


@pytest.mark.gpu
def test_the_gpu_gives_the_reference():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    script = HERE.parents[2] / "benchmarks" / "training_gpu.py"
    ran = subprocess.run([sys.executable, script, "check"], capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
