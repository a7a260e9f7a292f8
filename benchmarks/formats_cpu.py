"""Number formats on one CPU thread, side by side with other libraries: nanoseconds an element, and ratios.

python benchmarks/formats_cpu.py [--environment FOLDER] [--rounds N] [--elements N] [--only REGEX] [--out FILE]

The peers live in an environment of their own, made from ``peers/formats-requirements.txt`` if the folder does not exist.
Everything runs in one process there, interleaved in random order; a ratio is the median over rounds of the peer's time
over narrowcast's in the same round, with a bootstrap interval. torch's casts run twice under two names: how far apart these
two are is what a difference must exceed. torch rounds FP64 twice, through FP32, and narrowcast once: there they do not do the
same work. Operations named "call" encode 8 numbers; their times are nanoseconds a call. ``--only`` measures the operations
that the expression is found in, and puts them beside the others in the file.
"""

import argparse
import json
import os
import platform
import re
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
    parser.add_argument("--only", default="", metavar="REGEX", help="operations to measure, such as 'bf16|call'")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "formats-cpu.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        measure(arguments.rounds, arguments.elements, arguments.only, arguments.out)
        return
    if not arguments.environment.exists():
        subprocess.run([sys.executable, "-m", "venv", arguments.environment], check=True)
        requirements = HERE / "peers" / "formats-requirements.txt"
        subprocess.run([arguments.environment / "bin/pip", "install", "-q", "-r", requirements], check=True)
    environment = os.environ | THREADS | {"PYTHONPATH": str(HERE.parent / "src")}
    again = [arguments.environment / "bin/python", __file__, "--inside", "--rounds", str(arguments.rounds)]
    again += ["--elements", str(arguments.elements), "--only", arguments.only, "--out", arguments.out]
    subprocess.run(again, check=True, env=environment)


Contest = dict[str, Callable[[], Any]]  # who does it how; "narrowcast" is the one that the others are compared with


def contests(x: Any) -> dict[str, Contest]:
    """Return all contests on ``x``, by operation."""
    import torch

    torch.set_num_threads(1)
    found = {"e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2", "bf16": "bfloat16", "fp16": "float16"}
    every: dict[str, Contest] = {}
    for name, dtype in found.items():
        every |= codecs(x, name, dtype)
    every |= narrow_codecs(x) | wide_inputs(x) | narrow_inputs(x) | blocks(x) | calls(x[0, :8].copy())
    return every


def ml_dtype(name: str) -> Any:
    """Return the dtype of that name, of ml_dtypes or of NumPy."""
    import ml_dtypes
    import numpy as np

    return np.dtype(name if name in ("float16", "float32") else getattr(ml_dtypes, name)).type


def copying(x: Any) -> Callable[[], Any]:
    """Return what copies an array to memory that is there already."""
    import numpy as np

    copy = np.empty_like(x)
    return lambda: np.copyto(copy, x)


def codecs(x: Any, name: str, dtype: str) -> dict[str, Contest]:
    """Return encoding, decoding (to both dtypes) and casting of FP32 beside ml_dtypes (or NumPy) and torch."""
    import numpy as np
    import torch

    import narrowcast.formats as nf

    tensor, own, ml = torch.from_numpy(x), getattr(torch, dtype), ml_dtype(dtype)
    peer = "numpy" if ml is np.float16 else "ml_dtypes"
    codes, ml_codes, torch_codes = nf.encode(x, name), x.astype(ml), tensor.to(own)
    tensor_codes, memcpy = torch.from_numpy(codes), copying(x)
    found: dict[str, Contest] = {}
    found[f"{name} encode"] = {
        "narrowcast": lambda: nf.encode(x, name),
        "narrowcast, torch tensor": lambda: nf.encode(tensor, name),
        "narrowcast, torch's codes": lambda: nf.encode(tensor, name, convention="torch"),
        peer: lambda: x.astype(ml),
        "torch": lambda: tensor.to(own),
        "torch, again": lambda: tensor.to(own),
        "memcpy": memcpy,
    }
    for values, wide in (("", "float32"), (" to fp64", "float64")):
        found[f"{name} decode{values}"] = {
            "narrowcast": lambda wide=wide: nf.decode(codes, name, dtype=wide),
            "narrowcast, torch tensor": lambda wide=wide: nf.decode(tensor_codes, name, dtype=wide),
            peer: lambda wide=wide: ml_codes.astype(wide),
            "torch": lambda wide=wide: torch_codes.to(getattr(torch, wide)),
            "torch, again": lambda wide=wide: torch_codes.to(getattr(torch, wide)),
            "memcpy": memcpy,
        }
    found[f"{name} cast"] = {
        "narrowcast": lambda: nf.cast(x, name),
        "narrowcast, torch tensor": lambda: nf.cast(tensor, name),
        f"{peer}, there and back": lambda: x.astype(ml).astype(np.float32),
        "torch, there and back": lambda: tensor.to(own).to(torch.float32),
        "memcpy": memcpy,
    }
    return found


def narrow_codecs(x: Any) -> dict[str, Contest]:
    """Return encoding and decoding of FP32 in formats that are met less: with peers where there are any."""
    import torch

    import narrowcast.formats as nf

    tensor, memcpy = torch.from_numpy(x), copying(x)
    found: dict[str, Contest] = {}
    for name, dtype in (("e4m3fnuz", "float8_e4m3fnuz"), ("e5m2fnuz", "float8_e5m2fnuz"), ("e8m0", "float8_e8m0fnu")):
        own, ml, codes = getattr(torch, dtype), ml_dtype(dtype), nf.encode(x, name)
        ml_codes, torch_codes = x.astype(ml), tensor.to(own)
        found[f"{name} encode"] = {
            "narrowcast": lambda name=name: nf.encode(x, name),
            "ml_dtypes": lambda ml=ml: x.astype(ml),
            "torch": lambda own=own: tensor.to(own),
            "memcpy": memcpy,
        }
        found[f"{name} decode"] = {
            "narrowcast": lambda codes=codes, name=name: nf.decode(codes, name, dtype="float32"),
            "ml_dtypes": lambda c=ml_codes: c.astype("float32"),
            "torch": lambda c=torch_codes: c.to(torch.float32),
            "memcpy": memcpy,
        }
    found["tf32 encode"] = {"narrowcast": lambda: nf.encode(x, "tf32"), "memcpy": memcpy}
    found["tf32 cast"] = {"narrowcast": lambda: nf.cast(x, "tf32"), "memcpy": memcpy}
    for name in ("int8", "int4", "nf4"):
        found[f"{name} encode"] = {"narrowcast": lambda name=name: nf.encode(x, name), "memcpy": memcpy}
    return found


def wide_inputs(x: Any) -> dict[str, Contest]:
    """Return encoding of FP64, and of FP32 in FP64."""
    import torch

    import narrowcast.formats as nf

    wide = x.astype("float64")
    tensor, narrow, memcpy = torch.from_numpy(wide), torch.from_numpy(x), copying(wide)
    found: dict[str, Contest] = {}
    for name, dtype in (
        ("fp32", "float32"),
        ("fp16", "float16"),
        ("bf16", "bfloat16"),
        ("e4m3fn", "float8_e4m3fn"),
        ("e5m2", "float8_e5m2"),
        ("e8m0", "float8_e8m0fnu"),
    ):
        own, ml = getattr(torch, dtype), ml_dtype(dtype)
        found[f"{name} encode of fp64"] = {
            "narrowcast": lambda name=name: nf.encode(wide, name),
            "narrowcast, torch tensor": lambda name=name: nf.encode(tensor, name),
            "numpy" if name in ("fp32", "fp16") else "ml_dtypes": lambda ml=ml: wide.astype(ml),
            "torch": lambda own=own: tensor.to(own),
            "memcpy": memcpy,
        }
    found["fp64 encode"] = {
        "narrowcast": lambda: nf.encode(x, "fp64"),
        "numpy": lambda: x.astype("float64"),
        "torch": lambda: narrow.to(torch.float64),
        "memcpy": memcpy,
    }
    return found


def narrow_inputs(x: Any) -> dict[str, Contest]:
    """Return encoding of torch tensors of FP16 and BF16."""
    import torch

    import narrowcast.formats as nf

    dtypes = {
        "fp32": "float32",
        "fp16": "float16",
        "bf16": "bfloat16",
        "e4m3fn": "float8_e4m3fn",
        "e5m2": "float8_e5m2",
    }
    found: dict[str, Contest] = {}
    for source in ("fp16", "bf16"):
        tensor = torch.from_numpy(x).to(getattr(torch, dtypes[source]))
        memcpy = copying(tensor.view(torch.int16).numpy())
        for name, dtype in dtypes.items():
            own = getattr(torch, dtype)
            found[f"{name} encode of {source}"] = {
                "narrowcast": lambda tensor=tensor, name=name: nf.encode(tensor, name),
                "torch": lambda tensor=tensor, own=own: tensor.to(own, copy=True),
                "torch, again": lambda tensor=tensor, own=own: tensor.to(own, copy=True),
                "memcpy": memcpy,
            }
    return found


def calls(few: Any) -> dict[str, Contest]:
    """Return single calls on a few numbers, where the call is all that costs."""
    import torch

    import narrowcast.formats as nf

    tensor = torch.from_numpy(few)
    found: dict[str, Contest] = {}
    for name, dtype in (("fp16", "float16"), ("bf16", "bfloat16"), ("e4m3fn", "float8_e4m3fn")):
        own, ml = getattr(torch, dtype), ml_dtype(dtype)
        codes, torch_codes = nf.encode(tensor, name), tensor.to(own)
        numpy_codes = codes.numpy()
        found[f"{name} encode call"] = {
            "narrowcast": lambda name=name: nf.encode(few, name),
            "narrowcast, torch tensor": lambda name=name: nf.encode(tensor, name),
            "numpy" if name == "fp16" else "ml_dtypes": lambda ml=ml: few.astype(ml),
            "torch": lambda own=own: tensor.to(own),
            "torch, seen as codes": lambda own=own, codes=codes: tensor.to(own).view(codes.dtype),
        }
        found[f"{name} decode call"] = {
            "narrowcast": lambda codes=numpy_codes, name=name: nf.decode(codes, name, dtype="float32"),
            "narrowcast, torch tensor": lambda codes=codes, name=name: nf.decode(codes, name, dtype="float32"),
            "torch": lambda c=torch_codes: c.to(torch.float32),
        }
    return found


def blocks(x: Any) -> dict[str, Contest]:
    """Return quantising in blocks beside bitsandbytes and torchao."""
    import bitsandbytes.functional as bnb
    import torch
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    import narrowcast.formats as nf

    tensor, memcpy = torch.from_numpy(x), copying(x)
    packed, state = bnb.quantize_4bit(tensor, blocksize=64, quant_type="nf4")
    ours, ours_torch = nf.quantize(x, "nf4"), nf.quantize(tensor, "nf4")
    found: dict[str, Contest] = {}
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
    return {operation: who | {"memcpy": memcpy} for operation, who in found.items()}


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


def measure(rounds: int, elements: int, only: str, out: Path) -> None:
    """Time the contests whose names ``only`` is found in on so many elements, and write the results."""
    import warnings

    import numpy as np

    warnings.filterwarnings("ignore")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((elements // 4096, 4096)).astype(np.float32)
    shown = written(out, rounds, elements) if only else {}
    if not shown:
        shown = {"environment": about(), "elements": x.size, "rounds": rounds, "threads": 1, "results": {}}
        shown["load_averages"] = {}
        shown["differing_bytes"] = agreement(x)
        shown["protocol"] = (
            "one process, one thread, random order in each round; medians, paired ratios, bootstrap of 1000"
        )
    print("bytes that differ from the peers':", shown["differing_bytes"])
    for operation, who in contests(x).items():
        if not re.search(only, operation):
            continue
        is_call = operation.endswith(" call")
        times = timed(who, rounds, 500 if is_call else 1, rng)
        times = {name: np.array(t) * 1e9 / (1 if is_call else x.size) for name, t in times.items()}
        shown["results"][operation] = {name: summary(t, times["narrowcast"], is_call, rng) for name, t in times.items()}
        shown["load_averages"][operation] = os.getloadavg()
        show(operation, shown["results"][operation])
    out.write_text(json.dumps(shown, indent=1) + "\n")


def written(out: Path, rounds: int, elements: int) -> dict[str, Any]:
    """Return what was measured before, if the file is there: with the same settings."""
    if not out.exists():
        return {}
    before = json.loads(out.read_text())
    same = (before["rounds"], before["elements"]) == (rounds, elements)
    if not same or before["environment"]["versions"] != about()["versions"] or "load_averages" not in before:
        sys.exit(f"{out} was measured with other settings, versions or rows: measure all, or name another --out")
    return before


def timed(who: Contest, rounds: int, repeats: int, rng: Any) -> dict[str, list[float]]:
    """Return the seconds that each contender takes in each round; all of them run in each."""
    for run in who.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in who}
    for _ in range(rounds):
        for name in rng.permutation(list(who)):
            run = who[name]
            begin = time.perf_counter()
            for _ in range(repeats):
                run()
            times[name].append((time.perf_counter() - begin) / repeats)
    return times


def show(operation: str, rows: dict[str, Any]) -> None:
    print(operation)
    for name, row in rows.items():
        low, high = row["ratio_interval_95"]
        nanoseconds = row.get("ns_per_element", row.get("ns_per_call"))
        print(
            f"  {name:26} {nanoseconds:7.2f} ns  {row['ratio_to_narrowcast']:6.2f}x "
            f"[{low:.2f}, {high:.2f}] narrowcast's time",
            flush=True,
        )


def summary(times: Any, own: Any, is_call: bool, rng: Any) -> dict[str, Any]:
    """Return a contender's time, and its ratio to narrowcast's in the same rounds."""
    import numpy as np

    ratios = times / own
    drawn = np.median(rng.choice(ratios, (1000, ratios.size)), axis=1)
    return {
        "ns_per_call" if is_call else "ns_per_element": float(np.median(times)),
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
        "python": platform.python_version(),
        "loops": engine().NAME,
        "versions": {name: version(name) for name in packages},
    }


main()
