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


def compiled_for_hopper(kernel, arguments, **constants):
    """Return a kernel's PTX for sm_90; pointers are multiples of 16 bytes, as PyTorch's allocator gives them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compiled

    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in arguments.items() if kind[0] == "*"}
    source = ASTSource(
        fn=kernel,
        signature=dict.fromkeys(names, "constexpr") | arguments,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return compiled(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def test_the_update_compiles_to_wide_loads_and_rounds_each_operation(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    import triton.language as tl

    from narrowcast.training import triton_adamw

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    whole = dict.fromkeys(("addresses_ptr", "lengths_ptr", "chunk_starts_ptr"), "*i64")
    whole |= dict.fromkeys(("chunk_rows_ptr", "indices_ptr", "places_ptr"), "*i32")
    whole |= dict.fromkeys(("steps_ptr", "corrections_ptr", "factor_ptr"), "*fp32") | {"finite_ptr": "*i1"}
    whole |= dict.fromkeys(("rows", "launch", "seed"), "i32")
    whole |= dict.fromkeys(("lr", "keep", "gain1", "beta2", "gain2", "eps"), "fp32")
    shape = triton_adamw._shape(True, torch.float32)
    ptx = compiled_for_hopper(
        triton_adamw._update,
        whole,
        parameter_dtype=tl.float32,
        gradient_dtype=tl.float32,
        compensated=False,
        stochastic=False,
        zero=False,
        **{name: shape[name] for name in ("aligned", "chunk", "tile", "vector")},
    )
    assert ptx.count("ld.global.v4") == 8  # four tensors, two vectors a thread
    assert ptx.count("st.global.v4") == 6
    assert "fma.rn.f32" not in ptx
    assert "div.rn.f32" in ptx
    assert "sqrt.rn.f32" in ptx


@pytest.mark.gpu
def test_the_gpu_gives_the_reference():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    script = HERE.parents[2] / "benchmarks" / "training_gpu.py"
    ran = subprocess.run([sys.executable, script, "check"], capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
