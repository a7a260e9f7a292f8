"""What one operator of PyTorch's ATen set costs, from the shapes that it was called with.

A rule per operator, as data: what is not here, and is no view or copy, is reported as not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["ALLOCATIONS", "LOOK_UPS", "MOVES", "REDUCTIONS", "VIEWS", "Work", "has_rule", "work_of"]

COMPLEX = 4  # real multiplications in one complex one


class Work(NamedTuple):
    """What an operator computes."""

    macs: int = 0
    bias_adds: int = 0
    other: int = 0  # elementwise operations, normalisation, softmax, comparisons
    sums: int = 0  # that the products are added to: the first product of each is added to nothing


Rule = Callable[[Sequence[Any], dict[str, Any], Any], Work]


def _mm(a: Any, b: Any) -> int:
    return a.shape[0] * a.shape[1] * b.shape[1]


def _bmm(a: Any, b: Any) -> int:
    return a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]


def _addmm(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    return Work(_mm(args[1], args[2]), out.numel() if kwargs.get("beta", 1) else 0, sums=out.numel())


def _baddbmm(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    return Work(_bmm(args[1], args[2]), out.numel() if kwargs.get("beta", 1) else 0, sums=out.numel())


def _convolution(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    x, weight, bias = args[:3]
    transposed = bool(args[6]) if len(args) > 6 else False
    positions = x if transposed else out
    per_position = weight.numel() // weight.shape[0]  # weights that one input (transposed) or output channel has
    return Work(positions.numel() * per_position, 0 if bias is None else out.numel(), sums=out.numel())


def _convolution_backward(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    gradient, x, weight = args[:3]
    transposed, wanted = bool(args[7]), args[10]
    positions = x if transposed else gradient
    forward = positions.numel() * (weight.numel() // weight.shape[0])
    sums = x.numel() * bool(wanted[0]) + weight.numel() * bool(wanted[1])
    return Work(forward * (bool(wanted[0]) + bool(wanted[1])), gradient.numel() if wanted[2] else 0, sums=sums)


def _attention(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    query, key, value = args[:3]  # query: [..., heads, tokens, width]
    pairs = query.numel() // query.shape[-1] * key.shape[-2]
    result = query.numel() // query.shape[-1] * value.shape[-1]
    return Work(pairs * (query.shape[-1] + value.shape[-1]), 0, 5 * pairs, pairs + result)


def _attention_backward(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    query, key, value = args[1:4]
    pairs = query.numel() // query.shape[-1] * key.shape[-2]
    # Scores again, and the gradients of values, probabilities, queries and keys.
    sums = 2 * pairs + query.numel() + key.numel() + value.numel()
    return Work(pairs * (3 * query.shape[-1] + 2 * value.shape[-1]), 0, 8 * pairs, sums)


def _grouped_mm(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    a, b = args[:2]
    if a.dim() == 2 and b.dim() == 2:  # the groups cut the inner axis
        return Work(a.shape[0] * a.shape[1] * b.shape[1], sums=out.numel())
    return Work(out.numel() * a.shape[-1], sums=out.numel())


def _fourier(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    """Return ``5 n log2 n`` operations for each transform of ``n`` complex numbers, half for real ones.

    Source: the convention of FFTW's benchmarks (Frigo and Johnson 2005, section 2).
    """
    length = math.prod(max(args[0].shape[axis], out.shape[axis]) for axis in args[1])
    return Work(0, 0, round(2.5 * out.numel() * math.log2(length)))  # twice that if the result is complex


def _trilinear(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    """Return the two products that ``torch.bilinear`` and its gradients consist of: two operands first, then the third.

    Args:
        args: Three tensors, the axes along which each is repeated, and the axes that are summed.
        kwargs: None.
        out: The result.
    """
    tensors, repeated, summed = args[:3], [set(axes) for axes in args[3:6]], set(args[6])
    sizes: dict[int, int] = {}
    axes_of: list[set[int]] = []
    for tensor, missing in zip(tensors, repeated, strict=True):
        shape = iter(tensor.shape)
        own = {axis: next(shape) for axis in range(tensor.dim() + len(missing)) if axis not in missing}
        sizes |= own
        axes_of.append(set(own))
    pair = axes_of[0] | axes_of[1]
    left = pair - (summed - axes_of[2])
    first, second = (math.prod(sizes[axis] for axis in axes) for axes in (pair, left | axes_of[2]))
    return Work(first + second, sums=math.prod(sizes[axis] for axis in left) + out.numel())


def _deformed(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    """Return a convolution whose inputs are interpolated from four neighbours each, and scaled by a mask if there is one."""
    x, weight = args[:2]
    columns = out.numel() // out.shape[1] * x.shape[1] * math.prod(weight.shape[2:])
    macs = out.numel() * math.prod(weight.shape[1:])
    return Work(macs, out.numel(), (7 + bool(args[13])) * columns, out.numel())


def _deformed_backward(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    gradient, x, weight = args[:3]
    columns = gradient.numel() // gradient.shape[1] * x.shape[1] * math.prod(weight.shape[2:])
    macs = 2 * gradient.numel() * math.prod(weight.shape[1:])
    # Gradients of four neighbours, of two offsets and of the mask.
    return Work(macs, gradient.numel(), (7 + 2 * 7 + bool(args[14])) * columns, columns + weight.numel())


def _euclidean(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    """Return the product of ``[-2x, |x|^2, 1]`` with ``[y, 1, |y|^2]``, the norms, and the roots."""
    norms = 3 * args[0].numel() + 2 * args[1].numel()
    return Work(out.numel() * (args[0].shape[-1] + 2), 0, norms + 2 * out.numel(), out.numel())


def _triangular(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    """Return substitution: each unknown is a sum over those before it, and a quotient unless the diagonal is of ones.

    Source: Golub and Van Loan, Matrix Computations, section 3.1.
    """
    terms = out.numel() * (args[0].shape[-1] - 1) // 2
    return Work(terms, 0, 0 if kwargs.get("unitriangular") else out.numel(), out.numel())


def _distances(operations: int) -> Rule:
    """Return the rule of distances pair by pair: operations for each number of a pair, and one for each pair."""

    def rule(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
        pairs = max(out.numel() // (args[0].shape[-1] if operations > 3 else 1), 1)
        return Work(0, 0, pairs * (operations * args[0].shape[-1] + 1))

    return rule


def _linear_dynamic(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    """Return a product with packed INT8 weights; its input is quantised for it and its result scaled."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    x, packed = args[:2]
    with unset_fake_temporarily():
        bias = packed.unpack()[1] is not None
    return Work(out.numel() * x.shape[-1], out.numel() * bias, 4 * x.numel() + 2 * out.numel(), out.numel())


def _each(operations: int) -> Rule:
    def rule(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
        return Work(0, 0, operations * _first(out).numel())

    return rule


def _each_input(operations: int) -> Rule:
    def rule(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
        return Work(0, 0, operations * args[0].numel())

    return rule


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple | list) else out


_BY_HAND: dict[str, Rule] = {
    "mm": lambda args, kwargs, out: Work(_mm(args[0], args[1]), sums=out.numel()),
    "addmm": _addmm,
    "bmm": lambda args, kwargs, out: Work(_bmm(args[0], args[1]), sums=out.numel()),
    "baddbmm": _baddbmm,
    "addbmm": lambda args, kwargs, out: Work(_bmm(args[1], args[2]), out.numel(), sums=out.numel()),
    "mv": lambda args, kwargs, out: Work(args[0].numel(), sums=out.numel()),
    "dot": lambda args, kwargs, out: Work(args[0].numel(), sums=out.numel()),
    "vdot": lambda args, kwargs, out: Work(args[0].numel(), sums=out.numel()),
    "addmv": lambda args, kwargs, out: Work(args[1].numel(), out.numel(), sums=out.numel()),
    "_int_mm": lambda args, kwargs, out: Work(_mm(args[0], args[1]), sums=out.numel()),
    "_scaled_mm": lambda args, kwargs, out: Work(_mm(args[0], args[1]), sums=out.numel()),
    "_grouped_mm": _grouped_mm,
    "_scaled_grouped_mm": _grouped_mm,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "_trilinear": _trilinear,
    "deform_conv2d": _deformed,
    "_deform_conv2d_backward": _deformed_backward,
    "linear_dynamic": _linear_dynamic,
    "_euclidean_dist": _euclidean,
    "linalg_solve_triangular": _triangular,
    "_cdist_forward": _distances(3),
    "_pdist_forward": _distances(3),
    "flex_attention": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_flash_attention_backward": _attention_backward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_efficient_attention_backward": _attention_backward,
    "_scaled_dot_product_cudnn_attention_backward": _attention_backward,
    # Normalisation: mean, variance, and scaling, in operations per element; folded statistics cost a scale and a shift.
    "native_batch_norm": lambda args, kwargs, out: _each(8 if args[5] else 2)(args, kwargs, out),
    "_native_batch_norm_legit_no_training": _each(2),
    "_native_batch_norm_legit": _each(8),
    "native_batch_norm_backward": _each(10),
    "native_layer_norm": _each(8),
    "native_layer_norm_backward": _each(12),
    "native_group_norm": _each(8),
    "native_group_norm_backward": _each(12),
    "_fused_rms_norm": _each(5),
    "_fused_rms_norm_backward": _each(9),
    # Softmax: largest, difference, exponential, sum, quotient.
    "_softmax": _each(5),
    "_safe_softmax": _each(5),
    "_log_softmax": _each(5),
    "_softmax_backward_data": _each(4),
    "_log_softmax_backward_data": _each(4),
    # Interpolation: each result is a weighted sum of 2, 4, 8 or 16 numbers; the weights are left out.
    "upsample_linear1d": _each(3),
    "upsample_bilinear2d": _each(7),
    "_upsample_bilinear2d_aa": _each(7),
    "upsample_trilinear3d": _each(15),
    "upsample_bicubic2d": _each(31),
    "_upsample_bicubic2d_aa": _each(31),
    "grid_sampler_2d": _each(7),
    "_fft_c2c": _fourier,
    "_fft_r2c": _fourier,
    "_fft_c2r": _fourier,
    "addcmul": _each(3),
    "addcdiv": _each(3),
    "lerp": _each(3),
}

# One operation for each element of the result.
_ELEMENTWISE = """
add sub rsub mul div neg abs sign reciprocal sqrt rsqrt exp exp2 expm1 log log2 log1p log10 sin cos tan asin acos atan
sinh cosh tanh sigmoid relu relu6 leaky_relu elu celu selu gelu silu mish softplus hardtanh hardsigmoid hardswish
clamp clamp_min clamp_max pow square floor ceil round trunc remainder fmod maximum minimum fmax fmin where eq ne lt le
gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor erf erfc erfinv
isnan isinf isfinite floor_divide atan2 threshold prelu _prelu_kernel native_dropout bernoulli_ masked_fill
gelu_backward silu_backward tanh_backward sigmoid_backward threshold_backward hardswish_backward hardtanh_backward
hardsigmoid_backward leaky_relu_backward elu_backward softplus_backward mish_backward log_sigmoid_forward
log_sigmoid_backward glu glu_backward frac sgn angle nan_to_num logit digamma lgamma polygamma heaviside copysign
hypot special_erfcx i0 sinc tril triu complex polar
""".split()  # noqa: SIM905

# One operation for each element that is read.
REDUCTIONS = """
sum mean max min amax amin prod var var_mean std norm linalg_vector_norm cumsum cumprod argmax argmin logsumexp any
all max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
adaptive_max_pool2d count_nonzero median topk sort nll_loss_forward nll_loss2d_forward mse_loss binary_cross_entropy
smooth_l1_loss huber_loss avg_pool2d_backward max_pool2d_with_indices_backward _adaptive_avg_pool2d_backward
nll_loss_backward mse_loss_backward histc bincount aminmax cummax cummin logcumsumexp
""".split()  # noqa: SIM905

# Operators that move numbers and compute nothing.
MOVES = frozenset(
    """
copy_ _to_copy clone contiguous cat stack index index_put index_put_ _unsafe_index gather scatter scatter_ scatter_add
scatter_add_ index_select index_add index_add_ index_copy index_fill masked_select masked_scatter embedding
embedding_dense_backward constant_pad_nd reflection_pad1d reflection_pad2d replication_pad2d roll flip repeat
repeat_interleave fill fill_ zero_ zeros ones full empty empty_like zeros_like ones_like full_like rand_like randn_like
rand randn randint randperm arange linspace logspace eye scalar_tensor _local_scalar_dense lift_fresh_copy lift_fresh
new_zeros new_ones new_full new_empty new_empty_strided empty_strided normal_ uniform_ upsample_nearest1d
upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d pixel_shuffle pixel_unshuffle im2col col2im nonzero
unique_consecutive _unique2 tril_indices triu_indices select_backward slice_backward select_scatter slice_scatter
diagonal_scatter as_strided_scatter _assert_async _assert_scalar sym_size sym_numel sym_stride is_same_size equal
resize_ set_ record_stream one_hot channel_shuffle native_channel_shuffle detach_ alias _reshape_copy squeeze_copy
view_copy
""".split()  # noqa: SIM905
)

#: Operators that make room for numbers and touch none.
ALLOCATIONS = frozenset(["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"])

#: Operators that read as many numbers of a table as they write, however large it is.
LOOK_UPS = frozenset(["embedding", "gather", "index", "index_select", "_unsafe_index"])

# Views that their schema does not call so.
VIEWS = frozenset(
    [
        "_unsafe_view",
        "unsafe_split",
        "unsafe_split_with_sizes",
        "unsafe_chunk",
        "lift_fresh",
        "_reshape_alias",
        "as_strided_",
        "squeeze_",
        "swapaxes_",
        "t_",
        "transpose_",
        "unsqueeze_",
    ]
)

_RULES = _BY_HAND | dict.fromkeys(_ELEMENTWISE, _each(1)) | dict.fromkeys(REDUCTIONS, _each_input(1))


def has_rule(name: str) -> bool:
    """Return whether an operator of this ATen name is counted as one."""
    return name in MOVES or name in VIEWS or name in _RULES or name.removesuffix("_") in _RULES


def work_of(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work | None:
    """Return what an operator computes.

    Args:
        name: Its ATen name without overload, such as ``convolution``.
        args: What it was called with.
        kwargs: Likewise.
        out: What it returned.

    Returns:
        Its work; None if there is no rule for it.
    """
    if name in MOVES:
        return Work()
    rule = _RULES.get(name) or (_RULES.get(name[:-1]) if name.endswith("_") else None)
    if rule is None:
        return None
    work = rule(args, kwargs, out)
    result = _first(out)
    if getattr(result, "is_complex", bool)():
        return Work(COMPLEX * work.macs, 2 * work.bias_adds, 2 * work.other, 2 * work.sums)
    return work
