from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from narrowcast.models.graph import make_node
from narrowcast.transforms.rounding import (
    Moments,
    WeightLayout,
    channel_scales,
    patches,
    quantise_weight,
    reconstruct,
)

Array = NDArray[Any]
RNG = np.random.default_rng(0)


# Layouts --------------------------------------------------------------------------------------------------------------

LAYOUTS = [
    ("Conv", (8, 3, 3, 3), {}),
    ("Conv", (8, 2, 3, 3), {"group": 4}),
    ("Conv", (6, 1, 5, 3), {"group": 6}),
    ("Conv", (8, 4, 7), {}),
    ("MatMul", (12, 7), {}),
    ("Gemm", (12, 7), {}),
    ("Gemm", (7, 12), {"transB": 1}),
]


@pytest.mark.parametrize(("op", "shape", "attributes"), LAYOUTS)
def test_a_weight_seen_as_a_matrix_comes_back_the_same(op: str, shape: tuple[int, ...], attributes: Any) -> None:
    weight = RNG.normal(size=shape)
    layout = WeightLayout.of(make_node(op, ["x", "w"], ["y"], "n", **attributes), weight)
    matrix = layout.to_matrix(weight)
    assert matrix.ndim == 3
    assert matrix.size == weight.size
    np.testing.assert_array_equal(layout.from_matrix(matrix), weight)
    assert matrix.shape[0] * matrix.shape[1] == shape[layout.axis]


@pytest.mark.parametrize(("op", "shape", "attributes"), LAYOUTS)
def test_rows_of_the_matrix_are_the_output_channels_in_order(op: str, shape: tuple[int, ...], attributes: Any) -> None:
    layout = WeightLayout.of(make_node(op, ["x", "w"], ["y"], "n", **attributes), np.zeros(shape))
    channel = np.arange(shape[layout.axis])
    view = [1] * len(shape)
    view[layout.axis] = -1
    matrix = layout.to_matrix(np.broadcast_to(channel.reshape(view), shape))
    np.testing.assert_array_equal(matrix.reshape(len(channel), -1), np.repeat(channel[:, None], matrix.shape[2], 1))


# Patches --------------------------------------------------------------------------------------------------------------


def naive_patches(x: Array, kernel: Any, strides: Any, dilations: Any, pads: Any, groups: int) -> Array:
    """Element by element, ``[G, N * P, K]``."""
    rank = len(kernel)
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    out = [(x.shape[2 + a] - (kernel[a] - 1) * dilations[a] - 1) // strides[a] + 1 for a in range(rank)]
    per_group = x.shape[1] // groups
    rows = []
    for g in range(groups):
        for n in range(x.shape[0]):
            for place in np.ndindex(*out):
                row = []
                for c in range(g * per_group, (g + 1) * per_group):
                    for tap in np.ndindex(*kernel):
                        at = tuple(place[a] * strides[a] + tap[a] * dilations[a] for a in range(rank))
                        row.append(x[(n, c, *at)])
                rows.append(row)
    return np.array(rows, np.float32).reshape(groups, -1, per_group * int(np.prod(kernel)))


def conv_output(node: NodeProto, x: Array, weight: Array) -> Array:
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "w")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ReferenceEvaluator(model).run(None, {"x": x, "w": weight})[0]


@settings(deadline=None, max_examples=60)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    groups=st.sampled_from([1, 2, 4]),
)
def test_patches_are_what_each_output_position_sees(
    kernel: Any, strides: Any, dilations: Any, pads: Any, groups: int
) -> None:
    x = np.random.default_rng(1).normal(size=(2, 4, 6, 7)).astype(np.float32)
    weight = np.random.default_rng(2).normal(size=(8, 4 // groups, *kernel)).astype(np.float32)
    settings_of = {"strides": strides, "dilations": dilations, "pads": pads, "group": groups, "kernel_shape": kernel}
    node = make_node("Conv", ["x", "w"], ["y"], "conv", **settings_of)
    layout = WeightLayout.of(node, weight)
    seen = patches(node, layout, x)
    np.testing.assert_array_equal(seen, naive_patches(x, kernel, strides, dilations, pads, groups))
    output = seen @ layout.to_matrix(weight).transpose(0, 2, 1)  # [G, N * P, O]
    expected = conv_output(node, x, weight)
    flat = expected.reshape(2, groups, 8 // groups, -1).transpose(1, 0, 3, 2).reshape(groups, -1, 8 // groups)
    np.testing.assert_allclose(output, flat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3])
def test_automatic_padding_gives_the_patches_of_that_padding(mode: str, stride: int, kernel: int) -> None:
    x = RNG.normal(size=(2, 3, 7, 8)).astype(np.float32)
    weight = RNG.normal(size=(4, 3, kernel, kernel)).astype(np.float32)
    node = make_node("Conv", ["x", "w"], ["y"], "conv", auto_pad=mode, strides=[stride] * 2, kernel_shape=[kernel] * 2)
    layout = WeightLayout.of(node, weight)
    expected = onnxruntime_conv(node, x, weight)
    output = patches(node, layout, x) @ layout.to_matrix(weight).transpose(0, 2, 1)
    np.testing.assert_allclose(output[0], expected.transpose(0, 2, 3, 1).reshape(-1, 4), rtol=1e-4, atol=1e-4)


def onnxruntime_conv(node: NodeProto, x: Array, weight: Array) -> Array:
    """ONNX's own reference pads SAME_LOWER differently from its specification, so the runtime is the judge here."""
    import onnxruntime as ort

    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in (("x", x), ("w", weight))]
    graph = helper.make_graph([node], "g", infos, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x, "w": weight})[0])


def test_patches_of_a_large_picture_are_a_spread_of_the_positions() -> None:
    x = RNG.normal(size=(3, 2, 150, 150)).astype(np.float32)
    node = make_node("Conv", ["x", "w"], ["y"], "conv", kernel_shape=[1, 1])
    seen = patches(node, WeightLayout.of(node, np.zeros((4, 2, 1, 1))), x)
    assert seen.shape[1] < 3 * 150 * 150 / 4
    per_sample = seen.reshape(3, -1, 2)
    positions = x.transpose(0, 2, 3, 1).reshape(3, -1, 2)
    where = [np.flatnonzero((positions[0] == row).all(1))[0] for row in per_sample[0]]
    np.testing.assert_array_equal(per_sample, positions[:, where])
    assert max(where) > 0.9 * 150 * 150
    assert min(where) < 0.1 * 150 * 150


def test_patches_of_a_matrix_product_are_its_rows() -> None:
    x = RNG.normal(size=(3, 5, 8)).astype(np.float32)
    node = make_node("MatMul", ["x", "w"], ["y"], "product")
    seen = patches(node, WeightLayout.of(node, np.zeros((8, 4))), x)
    np.testing.assert_array_equal(seen[0], x.reshape(-1, 8))


# Scales and codes -----------------------------------------------------------------------------------------------------


def output_error(matrix: Array, codes: Array, scale: Array, exact: Array, quantised: Array) -> float:
    wanted = exact @ matrix.transpose(0, 2, 1)
    got = quantised @ (codes * scale).transpose(0, 2, 1)
    gap = got - wanted
    return float(((gap - gap.mean(1, keepdims=True)) ** 2).mean())  # the mean is bias correction's business


def test_nearest_codes_err_by_half_a_step_at_the_most() -> None:
    matrix = RNG.normal(size=(2, 5, 30))
    scale = np.abs(matrix).max(-1, keepdims=True) / 127
    codes = quantise_weight(matrix, scale)
    assert codes.dtype == np.int8
    assert np.abs(codes).max() == 127
    assert (np.abs(codes * scale - matrix) <= scale * 0.5001).all()


def test_scales_are_at_least_as_good_as_those_of_the_largest_weight() -> None:
    matrix = np.random.default_rng(6).normal(size=(1, 4, 20_000))
    plain = np.abs(matrix).max(-1, keepdims=True) / 127
    found = channel_scales(matrix)
    assert found.shape == (1, 4, 1)
    assert found.dtype == np.float32

    def error(scale: Array) -> Array:
        return ((quantise_weight(matrix, scale) * scale - matrix) ** 2).sum(-1)

    assert (error(found) <= error(plain) * (1 + 1e-3)).all()
    assert error(found).sum() < 0.97 * error(plain).sum()


def test_a_channel_of_zeros_gets_a_scale_that_can_be_divided_by() -> None:
    matrix = np.zeros((1, 3, 8))
    matrix[0, 1] = RNG.normal(size=8)
    scale = channel_scales(matrix)
    assert (scale > 0).all()
    assert (quantise_weight(matrix, scale)[0, [0, 2]] == 0).all()
    inputs = RNG.normal(size=(1, 100, 8)).astype(np.float32)
    codes, found = reconstruct(matrix, Moments.of(inputs, inputs))
    assert (codes[0, [0, 2]] == 0).all()
    assert np.isfinite(found).all()


def correlated(groups: int, positions: int, inputs: int, rank: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(groups, rank, inputs))
    hidden = np.maximum(np.random.default_rng(seed + 1).normal(size=(groups, positions, rank)), 0)
    noise = 0.1 * rng.normal(size=(groups, positions, inputs))
    return (hidden @ mix + noise).astype(np.float32)


@pytest.mark.parametrize(
    ("groups", "outputs", "inputs"), [(1, 16, 27), (12, 1, 9), (2, 8, 49), (1, 16, 96), (1, 8, 200)]
)
def test_reconstruction_beats_nearest_rounding_in_output_error(groups: int, outputs: int, inputs: int) -> None:
    matrix = np.random.default_rng(4).normal(size=(groups, outputs, inputs))
    samples = correlated(groups, 6000, inputs, max(2, inputs // 6))
    fit, held_out = samples[:, :4000], samples[:, 4000:]
    codes, scale = reconstruct(matrix, Moments.of(fit, fit))
    assert codes.dtype == np.int8
    assert codes.shape == matrix.shape
    assert np.abs(codes).max() <= 127
    assert scale.shape == (groups, outputs, 1)
    assert scale.dtype == np.float32
    plain = channel_scales(matrix)
    nearest = output_error(matrix, quantise_weight(matrix, plain), plain, held_out, held_out)
    assert output_error(matrix, codes, scale, held_out, held_out) < 0.6 * nearest


def test_reconstruction_makes_up_for_the_error_that_inputs_arrive_with() -> None:
    matrix = np.random.default_rng(4).normal(size=(1, 16, 64))
    exact = correlated(1, 8000, 64, 10)
    step = 0.5
    quantised = (np.rint(exact / step) * step).astype(np.float32)
    quantised[..., :8] *= 0.8  # an error that the other inputs can make up for
    fit, held_out = slice(0, 6000), slice(6000, None)
    codes, scale = reconstruct(matrix, Moments.of(exact[:, fit], quantised[:, fit]))
    blind, blind_scale = reconstruct(matrix, Moments.of(exact[:, fit], exact[:, fit]))
    aware = output_error(matrix, codes, scale, exact[:, held_out], quantised[:, held_out])
    assert aware < 0.9 * output_error(matrix, blind, blind_scale, exact[:, held_out], quantised[:, held_out])


def test_uncorrelated_inputs_leave_nothing_to_gain_and_nothing_is_lost() -> None:
    matrix = np.random.default_rng(4).normal(size=(1, 16, 60))
    samples = np.random.default_rng(5).normal(size=(1, 20_000, 60)).astype(np.float32)
    codes, scale = reconstruct(matrix, Moments.of(samples, samples))
    plain = channel_scales(matrix)
    nearest = output_error(matrix, quantise_weight(matrix, plain), plain, samples, samples)
    assert output_error(matrix, codes, scale, samples, samples) < 1.1 * nearest


def test_inputs_that_never_vary_do_not_break_reconstruction() -> None:
    matrix = np.random.default_rng(4).normal(size=(2, 4, 9))
    inputs = np.zeros((2, 50, 9), np.float32)
    inputs[..., 3] = 7.0
    codes, scale = reconstruct(matrix, Moments.of(inputs, inputs))
    assert np.isfinite(scale).all()
    np.testing.assert_allclose(codes * scale, matrix, atol=float(scale.max()))


def test_moments_are_those_of_numpy() -> None:
    exact = correlated(2, 500, 6, 3)
    quantised = np.round(exact * 4) / 4
    found = Moments.of(exact, quantised)
    assert found.count == 500
    for g in range(2):
        np.testing.assert_allclose(found.covariance[g], np.cov(quantised[g].T, bias=True), rtol=1e-3, atol=1e-4)
        both = np.cov((exact - quantised)[g].T, quantised[g].T, bias=True)
        np.testing.assert_allclose(found.shift[g], both[:6, 6:], rtol=1e-2, atol=1e-4)
