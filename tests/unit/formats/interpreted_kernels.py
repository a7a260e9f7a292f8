"""Hold Triton's kernels, run by its interpreter on tensors in main memory, to the CPU's bits. Exits 1 if any differ.

The interpreter truncates where numbers become bfloat16: results of that dtype are held on a GPU alone.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from format_values import FLOATS, boundary_values, overflows

from narrowcast import formats as nf
from narrowcast.formats import triton_codec, triton_dequantize, triton_quantize
from narrowcast.formats.kinds import Format
from narrowcast.formats.rules import Rules
from narrowcast.formats.triton_specs import has_steps, has_values

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
compared, wrong = 0, []


def same(what, found, wanted):
    global compared
    compared += found.numel()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    agree = found.contiguous().view(kind) == wanted.contiguous().view(kind)
    if found.is_floating_point():
        agree |= found.isnan() & wanted.isnan()
    if found.shape != wanted.shape or not agree.all():
        wrong.append(f"{what}: {(~agree).sum()} of {found.numel()} differ")


def codecs(rng):
    for name, format in FLOATS.items():
        if not has_steps(format):
            continue
        stride = 1 if format.bits <= 8 else 97
        words = np.concatenate([rng.integers(0, 1 << 32, 2000, dtype=np.uint32).view(np.float32), [np.nan, -np.nan]])
        exact = torch.from_numpy(np.concatenate([boundary_values(format, "float32", stride), words.astype(np.float32)]))
        halves = torch.arange(0, 1 << 16, 5, dtype=torch.int32).to(torch.int16)
        for x in (exact, halves.view(torch.bfloat16), halves.view(torch.float16)):
            for overflow in overflows(format):
                rules = Rules.of(format, overflow=overflow, nan="max")
                assert triton_codec.takes(x, format, rules)
                what = f"{name} {overflow} from {x.dtype}"
                same(
                    f"encode {what}",
                    triton_codec.encode(x, format, rules)[0],
                    nf.encode(x, format, overflow=overflow, nan="max"),
                )
                if has_values(format) and x.dtype is not torch.bfloat16:
                    same(
                        f"cast {what}",
                        triton_codec.cast(x, format, rules)[0],
                        nf.cast(x, format, overflow=overflow, nan="max"),
                    )
        if format.bits == 8 and has_values(format):
            codes = torch.arange(256, dtype=torch.uint8)
            same(f"decode {name}", triton_codec.decode(codes, format), nf.decode(codes, format, dtype="float32"))
    lost = torch.tensor([1.0, 2.0, float("nan"), float("nan")])
    e2m1 = FLOATS["e2m1"]
    assert isinstance(e2m1, Format)
    if triton_codec.encode(lost, e2m1, Rules.of(e2m1))[1] != 2:
        wrong.append("the place of a NaN")


def rows_of(block, dtype, finite, rng):
    normal = rng.standard_normal((24, block))
    scaled = rng.uniform(-1, 1, (60, block)) * np.ldexp(1.0, rng.integers(-149, 127, (60, 1)))
    plain = rng.integers(-8, 9, (20, block)) * np.ldexp(0.25, rng.integers(-30, 30, (20, 1)))
    special = np.zeros((8, block))
    special[1], special[2, 3], special[3, 0] = -0.0, 1e-45, -1e-40
    if not finite:
        special[4:, :2] = [[np.nan, 1], [2, np.inf], [-np.inf, 1], [3e38, 1]]
    with np.errstate(over="ignore"):
        rows = torch.from_numpy(np.concatenate([normal, scaled, plain, special]).astype(np.float32)).to(dtype)
    return torch.where(rows.isfinite(), rows, 0) if finite else rows


def quantised(name, x, **options):
    wanted = nf.quantize(x, name, **options)
    what, layout = f"{name} {options} from {x.dtype}", wanted.rows
    if not triton_quantize.takes(x, wanted.scheme, layout):
        wrong.append(f"{what}: no kernel")
        return
    packed, scales, tensor_scale, broken = triton_quantize.quantize(x, wanted.scheme, layout)
    same(f"codes of {what}", packed, wanted.packed)
    same(f"scales of {what}", scales + 0 if scales.is_floating_point() else scales, wanted.stored_scales + 0)
    if tensor_scale != wanted.tensor_scale or broken != -1:
        wrong.append(f"{what}: tensor scale {tensor_scale}, broken {broken}")
    for dtype in ("float32", "float16"):
        assert triton_dequantize.gives(packed, scales, wanted.scheme, layout, dtype)
        found = triton_dequantize.dequantize(packed, scales, wanted.scheme, layout, tensor_scale, dtype)
        same(f"values of {what} in {dtype}", found + 0, wanted.dequantize(dtype) + 0)


def blocks(rng):
    for name in ("mxfp4", "mxfp8_e5m2", "mxfp6_e2m3", "mxint8"):
        for rule in ("floor", "ceil", "even", "round_up"):
            quantised(name, rows_of(32, torch.float32, False, rng), scale_rule=rule)
    for dtype in DTYPES:
        quantised("nvfp4", rows_of(16, dtype, False, rng))
        quantised("mxfp8_e4m3", rows_of(32, dtype, False, rng))
        for name in ("nf4", "nf3", "e4m3fn", "e4m3fnuz", "int8", "int4", "int3"):
            quantised(name, rows_of(64, dtype, True, rng), block=64)
    quantised("nvfp4", torch.zeros(4, 16))
    quantised("nf4", rows_of(1024, torch.float32, True, rng), block=1024)
    for name in ("e4m3fn", "int4", "nf4"):
        x = torch.from_numpy(rng.standard_normal((3, 5000)).astype(np.float32))
        quantised(name, x, granularity=nf.PerChannel(0))
        quantised(name, x, granularity=nf.PerTensor())
    lost = torch.ones(8, 64)
    lost[3, 2], lost[5, 1] = float("nan"), float("inf")
    scheme = nf.Scheme.of("nf4", block=None, axis=-1, granularity=None)
    layout = nf.quantize(torch.ones(8, 64), "nf4").rows
    if triton_quantize.quantize(lost, scheme, layout)[3] != 3:
        wrong.append("the first broken row")


codecs(np.random.default_rng(0))
blocks(np.random.default_rng(1))
print(f"compared {compared} numbers; {len(wrong)} wrong", *wrong, sep="\n")
sys.exit(bool(wrong))
