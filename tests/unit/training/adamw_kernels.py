"""Hold the AdamW kernels to the reference, which runs on the CPU; exits 1 if any number differs.

The kernels run on the device that is given, or in Triton's interpreter on tensors in main memory.
"""

from __future__ import annotations

import sys
from itertools import product

import torch

from narrowcast.training import adamw_reference, triton_adamw
from narrowcast.training.adamw_reference import Group, Member

NORM_BOUND = 2e-6  # relative: float32 sums in another order
DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
SHAPES = [(3,), (7, 333), (33, 3), (8, 4, 3, 3)] if DEVICE == "cpu" else [(3,), (999, 333), (333, 77), (512, 256, 3, 3)]
wrong = []
compared = 0


def same(what, found, wanted):
    global compared
    found = found.cpu()
    compared += found.numel()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    differ = (adamw_reference.flat(found).view(kind) != adamw_reference.flat(wanted).view(kind)).sum()
    if differ or found.shape != wanted.shape:
        wrong.append(f"{what}: {int(differ)} of {found.numel()} differ")


def close(what, found, wanted):
    global compared
    found = found.cpu()
    compared += found.numel()
    if not torch.allclose(found.float(), wanted.float(), rtol=1e-5, atol=1e-7, equal_nan=True):
        wrong.append(f"{what}: {(found.float() - wanted.float()).abs().max():.3g} apart")


def tensors(shape, dtype, random, offset=0):
    room = torch.randn(offset + torch.Size(shape).numel(), generator=random).to(dtype)
    return room[offset:].view(shape)


def member(index, shape, parameter, gradient, kahan, random, offset=0):
    first = tensors(shape, torch.float32, random, offset) * 0.1
    made = Member(
        index,
        tensors(shape, parameter, random, offset),
        tensors(shape, gradient, random, offset) * 100,
        first,
        first.square() + 0.01,
        tensors(shape, parameter, random) * 1e-4 if kahan and parameter is torch.bfloat16 else None,
    )
    if len(shape) == 4:
        laid = [x.to(memory_format=torch.channels_last) if isinstance(x, torch.Tensor) else x for x in made]
        made = Member(*laid)
    return made


def groups_of(parameter, gradient, rounding, random):
    """Return two groups: a short tensor, one of several chunks, an unaligned one, and one in another order."""
    kahan = rounding == "kahan"
    pick = (parameter, gradient, kahan, random)
    short, long, odd, image = SHAPES
    own = [member(0, short, *pick), member(1, long, *pick), member(3, odd, *pick, 1)]
    other = [member(5, image, *pick), member(6, (5,), torch.float32, torch.float32, kahan, random)]
    choice = {"stochastic": rounding == "stochastic", "seed": 77 << 32 | 5}
    return [
        Group(1e-2, (0.9, 0.95), 1e-8, 0.1, **choice, members=own),
        Group(3e-3, (0.0, 0.999), 1e-6, 0.0, **choice, members=other),
    ]


def copied(groups, device):
    def copy(x):
        if not isinstance(x, torch.Tensor):
            return x
        room = torch.empty(x.storage_offset() + x.numel(), dtype=x.dtype, device=device)  # as far off 16 bytes as x
        return room.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)

    return [group._replace(members=[Member(*map(copy, one)) for one in group.members]) for group in groups]


def counts(verdict):
    """Return the broken elements of each member that has any."""
    found = {}
    for member, count in zip(verdict.members.tolist(), verdict.broken.tolist(), strict=True):
        if count:
            found[member] = found.get(member, 0) + count
    return found


def compare(what, groups, clip_norm, zero, broken, kernels):
    theirs, groups = copied(groups, "cpu"), copied(groups, DEVICE)
    their_steps, inverse = torch.full((5,), 3.0), torch.tensor(1 / 1024)
    steps, there = their_steps.to(DEVICE, copy=True), inverse.to(DEVICE)
    for turn in range(2):
        if turn == 1:  # a gradient of another address; the old one would be noticed
            moved = groups[0].members[1]
            groups[0].members[1] = moved._replace(gradient=moved.gradient.clone())
            moved.gradient.fill_(torch.nan)
        if broken is not None and turn == 1:
            for one in (groups, theirs):
                adamw_reference.flat(one[0].members[1].gradient)[2000] = broken
                adamw_reference.flat(one[0].members[1].gradient)[5:8] = broken  # in another chunk
                adamw_reference.flat(one[1].members[0].gradient)[-1] = torch.nan
        found = kernels.update(groups, steps, there, clip_norm, zero=zero)
        wanted = adamw_reference.update(theirs, their_steps, inverse, clip_norm, zero=zero)
        (norm, finite), (wanted_norm, wanted_finite) = found[:2], wanted[:2]
        if counts(found) != counts(wanted) or bool(counts(found)) == bool(finite):
            wrong.append(f"{what}: broken {counts(found)}, not {counts(wanted)}")
        if finite.item() != wanted_finite.item() or finite.item() != (broken is None or turn == 0):
            wrong.append(f"{what}: finite {finite}, not {wanted_finite}")
        if finite and abs(norm.item() - wanted_norm) > NORM_BOUND * wanted_norm:
            wrong.append(f"{what}: norm {norm}, not {wanted_norm}")
        same(f"steps of {what}", steps, their_steps)
        check = same if clip_norm is None or clip_norm > wanted_norm else close
        for one, other in zip(groups, theirs, strict=True):
            for mine, its in zip(one.members, other.members, strict=True):
                for name, found, wanted in zip(Member._fields[1:], mine[1:], its[1:], strict=True):
                    if found is not None and (check is same or found.dtype is torch.float32):
                        check(f"{name} {mine.number} of {what}, round {turn}", found, wanted)
        if zero and any(x.gradient.count_nonzero() for one in groups for x in one.members):
            wrong.append(f"{what}: gradients left")


if DEVICE == "cpu":
    triton_adamw._CHUNK, triton_adamw._TILE = 1024, 256
random = torch.Generator().manual_seed(0)
kinds = list(product((torch.float32,), (torch.float32, torch.float16, torch.bfloat16), ("nearest",)))
kinds += list(product((torch.bfloat16,), (torch.bfloat16, torch.float32), ("nearest", "stochastic", "kahan")))
for parameter, gradient, rounding in kinds:
    kernels = triton_adamw.Kernels()
    for clip_norm, zero, broken in ((None, True, None), (0.5, False, None)):
        groups = groups_of(parameter, gradient, rounding, random)
        what = f"{parameter} with {gradient}, {rounding}, clip {clip_norm}"
        compare(what, groups, clip_norm, zero, broken, kernels)
for broken, zero in product((float("inf"), float("nan"), -float("inf")), (False, True)):
    groups = groups_of(torch.float32, torch.float32, "nearest", random)
    compare(f"{broken} in a gradient", groups, 1.0, zero, broken, triton_adamw.Kernels())
print(f"compared {compared} numbers; {len(wrong)} wrong", *wrong[:40], sep="\n")
sys.exit(bool(wrong))
