"""How far the roofline's estimates are from the times that runtimes take.

python benchmarks/roofline.py gpu [--device cpu --tiny]     measure networks in BF16 with PyTorch, and their kernels
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent


# GPU ------------------------------------------------------------------------------------------------------------------


def measure_probes(device, dtype, tiny):
    """Return the samples of all probes."""
    from narrowcast.measure.probes_torch import gpu_cases, run_case

    samples = []
    for case in gpu_cases():
        numbers = case.moved + case.weights
        if tiny and (numbers > 1 << 18 or case.macs > 1 << 24):
            continue
        try:
            samples.append(run_case(case, dtype, device, rounds=2 if tiny else 9))
        except RuntimeError as error:
            print("probe failed", case.name, case.sizes, str(error).splitlines()[0], flush=True)
    return [sample_json(sample) for sample in samples]


def sample_json(sample):
    case = sample.case
    return {
        "kind": case.kind.value,
        "name": case.name,
        "sizes": case.sizes,
        "shape": case.shape._asdict() if case.shape else None,
        "moved": case.moved,
        "weights": case.weights,
        "number_bytes": sample.number_bytes,
        "seconds": sample.seconds,
        "low": sample.low,
        "high": sample.high,
    }


def measure_machine_raw(device, tiny):
    """Return bandwidths, products and launches."""
    from narrowcast.measure import probes_torch as probes

    size = 256 if tiny else 8192
    found = {
        "copy_gbs": {
            n: probes.copy_bandwidth(device, n) / 1e9
            for n in (1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << (20 if tiny else 29))
        },
        "products_tflops": {
            f"{kind} {n}": rate / 1e12
            for kind in ("fp32", "tf32", "fp16", "bf16", "fp8", "int8")
            for n in ({size, size // 2} if tiny else (4096, 8192, 16384))
            if not (kind in ("fp32", "tf32") and n > 8192)
            if (rate := probes.product_peak(device, kind, n)) is not None
        },
        "dispatch_us": probes.dispatch_seconds(device) * 1e6,
    }
    if device == "cuda":
        found["graph_launch_us"] = probes.launch_seconds() * 1e6
    return found


def trace_of(build, inputs):
    """Return the operators of a run, as the roofline gets them."""
    from narrowcast.accounting.trace import fake_module, trace

    module, mode = fake_module(build)
    return trace(module, (), inputs(), mode=mode).operators


def operator_json(operator):
    work = operator.work
    return {
        "name": operator.name,
        "path": operator.path,
        "inputs": operator.inputs,
        "outputs": operator.outputs,
        "dtype": operator.dtype,
        "kind": operator.kind.value,
        "attributes": dict(operator.attributes),
        "work": [work.macs, work.bias_adds, work.other, work.sums] if work else None,
        "bytes": [operator.bytes_read, operator.weight_bytes, operator.bytes_written],
        "producers": list(getattr(operator, "producers", ())),
    }


def measure_network(build, inputs, device, tiny):
    """Return a network's times, the host's alone, and the kernels' by operator and shapes."""
    dtype = torch.bfloat16
    with torch.device(device):
        module = build().eval()
    module = module.to(dtype)
    given = {
        key: value.to(device) if value.dtype == torch.int64 else value.to(device, dtype)
        for key, value in inputs().items()
    }
    events = {}
    with torch.inference_mode():
        for _ in range(1 if tiny else 4):
            module(**given)
        walls, hosts = [], []
        begun = time.perf_counter()
        while len(walls) < (2 if tiny else 15) or (len(walls) < 60 and time.perf_counter() - begun < 1.0):
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            module(**given)
            hosts.append(time.perf_counter() - begin)
            if device == "cuda":
                torch.cuda.synchronize()
            walls.append(time.perf_counter() - begin)
        queued = []
        if device == "cuda":  # back to back, as a server runs them
            for _ in range(10):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(5):
                    module(**given)
                end.record()
                end.synchronize()
                queued.append(start.elapsed_time(end) / 5e3)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            module(**given)
            if device == "cuda":
                torch.cuda.synchronize()
        for event in profiler.events():
            if not event.name.startswith("aten::"):
                continue
            key = (event.name.removeprefix("aten::"), json.dumps(event.input_shapes))
            row = events.setdefault(key, [0, 0.0, 0.0, 0.0])
            row[0] += 1
            row[1] += getattr(event, "device_time_total", 0.0)
            row[2] += getattr(event, "self_device_time_total", 0.0)
            row[3] += event.cpu_time_total

    def spread(times):
        return {
            "median": statistics.median(times),
            "p10": float(np.percentile(times, 10)),
            "p90": float(np.percentile(times, 90)),
            "runs": len(times),
        }

    return {
        "wall": spread(walls),
        "host": spread(hosts),
        "queued": spread(queued) if queued else None,
        "events": [[name, shapes, *row] for (name, shapes), row in events.items()],
    }


def gpu(args):
    from roofline_gpu_models import zoo

    out = Path(os.environ.get("OUT", "/tmp"))
    target = out / "roofline-gpu-raw.json"
    began = time.perf_counter()
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": __import__("transformers").__version__,
        },
        "networks": {},
        "failed": {},
    }
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result["properties"] = {
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
            "sms": properties.multi_processor_count,
        }

    def save(stage):
        result["seconds"] = time.perf_counter() - began
        target.write_text(json.dumps(result))
        print(f"{result['seconds']:.0f} s  {stage}", flush=True)

    result["machine"] = measure_machine_raw(args.device, args.tiny)
    save(f"machine {json.dumps(result['machine'])}")
    result["probes"] = measure_probes(args.device, torch.bfloat16, args.tiny)
    save(f"{len(result['probes'])} probes")
    for name, (build, inputs) in zoo(args.tiny).items():
        if time.perf_counter() - began > args.limit:
            result["failed"][name] = "no time left"
            continue
        try:
            found = measure_network(build, inputs, args.device, args.tiny)
            found["operators"] = [operator_json(operator) for operator in trace_of(build, inputs)]
            result["networks"][name] = found
            times = [f"{key} {found[key]['median'] * 1e3:.3f} ms" for key in ("wall", "host")]
            save(f"{name}: {', '.join(times)}, {len(found['operators'])} operators")
        except Exception as error:  # one network must not cost the others
            result["failed"][name] = f"{type(error).__name__}: {str(error)[:300]}"
            save(f"{name} failed: {result['failed'][name]}")
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def main():
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    on_gpu = commands.add_parser("gpu")
    on_gpu.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    on_gpu.add_argument("--tiny", action="store_true")
    on_gpu.add_argument("--limit", type=float, default=260.0)
    on_gpu.set_defaults(run=gpu)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
