"""One traced run of a PyTorch module, with shapes in place of numbers: every operator, where it belongs and what it costs.

Nothing is allocated and nothing computed, so a model of 70 billion parameters takes seconds. Kernels that hide their
work (the fused LSTM of CPUs, the fast path of TransformerEncoder) are switched off for the run, so that what they compute
is seen.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from narrowcast.accounting import grouped
from narrowcast.accounting.backward import Backward, summed_loss, tensors_of
from narrowcast.accounting.building import failed, fake_copy, fake_module
from narrowcast.accounting.counting import ALLOCATIONS, LOOK_UPS, VIEWS, Work, work_of
from narrowcast.accounting.higher_order import (
    FLEX,
    MORE_PASSES,
    alternatives,
    decomposed,
    flex_share,
    is_higher_order,
    uncompiled_flex,
)
from narrowcast.accounting.kinds import Kind, attributes_of, kind_of
from narrowcast.accounting.masks import Positions
from narrowcast.accounting.operators import Operator, Trace
from narrowcast.accounting.running import Running
from narrowcast.accounting.sdpa import FusedDropout
from narrowcast.errors import ModelError, NarrowcastError

__all__ = ["Operator", "Trace", "fake_module", "trace"]


def trace(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    mode: FakeTensorMode | None = None,
    train: bool = False,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> Trace:
    """Return what one run of ``module`` does.

    Args:
        module: A module; its parameters may be real (they are not touched) or fake.
        args: Example inputs, real or fake; only their shapes and dtypes matter.
        kwargs: Likewise, by name.
        mode: The mode that fake parameters live in; a new one unless given.
        train: Whether to run backward too, in training mode; else inference without gradients, in evaluation mode.
        loss: What backward starts from; see :func:`narrowcast.accounting.backward.summed_loss` for what it is unless
            given.

    Raises:
        ModelError: The inputs do not fit (the layer is named), or the run depends on numbers.
    """
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    module = module if _is_fake(module) else fake_copy(module, mode)
    module.train(train)
    recorder = _Recorder(module)
    running = recorder.running
    fake = lambda value: tree_map_only(torch.Tensor, mode.from_tensor, value)  # noqa: E731
    with _plain_kernels(), FusedDropout(), mode, running.following(), torch.set_grad_enabled(train):
        inputs, named = fake(tuple(args)), fake(dict(kwargs or {}))
        recorder.watch([*tree_leaves(inputs), *tree_leaves(named)])
        try:
            with recorder:
                out = module(*inputs, **named)
                if train:
                    value = (loss or summed_loss)(out)
                    recorder.phase = "backward"
                    backward = Backward(value, running.enter_node)
                    out = [tensor.detach() for tensor in tensors_of(out)]  # kept, but not the graph that made them
                    del value
                    backward.run()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ModelError(
                f"the run depends on numbers at {running.where()}: {error.func}",
                next_step="count a run that takes fixed branches, or export the model to ONNX and count that",
            ) from error
        except NarrowcastError:
            raise
        except Exception as error:  # a model may raise anything
            raise failed(error, running.where()) from error
    return recorder.trace


def _is_fake(module: nn.Module) -> bool:
    tensors = [*module.parameters(), *module.buffers()]
    return bool(tensors) and all(type(tensor.data).__name__ == "FakeTensor" for tensor in tensors)


@contextmanager
def _plain_kernels() -> Generator[None]:
    """Switch off kernels that hide what they compute."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TF32")  # which setting the flags speaks of
            with (
                torch.backends.mkldnn.flags(enabled=False),
                torch.backends.cudnn.flags(enabled=False),
                uncompiled_flex(),
            ):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _Recorder(TorchDispatchMode):
    """Sees every operator of a run."""

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.running = Running(module)
        self.phase = "forward"
        self._positions = Positions()
        self._live: dict[int, int] = {}
        self._writers: dict[int, int] = {}  # the operator that last wrote a storage, by its place
        self._total = 0
        self.watch([*module.parameters(), *module.buffers()])
        self._static = frozenset(self._live)
        self.trace.static_bytes = self._total

    def watch(self, tensors: Sequence[Any]) -> None:
        """Count the storages of tensors as alive until they die."""
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = _storage_of(tensor)
            if key in self._live:
                continue
            self._live[key] = storage.nbytes()
            self._total += storage.nbytes()
            weakref.finalize(storage, self._died, key)
        self.trace.peak_bytes = max(self.trace.peak_bytes, self._total)

    def _died(self, key: int) -> None:
        self._total -= self._live.pop(key, 0)
        self._writers.pop(key, None)

    def _bias(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Work | None:
        """Return the work of adding a bias, where a product leaves its bias to an operator of its own; else None."""
        if name not in ("add", "add_") or kwargs.get("alpha", 1) != 1:
            return None
        product, bias = args[:2]
        maker = self._maker(product)
        if maker is None or maker.kind is not Kind.PRODUCT or math.prod(maker.outputs[0]) != out.numel():
            return None
        if not isinstance(bias, torch.Tensor):
            return None
        if gathered := self._maker(bias):  # each row has its expert's bias
            is_bias = gathered.name == "index" and gathered.weight_bytes > 0
        else:
            is_bias = bias.dim() == 1 and _storage_of(bias) in self._static and maker.weight_bytes > 0
        return Work(bias_adds=out.numel()) if is_bias else None

    def _maker(self, tensor: Any) -> Operator | None:
        """Return the operator that last wrote a tensor, views aside; None for parameters and inputs."""
        place = self._writers.get(_storage_of(tensor), -1) if isinstance(tensor, torch.Tensor) else -1
        return self.trace.operators[place] if place >= 0 else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_higher_order(func):
            return self._higher_order(func, args, kwargs)
        with self:
            out = decomposed(func, args, kwargs)
        if out is not NotImplemented:
            return out
        out = grouped.call(func, args, kwargs)
        name = func._schema.name.partition("::")[2]
        moved = not (func.is_view or name in VIEWS or name in ALLOCATIONS)
        attributes = attributes_of(name, args)
        if self.phase == "forward":
            self.running.note()
            attributes |= self._positions.mask(func, args, kwargs)
            self._positions.follow(func, args, kwargs, out)
        self._record(name, args, kwargs, out, attributes, moved=moved)
        return out

    def _higher_order(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Record an operator that takes functions: attention as one, all else as what the functions do."""
        name = func.name()
        if name == FLEX:
            self.running.note()
            out = func(*args, **kwargs)
            self._record(name, args[:3], {}, out, flex_share(args))
            return out
        choices = alternatives(name, args)
        costs = [self._cost(choice) for choice in choices] if len(choices) > 1 else [0]
        if name == "while_loop":
            self.trace.uncounted[MORE_PASSES] += 1
        with self:
            return choices[costs.index(max(costs))]()

    def _cost(self, choice: Callable[[], Any]) -> int:
        """Return the MACs of what a run may do, and leave no trace of it."""
        start, uncounted = len(self.trace.operators), self.trace.uncounted.copy()
        with self:
            choice()
        macs = sum(operator.work.macs for operator in self.trace.operators[start:] if operator.work)
        del self.trace.operators[start:]
        self.trace.uncounted = uncounted
        self._writers = {storage: place for storage, place in self._writers.items() if place < start}
        return macs

    def _record(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        attributes: dict[str, Any],
        *,
        moved: bool = True,
    ) -> None:
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not made:
            return
        read = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, torch.Tensor)]
        self.watch(made)
        work = (self._bias(name, args, kwargs, out) or work_of(name, args, kwargs, out)) if moved else Work()
        written = sum(map(_bytes, made)) if moved else 0
        most = written if name in LOOK_UPS else None
        sources = {_storage_of(leaf): _bytes(leaf, most) for leaf in read} if moved else {}
        if work is None:
            self.trace.uncounted[name] += 1
        self.trace.operators.append(
            Operator(
                name=name,
                path=self.running.path,
                phase=self.phase,
                inputs=tuple(tuple(leaf.shape) for leaf in read),
                outputs=tuple(tuple(leaf.shape) for leaf in made),
                dtype=str(made[0].dtype).removeprefix("torch."),
                kind=kind_of(name, attributes, view=not moved),
                attributes=attributes,
                work=work,
                bytes_read=sum(sources.values()),
                weight_bytes=sum(size for storage, size in sources.items() if storage in self._static),
                bytes_written=written,
                live_bytes=self._total,
                producers=tuple(self._writers.get(_storage_of(leaf), -1) for leaf in read),
            )
        )
        if moved:
            self._writers |= dict.fromkeys(map(_storage_of, made), len(self.trace.operators) - 1)


def _bytes(tensor: torch.Tensor, most: int | None = None) -> int:
    """Return the bytes of a tensor's own numbers, and no more than ``most``."""
    own = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
    return own if most is None else min(own, most)


def _storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
