"""How far the roofline's estimates are from the times that runtimes take.

python benchmarks/roofline.py cpu --threads 1 [--out benchmarks/results/roofline-cpu.json]
    `auto` first, then networks in FP32 with ONNX Runtime; exports them to a temporary folder if they are not there
python benchmarks/roofline.py gpu [--device cpu --tiny]
    networks in BF16 with eager PyTorch, their kernels, and probes, into $OUT/roofline-gpu-raw.json
python benchmarks/roofline.py judge-gpu RAW
    estimates beside what that measured
python benchmarks/roofline.py public
    estimates beside what others published of other devices
python benchmarks/roofline.py pack
    the rates and error bands of both, into the package
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import tempfile
import time
import tomllib
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls

HERE = Path(__file__).parent


# CPU ------------------------------------------------------------------------------------------------------------------


def cpu(args):
    from roofline_cpu_models import DEVELOPMENT, JUDGED, export

    from narrowcast.accounting.policies import policy
    from narrowcast.measure.environment import environment
    from narrowcast.measure.machine import measure_cpu

    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    chosen = {"judged": JUDGED, "development": DEVELOPMENT, "all": JUDGED | DEVELOPMENT}[args.networks]
    for name, build in chosen.items():
        export(build, args.folder / f"{name.replace(' ', '_')}.onnx")
    before = environment()
    began = time.perf_counter()
    device = measure_cpu(threads=args.threads)
    measured_in = time.perf_counter() - began
    print(f"auto: {measured_in:.0f} s, load {before.load}", flush=True)
    runs = {name: onnx_run(args.folder / f"{name.replace(' ', '_')}.onnx", args.threads) for name in chosen}
    times = {name: [] for name in chosen}
    for run in runs.values():
        run()
    for number in range(args.rounds):
        for name in np.random.default_rng(number).permutation(list(runs)):
            runs[name]()  # caches hold another network's numbers
            begin = time.perf_counter()
            for _ in range(args.runs):
                runs[name]()
            times[name].append((time.perf_counter() - begin) / args.runs)
        print(f"round {number + 1} of {args.rounds}", flush=True)
    operators = {name: trace_of_built(build) for name, build in chosen.items()}
    rows = {name: row_of(estimate_of(operators[name], device, policy("fp32")), spread(times[name])) for name in chosen}
    report = {
        "device": device.model_dump(mode="json", exclude_defaults=True),
        "environment": before.model_dump(mode="json"),
        "protocol": (
            f"ONNX Runtime in FP32, batch 1, {args.threads} threads, random weights; {args.rounds} rounds of "
            f"{args.runs} runs each, networks interleaved in random order; `auto` measured right before in "
            f"{measured_in:.0f} s; estimates from traces of the PyTorch modules; rates from `auto` alone; "
            "three of the networks (lstm, regnet_y_400mf, resnext50_32x4d) were seen while the estimate's form was chosen"
        ),
        "load_after": os.getloadavg()[0],
        "summary": summary(rows),
        "networks": rows,
    }
    print_rows(rows, report["summary"])
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def onnx_run(path, threads):
    import onnxruntime as ort

    from narrowcast.measure.probes_onnx import options_of

    session = ort.InferenceSession(str(path), options_of(threads), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    given = {
        value.name: rng.integers(0, 30000, value.shape)
        if "int64" in value.type
        else rng.standard_normal(value.shape, np.float32)
        for value in session.get_inputs()
    }
    return lambda: session.run(None, given)


def trace_of_built(build):
    from narrowcast.accounting.trace import trace

    module, inputs = build()
    return trace(module, inputs).operators


def estimate_of(operators, device, precision, **options):
    from narrowcast.accounting.roofline import estimate

    return estimate(operators, device, precision, **options)


def row_of(estimate, measured):
    return {
        "measured_ms": measured["median"] * 1e3,
        "p10_ms": measured["p10"] * 1e3,
        "p90_ms": measured["p90"] * 1e3,
        "estimate_ms": estimate.seconds * 1e3,
        "low_ms": estimate.low * 1e3,
        "high_ms": estimate.high * 1e3,
        "floor_ms": estimate.floor * 1e3,
        "error": estimate.seconds / measured["median"] - 1,
        "shares": {bound: round(share, 3) for bound, share in estimate.shares.items()},
    }


def summary(rows):
    errors = np.abs([row["error"] for row in rows.values()])
    ratios = [row["measured_ms"] / row["estimate_ms"] for row in rows.values()]
    return {
        "networks": len(rows),
        "median_absolute_error": float(np.median(errors)),
        "largest_absolute_error": float(np.max(errors)),
        "measured_over_estimate_p5": float(np.percentile(ratios, 5)),
        "measured_over_estimate_p95": float(np.percentile(ratios, 95)),
        "faster_than_floor": sum(row["measured_ms"] < row["floor_ms"] for row in rows.values()),
        "estimates_below_floor": sum(row["estimate_ms"] < row["floor_ms"] for row in rows.values()),
        "within_band": sum(row["low_ms"] <= row["measured_ms"] <= row["high_ms"] for row in rows.values()),
    }


def print_rows(rows, found):
    for name, row in rows.items():
        print(
            f"{name:26s} measured {row['measured_ms']:8.2f} ms [{row['p10_ms']:.2f} {row['p90_ms']:.2f}]  "
            f"estimate {row['estimate_ms']:8.2f}  {row['error']:+.0%}  floor {row['floor_ms']:.2f}  {row['shares']}"
        )
    print(json.dumps(found, indent=1))


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


class Network:
    """A network on the device: its runs, and the times found so far."""

    def __init__(self, build, inputs, device, tiny):
        dtype = torch.bfloat16
        self.device, self.tiny = device, tiny
        with torch.device(device):
            module = build().eval()
        self.module = module.to(dtype)
        self.given = {
            key: value.to(device) if value.dtype == torch.int64 else value.to(device, dtype)
            for key, value in inputs().items()
        }
        self.graph, self.graph_error = None, "no CUDA"
        self.walls, self.hosts, self.graphs, self.dispatch = [], [], [], []
        with torch.inference_mode():
            for _ in range(1 if tiny else 4):
                self.module(**self.given)
        if device == "cuda":
            self.capture()

    def capture(self):
        """Capture one run as a CUDA graph, if the network allows it: it is what is left without the host."""
        try:
            stream = torch.cuda.Stream()
            with torch.inference_mode():
                with torch.cuda.stream(stream):
                    self.module(**self.given)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    self.module(**self.given)
                graph.replay()
            torch.cuda.synchronize()
            self.graph, self.graph_error = graph, None
        except Exception as error:  # networks that wait for the device cannot be captured
            torch.cuda.synchronize()
            self.graph_error = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def round(self, runs):
        """Time some runs, and beside them what one small operator costs the host at that moment."""
        from narrowcast.measure.probes_torch import dispatch_seconds

        self.dispatch.append(dispatch_seconds(self.device, rounds=5))
        for _ in range(runs):
            self.wait()
            begin = time.perf_counter()
            self.module(**self.given)
            self.hosts.append(time.perf_counter() - begin)
            self.wait()
            self.walls.append(time.perf_counter() - begin)
        for _ in range(runs if self.graph else 0):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            self.graphs.append(start.elapsed_time(end) / 1e3)

    @torch.inference_mode()
    def kernels(self):
        """Return the kernels' times by operator and shapes: calls, device total and own, host (microseconds)."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            self.module(**self.given)
            self.wait()
        events = {}
        for event in profiler.events():
            if not event.name.startswith("aten::"):
                continue
            row = events.setdefault((event.name.removeprefix("aten::"), json.dumps(event.input_shapes)), [0, 0, 0, 0])
            row[0] += 1
            row[1] += getattr(event, "device_time_total", 0.0)
            row[2] += getattr(event, "self_device_time_total", 0.0)
            row[3] += event.cpu_time_total
        return [[name, shapes, *row] for (name, shapes), row in events.items()]

    def times(self):
        return {
            "wall": spread(self.walls),
            "host": spread(self.hosts),
            "graph": spread(self.graphs) if self.graphs else None,
            "graph_error": self.graph_error,
            "dispatch_us": [seconds * 1e6 for seconds in self.dispatch],
        }


def spread(times):
    low, middle, high = np.percentile(times, [10, 50, 90])
    return {"median": float(middle), "p10": float(low), "p90": float(high), "runs": len(times)}


def gpu(args):
    from roofline_gpu_models import zoo

    target = Path(os.environ.get("OUT", tempfile.gettempdir())) / "roofline-gpu-raw.json"
    began = time.perf_counter()
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
        "protocol": (
            f"inference in BF16, random weights; {args.passes} passes over all networks, each 15 runs of eager PyTorch "
            "(wall clock to the end on the device, and the host's part) and 15 of a CUDA graph of the same (events); "
            "kernels by one profiled run; probes: 20 launches captured as a graph, 9 rounds"
        ),
        "load": os.getloadavg()[0],
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
    networks = {}
    for name, (build, inputs) in zoo(args.tiny).items():
        try:
            networks[name] = Network(build, inputs, args.device, args.tiny)
        except Exception as error:  # one network must not cost the others
            result["failed"][name] = f"{type(error).__name__}: {str(error)[:300]}"
    save(f"{len(networks)} networks built, {len(result['failed'])} failed")
    for number in range(args.passes):
        for network in networks.values():
            network.round(2 if args.tiny else 15)
        save(f"pass {number + 1}")
    for name, network in networks.items():
        result["networks"][name] = network.times() | {"events": network.kernels()}
    save("kernels")
    for name, (build, inputs) in zoo(args.tiny).items():
        if name in networks and time.perf_counter() - began < args.limit:
            result["networks"][name]["operators"] = [operator_json(operator) for operator in trace_of(build, inputs)]
    save("operators")
    for name, found in result["networks"].items():
        graph = found["graph"]["median"] * 1e3 if found["graph"] else math.nan
        times = (
            f"wall {found['wall']['median'] * 1e3:.3f} ms, host {found['host']['median'] * 1e3:.3f}, graph {graph:.3f}"
        )
        print(f"{name:26s} {times} {found['graph_error'] or ''}", flush=True)


def sample_of(row):
    from narrowcast.accounting.classes import OperatorClass, Shape
    from narrowcast.measure.probes import Case, Sample

    shape = Shape(**row["shape"]) if row["shape"] else None
    case = Case(OperatorClass(row["kind"]), row["name"], tuple(row["sizes"]), shape, row["moved"], row["weights"])
    return Sample(case, row["number_bytes"], row["seconds"], row["low"], row["high"])


def operator_of(row):
    from narrowcast.accounting.counting import Work
    from narrowcast.accounting.kinds import Kind
    from narrowcast.accounting.operators import Operator

    def shapes(key):
        return tuple(tuple(shape) for shape in row[key])

    read, weights, written = row["bytes"]
    return Operator(
        name=row["name"],
        path=row["path"],
        phase="forward",
        inputs=shapes("inputs"),
        outputs=shapes("outputs"),
        dtype=row["dtype"],
        kind=Kind(row["kind"]),
        attributes=row["attributes"],
        work=Work(*row["work"]) if row["work"] else None,
        bytes_read=read,
        weight_bytes=weights,
        bytes_written=written,
        live_bytes=0,
        producers=tuple(row["producers"]),
    )


def host_group(operator):
    """Return the sort of operator that costs the host about the same as others of its sort."""
    from narrowcast.accounting.kinds import Kind

    groups = {
        Kind.VIEW: "view",
        Kind.CONVOLUTION: "convolution",
        Kind.DEPTHWISE: "convolution",
        Kind.PRODUCT: "product",
        Kind.ATTENTION: "attention",
        Kind.NORMALISATION: "normalisation",
    }
    return groups.get(operator.kind, "other")


#: Where the fit of host costs begins, in those of one small operator, and how firmly it is held there.
HOST = {"convolution": 4.0, "normalisation": 4.0, "product": 4.0, "attention": 6.0, "other": 3.0, "view": 0.3}
RIDGE = 0.1


def fit_host(networks, dispatch_us):
    """Return what each sort of operator costs the host, in those of one small operator: a ridge regression."""
    names = list(HOST)
    usual = np.array([HOST[name] for name in names])
    rows = np.array(
        [[sum(host_group(one) == name for one in operators) for name in names] for operators, _ in networks]
    )
    hosts = np.array([host * 1e6 / dispatch_us for _, host in networks])
    left = np.concatenate([rows / hosts[:, None], RIDGE * np.diag(1 / usual)])
    right = np.concatenate([np.ones(len(hosts)), RIDGE * np.ones(len(names))])
    return dict(zip(names, nnls(left, right)[0].tolist(), strict=True))


def with_host(device, host):
    """Return a device whose runtime has these host costs."""
    from narrowcast.accounting.classes import OperatorClass

    groups = {
        OperatorClass.IMAGE: "convolution",
        OperatorClass.CONVOLUTION: "convolution",
        OperatorClass.POINTWISE: "convolution",
        OperatorClass.GROUPED: "convolution",
        OperatorClass.DEPTHWISE: "convolution",
        OperatorClass.PRODUCT: "product",
        OperatorClass.BATCHED: "product",
        OperatorClass.ATTENTION: "attention",
        OperatorClass.NORMALISATION: "normalisation",
    }
    runtime = device.runtimes[0]
    classes = {
        kind: rates.model_copy(update={"host": float(f"{host[groups.get(kind, 'other')]:.4g}")})
        for kind, rates in runtime.classes.items()
    }
    update = {"classes": classes, "view": float(f"{host['view']:.4g}")}
    return device.model_copy(update={"runtimes": (runtime.model_copy(update=update),)})


def judge_gpu(args):
    """Estimate the networks of a raw measurement, each with host costs fitted on the other networks."""
    from narrowcast.accounting.policies import policy
    from narrowcast.measure.machine import CudaNumbers, cuda_device

    raw = json.loads(args.raw.read_text())
    machine = raw["machine"]
    products = {}
    for key, rate in machine["products_tflops"].items():
        dtype = key.split()[0]
        products[dtype] = max(products.get(dtype, 0.0), rate * 1e12)
    device = cuda_device(
        CudaNumbers(
            name=raw["device"],
            memory_bytes=raw["properties"]["memory"],
            cache_bytes=raw["properties"]["l2"],
            bandwidth=list(machine["copy_gbs"].values())[-1] * 1e9,
            products=products,
            launch=machine["graph_launch_us"] * 1e-6,
            dispatch=machine["dispatch_us"] * 1e-6,
            samples=[sample_of(row) for row in raw["probes"]],
            probed="bf16",
            torch=raw["versions"]["torch"],
        )
    )
    traces = {name: [operator_of(row) for row in found["operators"]] for name, found in raw["networks"].items()}
    hosts = {name: found["host"]["median"] for name, found in raw["networks"].items()}

    def family(name):
        return re.split(r" \d| b\d| encoder", name)[0].split("-")[0].split(" ")[0]

    rows, device_rows = {}, {}
    for name, operators in traces.items():
        others = [(traces[other], hosts[other]) for other in traces if family(other) != family(name)]
        judged = with_host(device, fit_host(others, machine["dispatch_us"]))
        rows[name] = row_of(estimate_of(operators, judged, policy("bf16")), raw["networks"][name]["wall"])
        total = sum(row[4] for row in raw["networks"][name]["events"]) * 1e-6
        alone = with_host(device, dict.fromkeys(HOST, 0.0))
        found = estimate_of(operators, alone, policy("bf16"))
        device_rows[name] = row_of(found, {"median": total, "p10": total, "p90": total})
    host = fit_host([(traces[name], hosts[name]) for name in traces], machine["dispatch_us"])
    report = {
        "device": with_host(device, host).model_dump(mode="json", exclude_defaults=True),
        "versions": raw["versions"],
        "protocol": raw["protocol"]
        + "; estimates: kernels from the rates of the probes alone, host costs of each network from the networks of "
        "all other families (leave one family out); on_device: the sum of the kernels' times, host aside",
        "machine": machine,
        "host_costs": host,
        "summary": summary(rows),
        "on_device_summary": summary(device_rows),
        "networks": rows,
        "on_device": device_rows,
        "probes": raw["probes"],
    }
    print_rows(rows, report["summary"])
    print_rows(device_rows, report["on_device_summary"])
    print(host)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


# What the package ships -------------------------------------------------------------------------------------------------


def band_of(found):
    low, high = found["measured_over_estimate_p5"], found["measured_over_estimate_p95"]
    return {"low": min(1.0, round(low, 2)), "high": max(1.0, round(high, 2))}


def public(args):
    """Estimate what others measured and published, on devices that nothing was fitted on."""
    import timm

    from narrowcast.accounting.devices import device
    from narrowcast.accounting.policies import policy
    from narrowcast.accounting.trace import fake_module, trace

    published = tomllib.loads((HERE / "roofline_public.toml").read_text())
    batch = published["batch"]
    rows = {}
    for name in published["milliseconds"]:
        module, mode = fake_module(lambda name=name: timm.create_model(name, pretrained=False))
        operators = trace(module, (torch.empty(batch, 3, 224, 224),), mode=mode).operators
        for place, other in enumerate(published["devices"]):
            found = estimate_of(operators, device(other), policy("fp16"), samples=batch)
            seconds = published["milliseconds"][name][place] / 1e3
            rows[f"{name} on {other}"] = row_of(found, {"median": seconds, "p10": seconds, "p90": seconds})
    report = {
        "protocol": f"published by others: {published['source']}; FP16 under autocast, batch {batch}, eager PyTorch; "
        "estimates from the package's rates, which were measured on an H100, and the catalogue's peaks",
        "summary": summary(rows),
        "by_device": {
            other: summary({key: row for key, row in rows.items() if key.endswith(f"on {other}")})
            for other in published["devices"]
        },
        "networks": rows,
    }
    print_rows(rows, report["by_device"])
    print(json.dumps(report["summary"]))
    (HERE / "results" / "roofline-public.json").write_text(json.dumps(report, indent=1) + "\n")


def pack(args):
    """Write the rates and error bands of both results into the package's data."""
    from narrowcast.accounting.devices import device
    from narrowcast.accounting.efficiencies import RuntimeModel
    from narrowcast.measure.rates import fit

    on_cpu, on_gpu = (json.loads(path.read_text()) for path in (args.cpu, args.gpu))
    elsewhere = HERE / "results" / "roofline-public.json"
    gpu_model = RuntimeModel.model_validate(on_gpu["device"]["runtimes"][0])
    h100 = device("h100-sxm")
    rates = fit(
        [sample_of(row) for row in on_gpu["probes"]],
        peak=h100.peak("bf16").tflops * 1e12,
        bandwidth=h100.memory.bandwidth * 1e9,
        cache=50 << 20,
        parallel=True,
    )
    shared = {kind: one.model_copy(update={"host": gpu_model.rates(kind).host}) for kind, one in rates.items()}
    ridge = round(h100.ridge("bf16"), 1)
    tables = {
        "cpu-onnxruntime": (RuntimeModel.model_validate(on_cpu["device"]["runtimes"][0]), on_cpu),
        "gpu-torch": (
            gpu_model.model_copy(update={"classes": shared, "ridge": ridge, "peak": h100.peak("bf16").tflops * 1e12}),
            on_gpu,
        ),
    }
    lines = [
        "# What runtimes reach of a device's peaks, by class of operators; the fields are those of",
        "# narrowcast.accounting.efficiencies.Rates and RuntimeModel. Written by benchmarks/roofline.py pack from",
        "# benchmarks/results/roofline-cpu.json and roofline-gpu.json, which say how everything was measured. The band",
        "# (low, high) holds nine of ten of the networks that the estimates were judged by.",
    ]
    for key, (model, report) in tables.items():
        found = report["summary"]
        fields = model.model_dump(mode="json", exclude_none=True) | {
            **band_of(found),
            "source": f"{model.source}; band: {found['networks']} networks in benchmarks/results",
        }
        if key == "gpu-torch" and elsewhere.exists():
            summary = json.loads(elsewhere.read_text())["summary"]
            band = band_of(summary)
            fields |= {f"elsewhere_{end}": value for end, value in band.items()}
            fields["elsewhere_source"] = (
                f"rates measured on an H100 in bf16 and carried over; band: {summary['networks']} times published for "
                "RTX 3090, 4090 and 5090, FP16, batch 1024; small batches were not looked at"
            )
        classes = fields.pop("classes")
        lines += ["", f"[{key}]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items())]
        lines += ["", f"[{key}.classes]"]
        for kind, one in classes.items():
            usual = type(model.rates("convolution"))().model_dump()
            told = ", ".join(f"{name} = {json.dumps(value)}" for name, value in one.items() if value != usual[name])
            lines.append(f"{json.dumps(kind)} = {{ {told} }}")
    target = HERE.parent / "src" / "narrowcast" / "accounting" / "efficiencies.toml"
    target.write_text("\n".join(lines) + "\n")
    print(target.read_text())


def main():
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    on_cpu = commands.add_parser("cpu")
    on_cpu.add_argument("--threads", type=int, default=1)
    on_cpu.add_argument("--networks", default="judged", choices=["judged", "development", "all"])
    on_cpu.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "narrowcast-roofline")
    on_cpu.add_argument("--rounds", type=int, default=15)
    on_cpu.add_argument("--runs", type=int, default=3)
    on_cpu.add_argument("--out", type=Path)
    on_cpu.set_defaults(run=cpu)
    on_gpu = commands.add_parser("gpu")
    on_gpu.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    on_gpu.add_argument("--tiny", action="store_true")
    on_gpu.add_argument("--limit", type=float, default=260.0)
    on_gpu.add_argument("--passes", type=int, default=4)
    on_gpu.set_defaults(run=gpu)
    judge = commands.add_parser("judge-gpu")
    judge.add_argument("raw", type=Path)
    judge.add_argument("--out", type=Path, default=HERE / "results" / "roofline-gpu.json")
    judge.set_defaults(run=judge_gpu)
    commands.add_parser("public").set_defaults(run=public)
    packing = commands.add_parser("pack")
    packing.add_argument("--cpu", type=Path, default=HERE / "results" / "roofline-cpu.json")
    packing.add_argument("--gpu", type=Path, default=HERE / "results" / "roofline-gpu.json")
    packing.set_defaults(run=pack)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
