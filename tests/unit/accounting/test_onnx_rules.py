"""Every rule of ONNX operators against closed forms, on graphs of one node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from narrowcast.accounting import formulas
from narrowcast.accounting.counting import Work
from narrowcast.accounting.formulas import Cost
from narrowcast.accounting.graphs.einsum import einsum
from narrowcast.accounting.graphs.rules import entry_of
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.profile import Profile, profile
from narrowcast.accounting.sources import GraphSource
from narrowcast.errors import ModelError

MICROSOFT = "com.microsoft"
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]


def one(
    folder: Path,
    operator: str,
    inputs: Mapping[str, Sequence[int]],
    weights: Mapping[str, Any],
    *,
    domain: str = "",
    opset: int = 21,
    order: Sequence[str] = (),
    dtype: int = TensorProto.FLOAT,
    out_dtype: int = TensorProto.FLOAT,
    outputs: int = 1,
    out_shape: Sequence[int] | None = None,
    **attributes: Any,
) -> Profile:
    """Return the profile of a graph of one node; weights are shapes of float32, or arrays."""
    arrays = {n: np.ones(w, np.float32) if isinstance(w, tuple) else w for n, w in weights.items()}
    names = [f"y{place}" for place in range(outputs)]
    node = helper.make_node(operator, list(order) or [*inputs, *weights], names, domain=domain, name="it", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, out_dtype, out_shape) for name in names],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset), OPSETS[1]]
    file = folder / "one.onnx"
    file.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return profile(GraphSource(str(file), file))


def holds(found: Profile, cost: Cost, kind: Kind) -> None:
    assert (found.parameters.total, found.macs, found.bias_adds) == (cost.parameters, cost.macs, cost.bias_adds)
    assert [operator.kind for operator in found.operators] == [kind]
    assert found.operators[0].path == ""
    assert not found.uncounted


PLAIN = formulas.convolution(3, 16, (3, 3), (8, 10), batch=2)


@pytest.mark.parametrize(
    ("image", "kernel", "attributes", "cost", "kind"),
    [
        ((2, 3, 10, 12), (16, 3, 3, 3), {}, PLAIN, Kind.CONVOLUTION),
        (
            (1, 16, 9, 9),
            (32, 4, 3, 3),
            {"group": 4, "strides": [2, 2], "pads": [1] * 4},
            formulas.convolution(16, 32, (3, 3), (5, 5), groups=4),
            Kind.CONVOLUTION,
        ),
        (
            (1, 24, 7, 7),
            (24, 1, 5, 5),
            {"group": 24, "auto_pad": "SAME_UPPER"},
            formulas.convolution(24, 24, (5, 5), (7, 7), groups=24),
            Kind.DEPTHWISE,
        ),
        (
            (1, 8, 40),
            (8, 8, 3),
            {"dilations": [4]},
            formulas.convolution(8, 8, (3,), (formulas.convolution_output(40, 3, dilation=4),)),
            Kind.CONVOLUTION,
        ),
        ((1, 2, 5, 6, 7), (4, 2, 3, 3, 3), {}, formulas.convolution(2, 4, (3, 3, 3), (3, 4, 5)), Kind.CONVOLUTION),
        (
            (1, 3, 11, 11),
            (8, 3, 3, 3),
            {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
            formulas.convolution(3, 8, (3, 3), (6, 6)),
            Kind.CONVOLUTION,
        ),
    ],
)
def test_convolutions(
    tmp_path: Path, image: Any, kernel: Any, attributes: dict[str, Any], cost: Cost, kind: Kind
) -> None:
    found = one(tmp_path, "Conv", {"x": image}, {"w": kernel, "b": (kernel[0],)}, **attributes)
    holds(found, cost, kind)
    seen = found.operators[0].attributes
    assert (seen["kernel"], seen["groups"], seen["transposed"]) == (kernel[2:], attributes.get("group", 1), False)
    assert (seen["inputs"], seen["outputs"]) == (image[1], kernel[0])
    assert found.macs - found.additions + found.bias_adds == found.bias_adds  # one sum for each output


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(tmp_path: Path, groups: int) -> None:
    found = one(
        tmp_path,
        "ConvTranspose",
        {"x": (1, 8, 6, 6)},
        {"w": (8, 4 // groups, 4, 4), "b": (4,)},
        group=groups,
        strides=[2, 2],
    )
    cost = formulas.transposed_convolution(8, 4, (4, 4), (6, 6), (14, 14), groups=groups)
    holds(found, cost, Kind.CONVOLUTION)
    assert found.operators[0].attributes["outputs"] == 4
    assert found.operators[0].attributes["transposed"]


@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_general_products(tmp_path: Path, trans_a: int, trans_b: int) -> None:
    a, b = ((64, 5) if trans_a else (5, 64)), ((32, 64) if trans_b else (64, 32))
    found = one(tmp_path, "Gemm", {"x": a}, {"w": b, "b": (32,)}, transA=trans_a, transB=trans_b)
    holds(found, formulas.linear(64, 32, rows=5), Kind.PRODUCT)


@pytest.mark.parametrize(
    ("a", "b", "macs", "sums"),
    [
        ((5, 6), (6, 7), 5 * 6 * 7, 35),
        ((4, 5, 6), (6, 7), 4 * 5 * 6 * 7, 140),
        ((2, 1, 5, 6), (3, 6, 7), 2 * 3 * 5 * 6 * 7, 210),  # broadcast
        ((6,), (6,), 6, 1),
        ((6,), (3, 6, 7), 3 * 6 * 7, 21),
        ((4, 5, 6), (6,), 4 * 5 * 6, 20),
    ],
)
def test_matrix_products(tmp_path: Path, a: Any, b: Any, macs: int, sums: int) -> None:
    found = one(tmp_path, "MatMul", {"a": a, "b": b}, {})
    holds(found, Cost(0, macs), Kind.PRODUCT)
    assert found.additions == macs - sums


@pytest.mark.parametrize(
    ("equation", "shapes", "work"),
    [
        ("ij,jk->ik", [(2, 3), (3, 4)], Work(24, sums=8)),
        ("bhid,bhjd->bhij", [(2, 4, 5, 8), (2, 4, 6, 8)], Work(2 * 4 * 5 * 6 * 8, sums=2 * 4 * 5 * 6)),
        ("...ij,...jk", [(7, 2, 3), (1, 3, 4)], Work(7 * 24, sums=7 * 8)),
        ("i,j->ij", [(3,), (4,)], Work(other=12)),  # an outer product adds nothing up
        ("ij->i", [(3, 4)], Work(other=12)),
        ("ij->ji", [(3, 4)], Work()),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)], Work(24 + 40, sums=8 + 10)),
        ("ijk,jl->il", [(2, 3, 9), (3, 4)], Work(24, other=54, sums=8)),  # k is summed before the product
    ],
)
def test_einstein_summation(equation: str, shapes: list[tuple[int, ...]], work: Work) -> None:
    assert einsum(equation, shapes) == work


def test_einsum_node_and_its_errors(tmp_path: Path) -> None:
    found = one(tmp_path, "Einsum", {"a": (2, 3), "b": (3, 4)}, {}, equation="ij,jk->ik")
    holds(found, Cost(0, 24), Kind.PRODUCT)
    for equation, shapes in [("ij,jk->ik", [(2, 3)]), ("ij->i", [(2, 3, 4)]), ("ij,jk->ik", [(2, 3), (4, 5)])]:
        with pytest.raises(ValueError, match="einsum"):
            einsum(equation, shapes)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("biases", [0, 2])
@pytest.mark.parametrize("operator", ["RNN", "GRU", "LSTM"])
def test_recurrent_layers(tmp_path: Path, operator: str, biases: int, directions: int) -> None:
    gates, hidden, width = formulas.GATES[operator.lower()], 16, 32
    weights: dict[str, Any] = {
        "w": (directions, gates * hidden, width),
        "r": (directions, gates * hidden, hidden),
    }
    if biases:
        weights["b"] = (directions, 2 * gates * hidden)
    way = "bidirectional" if directions == 2 else "forward"
    found = one(tmp_path, operator, {"x": (10, 3, width)}, weights, hidden_size=hidden, direction=way)
    cost = formulas.recurrent(operator.lower(), width, hidden, steps=10, batch=3, biases=biases, directions=directions)
    holds(found, cost, Kind.RECURRENT)


def test_peepholes_of_an_lstm_are_parameters(tmp_path: Path) -> None:
    weights = {"w": (1, 16, 8), "r": (1, 16, 4), "p": (1, 12)}
    order = ["x", "w", "r", "", "", "", "", "p"]
    found = one(tmp_path, "LSTM", {"x": (5, 2, 8)}, weights, order=order, hidden_size=4)
    assert found.parameters.total == 16 * 12 + 12
    assert found.other_flops == 5 * 2 * (13 * 4 + 2 * 3 * 4)


# Attention ------------------------------------------------------------------------------------------------------------

BATCH, HEADS, TOKENS, WIDTH = 2, 4, 10, 8
PAIRS = 2 * BATCH * HEADS * TOKENS * TOKENS * WIDTH


@pytest.mark.parametrize("rank", [3, 4])
def test_attention_of_the_standard(tmp_path: Path, rank: int) -> None:
    shape = (BATCH, HEADS, TOKENS, WIDTH) if rank == 4 else (BATCH, TOKENS, HEADS * WIDTH)
    heads = {} if rank == 4 else {"q_num_heads": HEADS, "kv_num_heads": HEADS}
    found = one(tmp_path, "Attention", {"q": shape, "k": shape, "v": shape}, {}, opset=23, **heads)
    holds(found, Cost(0, PAIRS), Kind.ATTENTION)


def test_attention_that_projects_costs_as_much_as_its_parts(tmp_path: Path) -> None:
    width = HEADS * WIDTH
    found = one(
        tmp_path,
        "Attention",
        {"x": (BATCH, TOKENS, width)},
        {"w": (width, 3 * width), "b": (3 * width,)},
        domain=MICROSOFT,
        num_heads=HEADS,
        out_shape=(BATCH, TOKENS, width),
    )
    whole = formulas.attention(width, TOKENS, heads=HEADS, batch=BATCH)
    output = formulas.linear(width, width, rows=BATCH * TOKENS)
    assert found.macs == whole.macs - output.macs
    assert found.parameters.total == whole.parameters - output.parameters
    assert found.bias_adds == whole.bias_adds - output.bias_adds


def test_multi_head_attention_and_its_biases(tmp_path: Path) -> None:
    width = HEADS * WIDTH
    shape = (BATCH, TOKENS, width)
    inputs = {"q": shape, "k": shape, "v": shape}
    found = one(
        tmp_path,
        "MultiHeadAttention",
        inputs,
        {"b": (3 * width,)},
        domain=MICROSOFT,
        num_heads=HEADS,
        out_shape=shape,
    )
    holds(found, Cost(3 * width, PAIRS, 3 * BATCH * TOKENS * width), Kind.ATTENTION)


def test_packed_multi_head_attention(tmp_path: Path) -> None:
    packed = {"q": (BATCH, TOKENS, HEADS, 3, WIDTH)}
    shape = (BATCH, TOKENS, HEADS * WIDTH)
    found = one(tmp_path, "MultiHeadAttention", packed, {}, domain=MICROSOFT, num_heads=HEADS, out_shape=shape)
    holds(found, Cost(0, PAIRS), Kind.ATTENTION)


def test_grouped_query_attention_meets_past_keys(tmp_path: Path) -> None:
    kv, past = 2, 6
    inputs = {
        "q": (BATCH, TOKENS, HEADS * WIDTH),
        "k": (BATCH, TOKENS, kv * WIDTH),
        "v": (BATCH, TOKENS, kv * WIDTH),
        "pk": (BATCH, kv, past, WIDTH),
        "pv": (BATCH, kv, past, WIDTH),
    }
    weights = {"s": np.ones(BATCH, np.int32), "t": np.asarray(16, np.int32)}
    found = one(
        tmp_path,
        "GroupQueryAttention",
        inputs,
        weights,
        domain=MICROSOFT,
        num_heads=HEADS,
        kv_num_heads=kv,
        out_shape=(BATCH, TOKENS, HEADS * WIDTH),
    )
    holds(found, Cost(0, 2 * BATCH * HEADS * TOKENS * (TOKENS + past) * WIDTH), Kind.ATTENTION)
    pairs = TOKENS * past + TOKENS * (TOKENS + 1) // 2
    assert found.attention.causal_macs == 2 * BATCH * HEADS * pairs * WIDTH


CAUSAL = PAIRS * (TOKENS + 1) // (2 * TOKENS)


def test_attention_of_the_standard_is_causal_by_attribute_or_mask(tmp_path: Path) -> None:
    shape = (BATCH, HEADS, TOKENS, WIDTH)
    inputs = {"q": shape, "k": shape, "v": shape}
    lower = np.tril(np.ones((TOKENS, TOKENS), bool))
    by_attribute = one(tmp_path, "Attention", inputs, {}, opset=23, is_causal=1)
    by_mask = one(tmp_path, "Attention", inputs, {"m": lower}, opset=23)
    by_sum = one(tmp_path, "Attention", inputs, {"m": np.where(lower, 0, -np.inf).astype(np.float32)}, opset=23)
    for found in (by_attribute, by_mask, by_sum):
        assert found.attention.macs == PAIRS
        assert found.attention.causal_macs == CAUSAL
        assert (found.attention.masked, found.attention.unknown) == (1, 0)


def test_a_mask_that_is_an_input_is_unknown(tmp_path: Path) -> None:
    shape = (BATCH, HEADS, TOKENS, WIDTH)
    found = one(
        tmp_path, "Attention", {"q": shape, "k": shape, "v": shape, "m": (TOKENS, TOKENS)}, {}, opset=23, is_causal=1
    )
    assert (found.attention.causal_macs, found.attention.masked, found.attention.unknown) == (PAIRS, 0, 1)


def test_unidirectional_attention_hides_pairs_and_no_projection(tmp_path: Path) -> None:
    width = HEADS * WIDTH
    found = one(
        tmp_path,
        "Attention",
        {"x": (BATCH, TOKENS, width)},
        {"w": (width, 3 * width)},
        domain=MICROSOFT,
        num_heads=HEADS,
        unidirectional=1,
        out_shape=(BATCH, TOKENS, width),
    )
    assert (found.attention.macs, found.attention.causal_macs) == (PAIRS, CAUSAL)
    assert found.macs == PAIRS + BATCH * TOKENS * width * 3 * width


# Quantised ------------------------------------------------------------------------------------------------------------

SCALE, ZERO = np.asarray(0.1, np.float32), np.asarray(0, np.uint8)


def test_integer_convolution(tmp_path: Path) -> None:
    weights = {
        "xs": SCALE,
        "xz": ZERO,
        "w": np.ones((16, 3, 3, 3), np.int8),
        "ws": np.ones(16, np.float32),
        "wz": np.zeros(16, np.int8),
        "ys": SCALE,
        "yz": ZERO,
        "b": np.ones(16, np.int32),
    }
    byte = TensorProto.UINT8
    found = one(tmp_path, "QLinearConv", {"x": (2, 3, 10, 12)}, weights, dtype=byte, out_dtype=byte)
    holds(found, PLAIN, Kind.CONVOLUTION)  # scales and zero points are no parameters
    assert found.parameters.trainable == 0
    assert found.operators[0].inputs == ((2, 3, 10, 12), (16, 3, 3, 3), (16,))
    assert found.operators[0].weight_bytes == 432 + 4 * 16 + 4 * 16 + 16 + 2 * 5  # codes, bias, scales, zero points


def test_integer_products(tmp_path: Path) -> None:
    codes = np.ones((64, 32), np.int8)
    byte = TensorProto.UINT8
    found = one(tmp_path, "MatMulInteger", {"x": (5, 64)}, {"w": codes}, dtype=byte, out_dtype=TensorProto.INT32)
    holds(found, formulas.linear(64, 32, rows=5, bias=False), Kind.PRODUCT)
    weights = {"xs": SCALE, "xz": ZERO, "w": codes, "ws": SCALE, "wz": np.asarray(0, np.int8), "ys": SCALE, "yz": ZERO}
    found = one(tmp_path, "QLinearMatMul", {"x": (5, 64)}, weights, dtype=byte, out_dtype=byte)
    holds(found, formulas.linear(64, 32, rows=5, bias=False), Kind.PRODUCT)


def test_four_bit_weights_count_each_number(tmp_path: Path) -> None:
    weights = {"w": np.ones((32, 2, 16), np.uint8), "s": np.ones(64, np.float32)}
    found = one(
        tmp_path,
        "MatMulNBits",
        {"x": (5, 64)},
        weights,
        domain=MICROSOFT,
        K=64,
        N=32,
        bits=4,
        block_size=32,
        out_shape=(5, 32),
    )
    holds(found, formulas.linear(64, 32, rows=5, bias=False), Kind.PRODUCT)
    assert found.parameters.bytes == 64 * 32 // 2


def test_fused_product(tmp_path: Path) -> None:
    found = one(
        tmp_path, "FusedMatMul", {"a": (2, 6, 5), "b": (2, 6, 7)}, {}, domain=MICROSOFT, transA=1, out_shape=(2, 5, 7)
    )
    holds(found, Cost(0, 2 * 5 * 6 * 7), Kind.PRODUCT)


# Everything else ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "weights", "attributes", "cost", "other", "kind"),
    [
        ("BatchNormalization", [(8,)] * 4, {}, formulas.normalisation(8), 2, Kind.NORMALISATION),
        ("InstanceNormalization", [(8,)] * 2, {}, formulas.normalisation(8), 8, Kind.NORMALISATION),
        ("LayerNormalization", [(6,)] * 2, {}, formulas.normalisation(6), 8, Kind.NORMALISATION),
        ("LayerNormalization", [(6,)], {}, formulas.normalisation(6, bias=False), 8, Kind.NORMALISATION),
        ("LRN", [], {"size": 5}, Cost(0, 0), 13, Kind.NORMALISATION),
        ("Softmax", [], {}, Cost(0, 0), 5, Kind.SOFTMAX),
        ("Relu", [], {}, Cost(0, 0), 1, Kind.ELEMENTWISE),
        ("PRelu", [(8, 1, 1)], {}, Cost(8, 0), 1, Kind.ELEMENTWISE),
        ("GlobalAveragePool", [], {}, Cost(0, 0), 1, Kind.POOLING),
        ("MaxPool", [], {"kernel_shape": [2, 2], "strides": [2, 2]}, Cost(0, 0), 1, Kind.POOLING),
        ("ReduceMean", [], {}, Cost(0, 0), 1, Kind.REDUCTION),
        ("Transpose", [], {"perm": [0, 2, 3, 1]}, Cost(0, 0), 0, Kind.MOVE),
        ("Flatten", [], {}, Cost(0, 0), 0, Kind.VIEW),
    ],
)
def test_work_that_is_no_product(
    tmp_path: Path, operator: str, weights: Any, attributes: Any, cost: Cost, other: int, kind: Kind
) -> None:
    named = {f"w{place}": shape for place, shape in enumerate(weights)}
    found = one(tmp_path, operator, {"x": (2, 8, 4, 6)}, named, **attributes)
    holds(found, cost, kind)
    assert found.other_flops == other * 2 * 8 * 4 * 6
    assert (found.bytes_moved == 0) is (kind is Kind.VIEW)


def test_a_skip_layer_norm_adds_first(tmp_path: Path) -> None:
    shape = (2, 5, 8)
    found = one(
        tmp_path,
        "SkipLayerNormalization",
        {"x": shape, "s": shape},
        {"g": (8,), "h": (8,), "b": (8,)},
        domain=MICROSOFT,
        out_shape=shape,
    )
    assert (found.parameters.total, found.other_flops) == (24, (8 + 2) * 80)


def test_a_look_up_reads_what_it_passes_on(tmp_path: Path) -> None:
    found = one(
        tmp_path, "Gather", {"ids": (2, 7)}, {"table": (1000, 16)}, order=["table", "ids"], dtype=TensorProto.INT64
    )
    assert found.parameters.total == 16000
    assert found.operators[0].kind is Kind.MOVE
    assert found.operators[0].bytes_read == 2 * 7 * (8 + 4 * 16)
    assert found.operators[0].weight_bytes == 2 * 7 * 4 * 16


#: Operators of the standard that have no rule: decoding, text, detection, transforms, windows.
WITHOUT = frozenset(
    """AffineGrid BlackmanWindow CausalConvWithState DFT Det HammingWindow HannWindow If ImageDecoder LinearAttention Loop
    MelWeightMatrix Multinomial NonMaxSuppression RegexFullMatch STFT Scan SequenceMap StringConcat StringNormalizer
    StringSplit TfIdfVectorizer""".split()  # noqa: SIM905
)


def test_every_operator_of_the_standard_has_a_rule_or_is_known_to_have_none() -> None:
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""} - {"Constant"}
    assert {name for name in names if entry_of("", name) is None} <= WITHOUT
    assert entry_of("com.microsoft", "Gelu") == entry_of("", "Gelu")
    assert entry_of("com.microsoft", "Attention") != entry_of("", "Attention")
    assert entry_of("ai.onnx.ml", "Scaler") is None


def test_an_operator_without_a_rule_is_listed(tmp_path: Path) -> None:
    found = one(tmp_path, "Det", {"x": (2, 3, 3)}, {}, out_shape=(2,))
    assert found.uncounted == {"Det": 1}
    assert found.operators[0].work is None


def test_channels_that_do_not_fit_name_the_node(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"do not fit at node 'it' \(Conv\).*4 channels"):
        one(tmp_path, "Conv", {"x": (1, 3, 8, 8)}, {"w": (8, 4, 3, 3)})
    with pytest.raises(ModelError, match=r"do not fit at node 'it' \(MatMul\)"):
        one(tmp_path, "MatMul", {"x": (1, 3)}, {"w": (4, 8)})
