"""How much slower a GPU multiplies when widths are no multiples of 8: what the advice on widths counts with.

python benchmarks/alignment_gpu.py

Prints a table and writes benchmarks/results/alignment-gpu.json, or under $OUT where that is set.
"""

import json
import os
import platform
from pathlib import Path
from statistics import median, quantiles

import torch
from torch.nn import functional

ROUNDS = 30
CALLS = 10
WIDTHS = (4096, 4095, 4094, 4092, 4088)
CHANNELS = (256, 251, 250, 252, 248)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def linear(rows, inputs, outputs, dtype):
    x = torch.randn(rows, inputs, device="cuda", dtype=dtype)
    weight = torch.randn(outputs, inputs, device="cuda", dtype=dtype)
    return (lambda: functional.linear(x, weight)), rows * inputs * outputs


def convolution(channels, kernel, layout, dtype, batch=64, side=28):
    x = torch.randn(batch, channels, side, side, device="cuda", dtype=dtype).to(memory_format=layout)
    weight = torch.randn(channels, channels, kernel, kernel, device="cuda", dtype=dtype).to(memory_format=layout)
    macs = batch * side**2 * channels**2 * kernel**2
    return (lambda: functional.conv2d(x, weight, padding=kernel // 2)), macs


def cases():
    """Yield name, the width that is aligned or not, what to call, and its MACs; the first of a name is aligned."""
    for name, dtype in DTYPES.items():
        for width in WIDTHS:
            yield f"linear {name}, outputs", width, *linear(4096, 4096, width, dtype)
        for width in WIDTHS:
            yield f"linear {name}, inputs", width, *linear(4096, width, 4096, dtype)
        for width in (50264, 50257):
            yield f"linear {name}, vocabulary", width, *linear(2048, 768, width, dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            order = "NHWC" if layout is torch.channels_last else "NCHW"
            for kernel in (1, 3):
                for width in CHANNELS:
                    where = f"convolution {kernel}x{kernel} {name}, {order}"
                    yield where, width, *convolution(width, kernel, layout, dtype)


def timed(call):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS * 1e3


def main():
    torch.backends.cudnn.benchmark = True
    listed = list(cases())
    for _, _, call, _ in listed:
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    times = [[] for _ in listed]
    for _ in range(ROUNDS):
        for place, (_, _, call, _) in enumerate(listed):
            times[place].append(timed(call))
    results, aligned = {}, {}
    for (name, width, _, macs), took in zip(listed, times, strict=True):
        tenths = quantiles(took, n=10)
        per_mac = median(took) / macs
        aligned.setdefault(name, per_mac)
        slower = per_mac / aligned[name]
        results.setdefault(name, {})[str(width)] = {
            "us": median(took),
            "us_p10": tenths[0],
            "us_p90": tenths[-1],
            "tflops": 2 * macs / median(took) / 1e6,
            "slower_per_mac": slower,
        }
        print(f"{name:34} {width:6} {median(took):9.1f} us {2 * macs / median(took) / 1e6:7.1f} TFLOPS {slower:6.2f}x")
    written = {
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "protocol": f"CUDA events around {CALLS} calls; median of {ROUNDS} rounds, each running every case once; cuDNN "
        "chooses its kernels by measuring; slower_per_mac is against the first, aligned width of the same name",
        "results": results,
    }
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    (folder / "alignment-gpu.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
