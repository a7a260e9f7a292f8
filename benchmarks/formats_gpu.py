"""How fast number formats are on a GPU, next to a plain cast; first, that the bits are the CPU's.

python benchmarks/formats_gpu.py [--check] [--time] [--tune]

Without options it checks and times. The table and its JSON (benchmarks/results/formats-gpu.json, or under $OUT where that
is set) count the bytes that each operation has to read and write.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch

from narrowcast import formats as nf
from narrowcast.errors import FormatError
from narrowcast.formats import device, triton_codec, triton_dequantize, triton_quantize
from narrowcast.formats.fast import codebook_edges
from narrowcast.formats.kinds import Codebook, Format, Integer
from narrowcast.formats.rules import Overflow, Rounding
from narrowcast.formats.table import ELEMENTS

HERE = Path(__file__).parent
SIZES = {"1 Gi": 1 << 30, "64 Mi": 1 << 26}
ROUNDS = 40
BUFFERS = 3
BUSY = 1_000_000  # clock cycles, about half a millisecond
BLOCKED = ("nf4", "mxfp4", "nvfp4", "mxfp8_e4m3")
HALVES = (torch.bfloat16, torch.float16)


# The bits


def integers_of(x):
    """Return a tensor's bits, in main memory."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).cpu()


class Checker:
    """Counts comparisons and what differs."""

    def __init__(self):
        self.compared, self.cases, self.wrong = 0, 0, []

    def same(self, what, found, wanted, x=None, any_nan=False):
        self.cases += 1
        if found.dtype != wanted.dtype or found.shape != wanted.shape or found.device.type != "cuda":
            self.wrong.append(f"{what}: {found.dtype} {list(found.shape)} on {found.device}")
            return
        a, b = integers_of(found).reshape(-1), integers_of(wanted).reshape(-1)
        self.compared += a.numel()
        differ = a != b
        if any_nan:
            differ &= ~(found.isnan().cpu() & wanted.isnan()).reshape(-1)
        if differ.any():
            at = differ.nonzero()[:3, 0]
            given = "" if x is None or x.numel() != a.numel() else f" for {x.reshape(-1)[at].tolist()}"
            self.wrong.append(f"{what}: {int(differ.sum())} differ: {a[at].tolist()}, not {b[at].tolist()}{given}")

    def fails(self, what, here, there):
        self.cases += 1
        messages = []
        for call in (here, there):
            try:
                call()
                messages.append("no error")
            except FormatError as error:
                messages.append(str(error))
        if messages[0] != messages[1] or messages[0] == "no error":
            self.wrong.append(f"{what}: {messages[0]!r}, not {messages[1]!r}")


def inputs_of(format, rng):
    """Return every half of 16 bits, and float32 and float64 numbers at and beside the format's boundaries."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    yield from (every.view(dtype) for dtype in HALVES)
    yield from (torch.arange(256, dtype=torch.uint8).view(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2))
    if format.bits <= 16:
        count = len(format.values) if isinstance(format, Codebook) else 1 << format.bits
        values = np.sort(nf.decode(np.arange(count), format))
        values = np.unique(values[np.isfinite(values)])[:: 1 if format.bits <= 8 else 7]
        steps = np.diff(values)
        points = np.concatenate(
            [values, values[:-1] + steps / 2, values[:-1] + steps / 4, values[-1:] * [[1.01], [1.5], [4]]], None
        )
    else:
        points = rng.standard_normal(5000)
    for dtype, word in (("float32", np.uint32), ("float64", np.uint64)):
        with np.errstate(all="ignore"):
            own = points.astype(dtype)
            beside = [np.nextafter(own, own.dtype.type(side)) for side in (-np.inf, np.inf)]
            few = rng.integers(0, np.iinfo(word).max, 20_000, dtype=word, endpoint=True).view(dtype)
            special = np.array([0.0, np.inf, np.nan], dtype)
            found = np.concatenate([own, *beside, few, special])
        yield torch.from_numpy(np.concatenate([found, -found]))


def rules_of(format):
    """Return every rounding with the default overflow, and every overflow with the default rounding."""
    nan = [{"nan": "zero"}, {"nan": "max"}]
    below = (
        [{"below": name} for name in ("magnitude", "clamp")]
        if isinstance(format, Format) and not format.signed
        else [{}]
    )
    overflows = [Overflow.IEEE, Overflow.SATURATE, Overflow.CLAMP]
    if isinstance(format, Format) and format.has_nan:
        overflows.append(Overflow.NAN)
    if isinstance(format, Integer):
        overflows.append(Overflow.WRAP)
    for choice, more, under in itertools.product([{"overflow": o.value} for o in overflows], nan, below):
        yield choice | more | under
    for rounding, under in itertools.product(Rounding, below):
        yield {"rounding": rounding.value, "nan": "zero", "seed": 3} | under


def check_codecs(check, rng):
    """Compare encode, cast and decode of every named format."""
    for name, format in ELEMENTS.items():
        for x in inputs_of(format, rng):
            there = x.cuda()
            for rules in rules_of(format):
                what = f"{name} from {x.dtype} {rules}"
                check.same(f"encode {what}", nf.encode(there, format, **rules), nf.encode(x, format, **rules), x)
                if rules.get("rounding") in (None, "stochastic"):
                    check.same(f"cast {what}", nf.cast(there, format, **rules), nf.cast(x, format, **rules), x)
        if not (isinstance(format, Format) and format.has_nan):
            lost = torch.tensor([0.0, 1.0, float("nan"), float("nan")])
            check.fails(
                f"NaN into {name}",
                lambda x=lost, f=format: nf.encode(x.cuda(), f),
                lambda x=lost, f=format: nf.encode(x, f),
            )
        if format.bits <= 16:
            codes = torch.from_numpy(
                nf.encode(nf.decode(np.arange(1 << format.bits), format), format, rounding="nearest_even")
                if isinstance(format, Codebook)
                else np.arange(1 << format.bits)
            )
            for dtype in ("float64", "float32"):
                check.same(
                    f"decode {name}",
                    nf.decode(codes.cuda(), format, dtype=dtype),
                    nf.decode(codes, format, dtype=dtype),
                )
                small = codes.to(torch.uint8) if format.bits <= 8 else codes
                check.same(
                    f"decode {name}",
                    nf.decode(small.cuda(), format, dtype=dtype),
                    nf.decode(small, format, dtype=dtype),
                )
    whole = torch.arange(-70_000, 70_000)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        x = whole.to(dtype)
        check.same(f"encode int8 from {dtype}", nf.encode(x.cuda(), "int8"), nf.encode(x, "int8"), x)
        check.same(f"cast e4m3 from {dtype}", nf.cast(x.cuda(), "e4m3fn"), nf.cast(x, "e4m3fn"), x)


def blocks_of(block, dtype, finite, rng, edges):
    """Return rows of a block each: random, of every magnitude, at the edges between codes, of zeros, broken ones."""
    normal = rng.standard_normal((1000, block)).astype(np.float32)
    with np.errstate(all="ignore"):
        scaled = (rng.uniform(-1, 1, (1000, block)) * np.ldexp(1.0, rng.integers(-149, 127, (1000, 1)))).astype(
            np.float32
        )
        plain = (rng.integers(-8, 9, (1000, block)) * np.ldexp(0.25, rng.integers(-30, 30, (1000, 1)))).astype(
            np.float32
        )
        # Beside the edges: a row's largest number fixes its scale; the others are a code's edge times it, give or take.
        scale = np.ldexp(rng.uniform(1, 2, (2000, 1)), rng.integers(-100, 100, (2000, 1))).astype(np.float32)
        scale[::3] = (scale[::3].view(np.uint32) | 0x7FFFF0).view(np.float32)  # significands of nearly two
        near = (edges[rng.integers(0, len(edges), (2000, block))] * scale).astype(np.float32)
        near = (near.view(np.int32) + rng.integers(-2, 3, near.shape, dtype=np.int32)).view(np.float32)
        near[:, 0] = (edges.max() * scale)[:, 0]
    zeros = np.zeros((6, block), np.float32)
    zeros[1], zeros[2, 3], zeros[3, 0], zeros[4, 1] = -0.0, 1e-45, -1e-40, 3e-39
    broken = rng.standard_normal((6, block)).astype(np.float32)
    broken[0, 1], broken[1, 2], broken[2, 3], broken[3, 4] = np.nan, np.inf, -np.inf, -np.nan
    broken[4] *= 1e38
    rows = torch.from_numpy(np.concatenate([normal, scaled, plain, near, zeros, *([] if finite else [broken])])).to(
        dtype
    )
    return torch.where(rows.isfinite(), rows, 0) if finite else rows


def edges_of(format):
    """Return the numbers between codes, and the largest magnitude."""
    if isinstance(format, Codebook):
        return np.append(codebook_edges(format, "float64"), max(abs(format.min), format.max))
    values = nf.decode(np.arange(1 << format.bits), format)
    values = np.unique(values[np.isfinite(values)])
    return np.append(
        (values[1:] + values[:-1]) / 2, values.max() if isinstance(format, Format) else -values.min() - format.step
    )


def check_blocks(check, rng):
    """Compare quantize and dequantize of schemes with kernels, and of some without."""
    block_formats = ["mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxint8"]
    schemes = [
        (name, {"scale_rule": rule}, 32, False)
        for name in block_formats
        for rule in ("floor", "ceil", "even", "round_up")
    ]
    schemes += [("nvfp4", {}, 16, False), ("nvfp4", {"block": 32}, 32, False)]
    flat = ("nf4", "nf3", "nf2", "e4m3fn", "e5m2", "e4m3fnuz", "e2m1", "e2m3", "int8", "int4", "int3")
    schemes += [(name, {"block": block}, block, True) for name in flat for block in (16, 64, 128)]
    schemes += [
        (name, {"granularity": where}, 4096, True) for name in flat for where in (nf.PerTensor(), nf.PerChannel(0))
    ]
    schemes += [("nf4", {"double_quant": True}, 64, True), ("int4", {"symmetric": False, "block": 64}, 64, True)]
    schemes += [
        ("nf4", {"range": "mse"}, 64, True),
        ("int8", {"rounding": "stochastic", "seed": 5, "block": 64}, 64, True),
    ]
    for (name, options, block, finite), dtype in itertools.product(schemes, (torch.float32, *HALVES)):
        if dtype is not torch.float32 and (
            options.get("scale_rule", "floor") != "floor" or options.get("block", 64) != 64
        ):
            continue  # a number is float32 by then: the input's dtype matters once per format
        format = nf.get(name)
        edges = edges_of(format.element if isinstance(format, nf.BlockFormat) else format)
        x = blocks_of(block, dtype, finite, rng, edges)
        if block == 4096:
            x = x[: 2000 if isinstance(options["granularity"], nf.PerTensor) else None : 100].contiguous()
        if options.get("range") == "mse":
            x = x[:500]
        compare(check, f"{name} {options} {dtype}", x, name, options)
    for dtype in (torch.float32, torch.bfloat16):
        big = torch.randn(1 << 12, 1 << 10, generator=torch.Generator().manual_seed(1)).to(dtype)
        for name in (*BLOCKED, "int8"):
            compare(check, f"{name}, 4 Mi elements of {dtype}", big, name, {})
    lost = torch.randn(8, 64)
    lost[3, 2], lost[5, 1] = float("nan"), float("inf")
    for options in ({}, {"block": 7}, {"axis": 4}):
        check.fails(
            f"nf4 {options}",
            lambda o=options: nf.quantize(lost.cuda(), "nf4", **o),
            lambda o=options: nf.quantize(lost, "nf4", **o),
        )


def compare(check, what, x, name, options):
    found, wanted = nf.quantize(x.cuda(), name, **options), nf.quantize(x, name, **options)
    check.same(f"codes of {what}", found.packed, wanted.packed)
    if isinstance(wanted.stored_scales, nf.QuantizedTensor):
        check.same(f"scales of {what}", found.stored_scales.packed, wanted.stored_scales.packed)
    else:
        check.same(
            f"scales of {what}",
            found.stored_scales,
            wanted.stored_scales,
            any_nan=wanted.stored_scales.is_floating_point(),
        )
    if (found.tensor_scale, found.dtype, found.shape) != (wanted.tensor_scale, wanted.dtype, wanted.shape):
        check.wrong.append(f"{what}: {found} with tensor scale {found.tensor_scale}, not {wanted.tensor_scale}")
    for dtype in ("float32", "bfloat16", "float16"):
        check.same(f"values of {what} in {dtype}", found.dequantize(dtype), wanted.dequantize(dtype), any_nan=True)


def run_checks():
    check, rng, begin = Checker(), np.random.default_rng(0), time.time()
    check_codecs(check, rng)
    print(f"codecs: {check.cases} cases, {len(check.wrong)} wrong, {time.time() - begin:.0f} s", flush=True)
    check_blocks(check, rng)
    for line in check.wrong[:40]:
        print("WRONG", line[:400])
    seconds = time.time() - begin
    print(
        f"bits: {check.cases} cases, {check.compared:,} numbers compared, {len(check.wrong)} wrong, {seconds:.0f} s",
        flush=True,
    )
    return {"cases": check.cases, "numbers": check.compared, "wrong": len(check.wrong), "seconds": round(seconds)}


# The time


def operations(count, keep):
    """Return name -> (bytes moved, call) over buffers that are taken in turn; ``keep`` selects by name."""
    base = [torch.randn(count, device="cuda").view(-1, 4096) for _ in range(BUFFERS)]
    inputs = {"fp32": itertools.cycle(base), "bf16": itertools.cycle([x.to(torch.bfloat16) for x in base])}
    size = {"fp32": 4, "bf16": 2}
    found = {"cast fp32 -> bf16": (6 * count, lambda: next(inputs["fp32"]).to(torch.bfloat16))}

    def add(name, moved, call):
        if keep in name:
            found[name] = (moved, call)

    target = torch.empty_like(base[0])
    add("copy fp32", 8 * count, lambda: target.copy_(next(inputs["fp32"])))
    for dtype, x in inputs.items():
        add(f"torch fp8 cast of {dtype}", (size[dtype] + 1) * count, lambda x=x: next(x).to(torch.float8_e4m3fn))
        add(f"fp8 encode {dtype}", (size[dtype] + 1) * count, lambda x=x: nf.encode(next(x), "e4m3fn"))
        add(f"fp8 cast {dtype}", 2 * size[dtype] * count, lambda x=x: nf.cast(next(x), "e4m3fn"))
        add(
            f"fp8 quantize {dtype}, a scale for the tensor",
            (2 * size[dtype] + 1) * count,
            lambda x=x: nf.quantize(next(x), "e4m3fn"),
        )
        for name in BLOCKED:
            made = nf.quantize(base[0].to(torch.float32 if dtype == "fp32" else torch.bfloat16), name)
            reads = 2 if name == "nvfp4" else 1
            add(
                f"{name} quantize {dtype}",
                reads * size[dtype] * count + made.nbytes,
                lambda x=x, name=name: nf.quantize(next(x), name),
            )
            made = itertools.cycle([made, *(nf.quantize(y, name) for y in base[1:])])
            moved = size[dtype] * count + next(made).nbytes
            to = "float32" if dtype == "fp32" else "bfloat16"
            add(f"{name} dequantize {dtype}", moved, lambda made=made, to=to: next(made).dequantize(to))
    codes = itertools.cycle([nf.encode(x, "e4m3fn") for x in base])
    add("fp8 decode fp32", 5 * count, lambda: nf.decode(next(codes), "e4m3fn", dtype="float32"))
    whole = itertools.cycle([nf.quantize(x, "e4m3fn") for x in base])
    add("fp8 dequantize fp32, a scale for the tensor", 5 * count, lambda: next(whole).dequantize("float32"))
    add("fp8 dequantize bf16, a scale for the tensor", 3 * count, lambda: next(whole).dequantize("bfloat16"))
    add_bitsandbytes(add, inputs, size, count)
    return found


def add_bitsandbytes(add, inputs, size, count):
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        print(f"without bitsandbytes: {error}")
        return
    scales = count // 64 * 4
    for dtype, x in inputs.items():
        moved = size[dtype] * count + count // 2 + scales
        add(
            f"bitsandbytes nf4 quantize {dtype}",
            moved,
            lambda x=x: bnb.quantize_4bit(next(x), blocksize=64, quant_type="nf4"),
        )
        made = itertools.cycle([bnb.quantize_4bit(next(x), blocksize=64, quant_type="nf4") for _ in range(BUFFERS)])
        add(f"bitsandbytes nf4 dequantize {dtype}", moved, lambda made=made: bnb.dequantize_4bit(*next(made)))


def timed(found, rounds):
    """Return name -> milliseconds of each round; every round runs every operation once.

    The device is busy for a moment before each, so that what the host takes to start a call is not in its time.
    """
    for _, call in found.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    events = {name: [] for name in found}
    for _ in range(rounds):
        for name, (_, call) in found.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY)
            begin.record()
            call()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in events.items()}


def run_timing():
    results = {}
    for label, count in SIZES.items():
        found = operations(count, "")
        taken = timed(found, ROUNDS)
        cast = found["cast fp32 -> bf16"][0] / median(taken["cast fp32 -> bf16"])
        rows = {}
        print(f"\n{label} elements{'':30} GB/s  of the cast   ms (10th to 90th percentile)")
        for name, (moved, _) in found.items():
            ms = median(taken[name])
            tenths = quantiles(taken[name], n=10)
            rows[name] = {"bytes": moved, "ms": ms, "ms_p10": tenths[0], "ms_p90": tenths[-1]}
            rows[name] |= {"gb_per_s": moved / ms / 1e6, "of_cast": moved / ms / cast}
            print(
                f"{name:46} {moved / ms / 1e6:6.0f}  {moved / ms / cast:8.2f}      {ms:.3f} ({tenths[0]:.3f}-{tenths[-1]:.3f})",
                flush=True,
            )
        results[label] = rows
        del found
        torch.cuda.empty_cache()
    return results


def run_tuning():
    """Print the bandwidth of the main kernels for tiles and warps: how the constants in the modules were chosen."""
    names = [
        f"{name} {what} {dtype}"
        for name in BLOCKED
        for what in ("quantize", "dequantize")
        for dtype in ("fp32", "bf16")
    ]
    names += ["fp8 encode fp32", "fp8 encode bf16", "fp8 decode fp32", "fp8 quantize fp32, a scale for the tensor"]
    found = operations(1 << 28, "")
    print(f"{'GB/s':42}", end="")
    settings = [(tile, warps) for tile in (1024, 2048, 4096, 8192) for warps in (1, 2, 4, 8)]
    settings = [(tile, warps) for tile, warps in settings if 16 <= tile // (32 * warps) <= 64]
    print(*(f"{tile}/{warps}" for tile, warps in settings), sep="  ")
    speeds = {name: [] for name in names}
    for tile, warps in settings:
        for module in (triton_codec, triton_quantize, triton_dequantize):
            module._TILE, module._WARPS = tile, warps
        taken = timed({name: found[name] for name in names}, 10)
        for name in names:
            speeds[name].append(found[name][0] / median(taken[name]) / 1e6)
    for name in names:
        print(f"{name:42}", *(f"{speed:6.0f}" for speed in speeds[name]), sep="  ", flush=True)
    return {"settings": settings, "gb_per_s": speeds}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("check", "time", "tune"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    both = not (options.check or options.time or options.tune)
    assert device._has_triton(), "Triton is missing"
    report = {
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        | {name: version(name) for name in ("triton", "bitsandbytes")},
        "protocol": f"CUDA events around each call; median of {ROUNDS} rounds, each running every operation once; "
        f"{BUFFERS} inputs taken in turn; bytes are those an operation must read and write (NVFP4 and a scale for the "
        "tensor read their input twice); calls of the public API, waits for a result included; the device is kept "
        "busy for half a millisecond before each",
    }
    if options.check or both:
        report["bits"] = run_checks()
    if options.tune:
        report["tuning"] = run_tuning()
    if options.time or both:
        report["results"] = run_timing()
    folder = Path(os.environ.get("OUT", HERE / "results"))
    (folder / "formats-gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(bool(report.get("bits", {}).get("wrong")))


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
