"""The backend's hidden workspace: what libraries allocate for themselves, which no operator's result shows.

Two sorts: what a library keeps from its first call on (cuBLAS), and what a kernel allocates and frees within one call. And
results that are opaque: what oneDNN's recurrent layers keep for backward has no size in PyTorch's shape rules.

The rules for oneDNN follow what PyTorch's profiler sees of its calls on a CPU with AVX-512: it copies what it reads and writes
into its own layouts, in which channels come in blocks of 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = ["Backend", "backend", "eight_bit_products"]

MIB = 1 << 20
_BLOCK = 16  # channels
_FEW_CHANNELS = 4  # that oneDNN reads without copying
_SMALL = 20480  # elements
_LARGE_KERNEL = 5  # from which on gradients of depthwise weights are first summed apart
_REDUCTIONS = 256  # so many sums of each
_WIDE = 256  # numbers in a row
_PADDING = 16  # numbers


@dataclass(frozen=True)
class Backend:
    """How one sort of device allocates.

    Args:
        device: Its type, ``cpu`` or ``cuda``.
        granularity: Bytes that its allocator rounds up to.
        foreach: Whether optimizers go over lists of tensors by default.
        kept: Bytes that libraries keep from their first call on, for each thread that calls them.
        hidden: Bytes that a kernel allocates for itself, from the operator's name, arguments and result.
        opaque: Results whose storages are larger than their shapes say, and their bytes, from the same.
    """

    device: str
    granularity: int
    foreach: bool
    kept: int
    hidden: Callable[[str, Sequence[Any], Any], int]
    opaque: Callable[[str, Sequence[Any], Any], Iterator[tuple[torch.Tensor, int]]]


def backend(device: str, capability: tuple[int, int] = (8, 0)) -> Backend:
    """Return how a device allocates.

    The caching allocator of CUDA rounds to 512 bytes (``kMinBlockSize`` of CUDACachingAllocator). cuBLAS gets a workspace
    of 2 x 4 MiB + 8 x 16 KiB, and of 32 MiB from Hopper on, for each thread and stream (``parseChosenWorkspaceSize`` of
    CublasHandlePool.cpp); cuBLASLt shares it.

    Args:
        device: ``cpu`` or ``cuda``.
        capability: CUDA's compute capability, which the size of cuBLAS's workspace depends on.
    """
    if device == "cpu":
        return Backend("cpu", 1, foreach=False, kept=0, hidden=_rule(_HIDDEN_CPU), opaque=_opaque_cpu)
    kept = 32 * MIB if capability[0] >= 9 else 2 * 4 * MIB + 8 * 16 * 1024
    return Backend("cuda", 512, foreach=True, kept=kept, hidden=_rule(_HIDDEN_CUDA), opaque=_opaque_cuda)


Rule = Callable[[Sequence[Any], Any], int]


def _rule(rules: dict[str, Rule]) -> Callable[[str, Sequence[Any], Any], int]:
    return lambda name, args, out: rules[name](args, out) if name in rules else 0


def eight_bit_products(backend: Backend) -> Backend:
    """Return a backend whose matrix products read 8-bit copies of both operands, made for the call.

    What backward needs is kept as the operands were, as torchao's float8 training does; the copies' scales, one for each
    tensor, are not counted.
    """

    def hidden(name: str, args: Sequence[Any], out: Any) -> int:
        copies = sum(tensor.numel() for tensor in args[-2:]) if name in ("mm", "addmm", "bmm", "baddbmm") else 0
        return copies + backend.hidden(name, args, out)

    return replace(backend, hidden=hidden)


def integer_kernels(backend: Backend) -> Backend:
    """Return a backend whose kernels multiply integers; what they allocate for themselves is not known, and not counted."""
    return replace(backend, kept=0, hidden=lambda name, args, out: 0, opaque=lambda name, args, out: iter(()))


# CPU ------------------------------------------------------------------------------------------------------------------


def _convolution(args: Sequence[Any], out: Any) -> int:
    x, weight = args[:2]
    if _plain_convolution(args):
        return _columns(x, weight, out)
    if _channels_last(x):  # weights are copied with channels last first, but for depthwise ones
        return (1 if _depthwise(x, weight) else 2) * _bytes(weight)
    # Operands are copied; the result is made in oneDNN's layout and copied back.
    return max(_copied(x) + _blocked_weight(weight), _blocked(out))


def _convolution_backward(args: Sequence[Any], out: Any) -> int:
    gradient, x, weight = args[:3]
    if _plain_convolution(args[1:]):
        return _columns(x, weight, gradient)
    if not _channels_last(x):
        return _copied(x) + _blocked(gradient)
    if _depthwise(x, weight):
        return (_REDUCTIONS if min(weight.shape[2:]) >= _LARGE_KERNEL else 1) * _bytes(weight)
    return 3 * _bytes(weight)


def _plain_convolution(args: Sequence[Any]) -> bool:
    """Tell whether a convolution is left to PyTorch's own kernel, by ``ConvParams::use_mkldnn`` of Convolution.cpp."""
    x, weight, _, stride, _, dilation, _, _, groups = args[:9]
    if x.dtype is not torch.float32:
        return False
    pointwise = all(size == 1 for size in weight.shape[2:])
    worth = not pointwise or max(stride) > 1 or max(dilation) > 1 or x.shape[0] >= 16 or torch.get_num_threads() > 1
    large = groups > 1 or x.shape[0] > 1 or x.numel() > _SMALL or all(size > 3 for size in weight.shape[2:])
    return not (worth and large)


def _columns(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> int:
    """Return the bytes of patches as columns, which a pointwise convolution does without."""
    kernel = math.prod(weight.shape[2:])
    return 0 if kernel == 1 else x.shape[0] * x.shape[1] * kernel * math.prod(out.shape[2:]) * x.element_size()


def _copied(x: torch.Tensor) -> int:
    return 0 if x.shape[1] <= _FEW_CHANNELS or _channels_last(x) else _blocked(x)


def _blocked(x: torch.Tensor) -> int:
    return _bytes(x) // x.shape[1] * (-(-x.shape[1] // _BLOCK) * _BLOCK)


def _blocked_weight(weight: torch.Tensor) -> int:
    outputs, inputs, *kernel = (
        -(-size // _BLOCK) * _BLOCK if place < 2 else size for place, size in enumerate(weight.shape)
    )
    return (
        outputs * inputs * math.prod(kernel) * weight.element_size()
        if weight.shape[1] > _FEW_CHANNELS
        else _bytes(weight)
    )


def _depthwise(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return weight.shape[1] == 1 and x.shape[1] > 1


def _channels_last(x: torch.Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _recurrent(args: Sequence[Any], out: Any) -> int:
    x, *weights = args[:3]
    return sum(map(_bytes, weights)) + _gates(x, weights[1])


def _recurrent_backward(args: Sequence[Any], out: Any) -> int:
    x, *weights = args[:3]
    copies = 2 if weights[1].shape[1] >= _WIDE else 1  # of weights, and of their gradients where they are large
    return copies * sum(map(_bytes, weights)) + _gates(x, weights[1])


def _gates(x: torch.Tensor, weight: torch.Tensor) -> int:
    """Return the bytes of all gates of all steps: x ``[T, B, inputs]``, weight ``[gates * hidden, hidden]``."""
    return x.shape[0] * x.shape[1] * weight.shape[0] * 4


def _opaque_cpu(name: str, args: Sequence[Any], out: Any) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield what an LSTM of oneDNN keeps for backward: its gates, states and their gradients, and what gates start from.

    States are those of all steps and one more, below and above the layer; three of five are as wide as the wider of input and
    hidden state. Rows whose length would fall on the same cache sets are 16 numbers longer. Equal to what oneDNN asks for, or
    within 1 %, in layers of 64 to 512.
    """
    if name != "mkldnn_rnn_layer" or not args[-1]:  # not in training
        return
    x, _, weight = args[:3]
    steps, batch, inputs = x.shape
    hidden = weight.shape[1]
    wide = max(inputs, hidden)
    rows = 2 * (steps + 1) * batch
    padded = [_PADDING if width % _WIDE == 0 else 0 for width in (wide, wide, hidden, hidden)]
    start = -(-hidden // _BLOCK) * _BLOCK
    numbers = rows * (3 * wide + 2 * hidden + sum(padded)) + steps * batch * (start + (0 if start % 64 else _PADDING))
    yield out[3], _gates(x, weight) + 4 * numbers


def _encoder_layer(args: Sequence[Any], out: Any) -> int:
    """Return what the fused encoder layer holds at most: projections twice, or them and all scores, or the wide layer."""
    x, _, heads = args[:3]
    wide = args[14].shape[0]
    batch, tokens = x.shape[:2]
    scores = batch * heads * tokens * tokens
    numbers = max(5 * x.numel(), 2 * x.numel() + scores, x.numel() + batch * tokens * wide)
    return numbers * x.element_size()


_HIDDEN_CPU: dict[str, Rule] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "mkldnn_rnn_layer": _recurrent,
    "mkldnn_rnn_layer_backward": _recurrent_backward,
}


# CUDA -----------------------------------------------------------------------------------------------------------------


def _opaque_cuda(name: str, args: Sequence[Any], out: Any) -> Iterator[tuple[torch.Tensor, int]]:
    yield from ()


_HIDDEN_CUDA: dict[str, Rule] = {}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
