"""Number formats on one CPU thread, side by side with other libraries: nanoseconds an element, and ratios.

python benchmarks/formats_cpu.py [--environment FOLDER] [--rounds N] [--elements N] [--out FILE]

The peers live in an environment of their own, made from ``peers/formats-requirements.txt`` if the folder does not exist.
Everything runs in one process there, interleaved in random order; a ratio is the median over rounds of the peer's time
over narrowcast's in the same round, with a bootstrap interval. torch's casts run twice under two names: how far apart these
two are is what a difference must exceed. One call of ours costs tens of microseconds whatever the size, so ``--elements``
tells how much of a ratio is that.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, default=Path("formats-peers"))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--elements", type=int, default=1 << 22, help="a multiple of 4096")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "formats-cpu.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        measure(arguments.rounds, arguments.elements, arguments.out)
        return
    if not arguments.environment.exists():
        subprocess.run([sys.executable, "-m", "venv", arguments.environment], check=True)
        requirements = HERE / "peers" / "formats-requirements.txt"
        subprocess.run([arguments.environment / "bin/pip", "install", "-q", "-r", requirements], check=True)
    environment = os.environ | THREADS | {"PYTHONPATH": str(HERE.parent / "src")}
    again = [arguments.environment / "bin/python", __file__, "--inside", "--rounds", str(arguments.rounds)]
    again += ["--elements", str(arguments.elements), "--out", arguments.out]
    subprocess.run(again, check=True, env=environment)


def contests(x: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return, by operation, who does it how; ``narrowcast`` is the one that the others are compared with."""
    import bitsandbytes.functional as bnb
    import ml_dtypes
    import numpy as np
    import torch
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    import narrowcast.formats as nf

    torch.set_num_threads(1)
    tensor = torch.from_numpy(x)
    copy = np.empty_like(x)
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, ml, own in (
        ("e4m3fn", ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
        ("e5m2", ml_dtypes.float8_e5m2, torch.float8_e5m2),
        ("bf16", ml_dtypes.bfloat16, torch.bfloat16),
        ("fp16", np.float16, torch.float16),
    ):
        codes, ml_codes, torch_codes = nf.encode(x, name), x.astype(ml), tensor.to(own)
        tensor_codes = torch.from_numpy(codes)
        found[f"{name} encode"] = {
            "narrowcast": lambda name=name: nf.encode(x, name),
            "narrowcast, torch tensor": lambda name=name: nf.encode(tensor, name),
            "narrowcast, torch's codes": lambda name=name: nf.encode(tensor, name, convention="torch"),
            "ml_dtypes" if ml is not np.float16 else "numpy": lambda ml=ml: x.astype(ml),
            "torch": lambda own=own: tensor.to(own),
            "torch, again": lambda own=own: tensor.to(own),
        }
        found[f"{name} decode"] = {
            "narrowcast": lambda codes=codes, name=name: nf.decode(codes, name, dtype="float32"),
            "narrowcast, torch tensor": lambda c=tensor_codes, name=name: nf.decode(c, name, dtype="float32"),
            "ml_dtypes" if ml is not np.float16 else "numpy": lambda c=ml_codes: c.astype(np.float32),
            "torch": lambda c=torch_codes: c.to(torch.float32),
            "torch, again": lambda c=torch_codes: c.to(torch.float32),
        }
    packed, state = bnb.quantize_4bit(tensor, blocksize=64, quant_type="nf4")
    ours, ours_torch = nf.quantize(x, "nf4"), nf.quantize(tensor, "nf4")
    found["nf4 quantise"] = {
        "narrowcast": lambda: nf.quantize(x, "nf4"),
        "narrowcast, torch tensor": lambda: nf.quantize(tensor, "nf4"),
        "bitsandbytes": lambda: bnb.quantize_4bit(tensor, blocksize=64, quant_type="nf4"),
    }
    found["nf4 dequantise"] = {
        "narrowcast": ours.dequantize,
        "narrowcast, torch tensor": ours_torch.dequantize,
        "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state),
    }
    for name, dtype in (("mxfp8_e4m3", torch.float8_e4m3fn), ("mxfp4", torch.float4_e2m1fn_x2)):
        found[f"{name} quantise"] = {
            "narrowcast": lambda name=name: nf.quantize(x, name),
            "narrowcast, torch tensor": lambda name=name: nf.quantize(tensor, name),
            "torchao": lambda dtype=dtype: to_mx(tensor, dtype, 32),
        }
    found["nvfp4 quantise"] = {
        "narrowcast": lambda: nf.quantize(x, "nvfp4"),
        "narrowcast, torch tensor": lambda: nf.quantize(tensor, "nvfp4"),
        "torchao": lambda: nvfp4_quantize(tensor, 16, tensor.abs().max() / (6 * 448)),
    }
    for who in found.values():
        who["memcpy"] = lambda: np.copyto(copy, x)
    return found


def agreement(x: Any) -> dict[str, int]:
    """Return how many bytes of codes and scales differ from the peers', who give the same formats."""
    import bitsandbytes.functional as bnb
    import numpy as np
    import torch
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    import narrowcast.formats as nf

    def differing(quantized: Any, codes: Any, scales: Any) -> int:
        own = quantized.stored_scales.reshape(-1)
        return int((codes.view(torch.uint8).numpy().reshape(-1) != quantized.packed).sum()) + int(
            (scales.view(torch.uint8).numpy().reshape(-1) != own.view(np.uint8)).sum()
        )

    tensor = torch.from_numpy(x)
    codes, state = bnb.quantize_4bit(tensor, blocksize=64, quant_type="nf4")
    nf4, nvfp4 = nf.quantize(x, "nf4"), nf.quantize(x, "nvfp4")
    low_first = nf.pack(nf.unpack(codes.numpy(), 4, x.size, order="high_first"), 4)
    found = {"nf4, bitsandbytes": differing(nf4, torch.from_numpy(low_first), state.absmax)}
    for name, dtype in (("mxfp8_e4m3", torch.float8_e4m3fn), ("mxfp4", torch.float4_e2m1fn_x2)):
        scales, codes = to_mx(tensor, dtype, 32)
        found[f"{name}, torchao"] = differing(nf.quantize(x, name), codes, scales)
    scales, codes = nvfp4_quantize(tensor, 16, torch.tensor(nvfp4.tensor_scale))
    found["nvfp4, torchao"] = differing(nvfp4, codes, scales)
    return found


def measure(rounds: int, elements: int, out: Path) -> None:
    """Time every contest on so many elements and write the results."""
    import warnings

    import numpy as np

    warnings.filterwarnings("ignore")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((elements // 4096, 4096)).astype(np.float32)
    same = agreement(x)
    print("bytes that differ from the peers':", same)
    results: dict[str, Any] = {}
    for operation, who in contests(x).items():
        for run in who.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in who}
        for _ in range(rounds):
            for name in rng.permutation(list(who)):
                begin = time.perf_counter()
                who[name]()
                times[name].append((time.perf_counter() - begin) / x.size * 1e9)
        results[operation] = {
            name: summary(np.array(t), np.array(times["narrowcast"]), rng) for name, t in times.items()
        }
        print(operation)
        for name, row in results[operation].items():
            low, high = row["ratio_interval_95"]
            print(
                f"  {name:26} {row['ns_per_element']:7.2f} ns  {row['ratio_to_narrowcast']:6.2f}x "
                f"[{low:.2f}, {high:.2f}] narrowcast's time",
                flush=True,
            )
    shown = {
        "environment": about(),
        "elements": x.size,
        "rounds": rounds,
        "threads": 1,
        "results": results,
        "differing_bytes": same,
    }
    shown["protocol"] = "one process, one thread, random order in each round; medians, paired ratios, bootstrap of 1000"
    out.write_text(json.dumps(shown, indent=1) + "\n")


def summary(times: Any, own: Any, rng: Any) -> dict[str, Any]:
    """Return a contender's time, and its ratio to narrowcast's in the same rounds."""
    import numpy as np

    ratios = times / own
    drawn = np.median(rng.choice(ratios, (1000, ratios.size)), axis=1)
    return {
        "ns_per_element": float(np.median(times)),
        "quartiles": [float(q) for q in np.percentile(times, [25, 75])],
        "ratio_to_narrowcast": float(np.median(ratios)),
        "ratio_interval_95": [float(q) for q in np.percentile(drawn, [2.5, 97.5])],
    }


def about() -> dict[str, Any]:
    """Return what the numbers depend on."""
    from importlib.metadata import version

    from narrowcast.formats.engine import engine

    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    packages = ("numpy", "numba", "ml_dtypes", "torch", "bitsandbytes", "torchao")
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "loops": engine().NAME,
        "versions": {name: version(name) for name in packages},
    }


main()
