"""States as JSON and tensors, and back."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowcast.errors import TrainingError
from narrowcast.training.state_tree import leaves, pack, unpack

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.complex32, torch.float4_e2m1fn_x2),
]


def there_and_back(state: Any) -> Any:
    packed = pack(state)
    text = json.dumps(packed.tree, allow_nan=False)
    return unpack(json.loads(text), {name: tensor.clone() for name, tensor in packed.tensors.items()})


def same(one: Any, other: Any) -> bool:
    """Whether two states are of the same types and bit for bit of the same values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
        return alike and content(one) == content(other)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float):
        return one.hex() == other.hex()
    return one == other


def content(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.text(max_size=4) | st.integers(-3, 3) | st.none() | st.tuples(st.integers(0, 2), st.text(max_size=2))
states = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(states)
@settings(max_examples=60, deadline=None)
def test_any_nest_of_plain_values_comes_back(state: Any) -> None:
    assert same(there_and_back(state), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 4)], ids=str)
def test_every_bit_of_a_tensor_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(7)
    low, high = (0, 2) if dtype == torch.bool else (0, 256)
    size = (math.prod(shape) * dtype.itemsize,)
    tensor = torch.randint(low, high, size, dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)
    assert same(there_and_back({"t": tensor})["t"], tensor)


@pytest.mark.parametrize(
    "state",
    [
        *(math.inf, -math.inf, math.nan, -0.0, 5e-324, 10**5000, -(2**53), 2**64, True, "\ud800", ""),
        *(torch.Size([2, 3]), torch.bfloat16, Counter({3: 2, 7: 1}), [], (), {}, ((),), {"$tuple": [1]}, {"$": None}),
        {0: {"step": torch.tensor(3.0)}, 1: {}, "0": None},
        {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, "__metadata__": torch.ones(2)},
        *(np.arange(4, dtype=np.uint32), np.float32(1.5), np.float64(math.nan), np.bool_(True), np.zeros((0, 2))),
        *(np.array(3), np.asfortranarray(np.arange(6.0).reshape(2, 3))[:, 1:].copy(), np.complex64(1 + 2j)),
    ],
    ids=lambda state: type(state).__name__,
)
def test_a_value_comes_back_with_its_type(state: Any) -> None:
    assert same(there_and_back(state), state)


def test_mappings_of_other_classes_come_back_as_dictionaries() -> None:
    assert same(there_and_back(OrderedDict(b=1, a=2)), {"b": 1, "a": 2})


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    packed = pack({"embedding": weight, "head": weight.detach(), "rows": weight[:1], "turned": weight.t()})
    assert list(packed.tensors) == ["embedding", "rows", "turned"]
    back = unpack(packed.tree, {name: tensor.clone() for name, tensor in packed.tensors.items()})
    back["head"][0, 0] = 9
    assert back["embedding"][0, 0] == 9
    assert torch.equal(back["rows"], weight[:1].detach())
    assert torch.equal(back["turned"], weight.detach().t())


def test_stored_tensors_share_no_memory_and_no_hidden_rest() -> None:
    large = torch.arange(1000.0)
    packed = pack({"slice": large[5:7], "overlap": large[6:8], "whole": large, "flat": large.view(10, 100)})
    storages = {name: tensor.untyped_storage() for name, tensor in packed.tensors.items()}
    assert len({storage.data_ptr() for storage in storages.values()}) == 4
    assert storages["slice"].nbytes() == 8


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(48.0).reshape(2, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.tensor([1 + 2j]).conj(),
    ],
    ids=["channels_last", "turned", "conjugated"],
)
def test_dense_strides_come_back(tensor: torch.Tensor) -> None:
    back = there_and_back(tensor)
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()


def test_repeated_and_holed_views_come_back_by_value() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    back = there_and_back({"repeated": base[:, :1].expand(2, 3), "holed": base[:, ::2]})
    assert torch.equal(back["repeated"], base[:, :1].expand(2, 3))
    assert torch.equal(back["holed"], base[:, ::2])
    assert back["holed"].is_contiguous()


def test_leaves_say_where_every_tensor_is_and_what() -> None:
    packed = pack({"w": torch.zeros(2, 3, dtype=torch.bfloat16), "n": (1, {3: np.zeros(4, np.uint16)})})
    found = {path: (leaf.name, leaf.dtype, leaf.shape) for path, leaf in leaves(packed.tree)}
    assert found == {
        ("w",): ("w", torch.bfloat16, (2, 3)),
        ("n", "1", "3"): ("n/1/3", torch.uint16, (4,)),
    }
    for _, leaf in leaves(packed.tree):
        stored = packed.tensors[leaf.name]
        assert (stored.dtype, tuple(stored.shape)) == (leaf.stored_dtype, leaf.stored_shape)


class Pair(NamedTuple):
    a: int
    b: int


class Scaled(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "object"),
        (lambda: 1, "function"),
        ({1, 2}, "set"),
        (Pair(1, 2), "Pair"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2).as_subclass(Scaled), "Scaled"),
        (np.array(["a"]), "<U1"),
        (np.array([None]), "object"),
        (torch.qint8, "qint8"),
    ],
    ids=["object", "function", "set", "named_tuple", "sparse", "meta", "subclass", "words", "objects", "dtype"],
)
def test_what_only_pickle_could_hold_is_refused_with_its_place(value: Any, named: str) -> None:
    with pytest.raises(TrainingError, match=f"model/0/x is .*{named}.*without pickle"):
        pack({"model": [{"x": value}]})


def test_a_state_that_holds_itself_is_refused() -> None:
    state: dict[str, Any] = {}
    state["again"] = state
    with pytest.raises(TrainingError, match="cycles"):
        pack(state)


@pytest.mark.parametrize("tree", [{"$unknown": 1}, {"$tensor": {"name": "w"}}, {"$int": "x"}, {"$dict": [[1]]}])
def test_a_tree_that_nobody_packed_is_refused(tree: Any) -> None:
    with pytest.raises(TrainingError, match="tree"):
        unpack(tree, {})
