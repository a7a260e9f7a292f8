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
from torch.utils._pytree import tree_leaves, tree_map_only

from narrowcast.accounting.backward import Backward, summed_loss, tensors_of
from narrowcast.accounting.building import failed, fake_copy, fake_module
from narrowcast.accounting.counting import ALLOCATIONS, LOOK_UPS, Work, work_of
from narrowcast.accounting.higher_order import MORE_PASSES, flex_share, uncompiled_flex
from narrowcast.accounting.kinds import Kind, attributes_of, kind_of
from narrowcast.accounting.masks import Positions
from narrowcast.accounting.operators import Operator, Trace
from narrowcast.accounting.recording import Call, Recorder, storage_of
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
    recorder = _Costs(module)
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


class _Costs(Recorder):
    """Records what every operator of a run costs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.trace = Trace()
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
            key = storage_of(tensor)
            if key in self._live:
                continue
            self._live[key] = storage.nbytes()
            self._total += storage.nbytes()
            weakref.finalize(storage, self._died, key)
        self.trace.peak_bytes = max(self.trace.peak_bytes, self._total)

    def _died(self, key: int) -> None:
        self._total -= self._live.pop(key, 0)
        self._writers.pop(key, None)

    def known(self, func: Any) -> Any:
        """Return ``NotImplemented``: all operators are run."""
        return NotImplemented

    def choose(self, name: str, choices: Sequence[Callable[[], Any]]) -> Any:
        """Run the branch with the most MACs, or one pass of a loop."""
        costs = [self._cost(choice) for choice in choices] if len(choices) > 1 else [0]
        if name == "while_loop":
            self.trace.uncounted[MORE_PASSES] += 1
        return choices[costs.index(max(costs))]()

    def _cost(self, choice: Callable[[], Any]) -> int:
        """Return the MACs of what a run may do, and leave no trace of it."""
        start, uncounted = len(self.trace.operators), self.trace.uncounted.copy()
        choice()
        macs = sum(operator.work.macs for operator in self.trace.operators[start:] if operator.work)
        del self.trace.operators[start:]
        self.trace.uncounted = uncounted
        self._writers = {storage: place for storage, place in self._writers.items() if place < start}
        return macs

    def saw(self, call: Call) -> None:
        """Record what an operator costs."""
        attributes = self._attributes(call)
        made, read = call.made, call.read
        if not made:
            return
        self.watch(made)
        moved = not call.is_view and call.name not in ALLOCATIONS
        work = self._work(call) if moved else Work()
        if work is None:
            self.trace.uncounted[call.name] += 1
        written = sum(map(_bytes, made)) if moved else 0
        most = written if call.name in LOOK_UPS else None
        storages = [storage_of(leaf) for leaf in read]
        sources = {place: _bytes(leaf, most) for place, leaf in zip(storages, read, strict=True)} if moved else {}
        self.trace.operators.append(
            Operator(
                name=call.name,
                path=self.running.path,
                phase=self.phase,
                inputs=tuple(tuple(leaf.shape) for leaf in read),
                outputs=tuple(tuple(leaf.shape) for leaf in made),
                dtype=str(made[0].dtype).removeprefix("torch."),
                kind=kind_of(call.name, attributes, view=not moved),
                attributes=attributes,
                work=work,
                bytes_read=sum(sources.values()),
                weight_bytes=sum(size for storage, size in sources.items() if storage in self._static),
                bytes_written=written,
                live_bytes=self._total,
                producers=tuple(self._writers.get(storage, -1) for storage in storages),
            )
        )
        if moved:
            self._writers |= dict.fromkeys(map(storage_of, made), len(self.trace.operators) - 1)

    def _attributes(self, call: Call) -> dict[str, Any]:
        """Return what shapes do not say of an operator, and follow what is known of positions."""
        if call.is_attention_of_functions:
            return flex_share(call.args)
        attributes = attributes_of(call.name, call.args)
        if self.phase == "forward":
            attributes |= self._positions.mask(call.func, call.args, call.kwargs)
            self._positions.follow(call.func, call.args, call.kwargs, call.out)
        return attributes

    def _work(self, call: Call) -> Work | None:
        return self._bias(call) or work_of(call.name, call.args, call.kwargs, call.out)

    def _bias(self, call: Call) -> Work | None:
        """Return the work of adding a bias, where a product leaves its bias to an operator of its own; else None."""
        if call.name not in ("add", "add_") or call.kwargs.get("alpha", 1) != 1:
            return None
        product, bias = call.args[:2]
        maker = self._maker(product)
        if maker is None or maker.kind is not Kind.PRODUCT or math.prod(maker.outputs[0]) != call.out.numel():
            return None
        if not isinstance(bias, torch.Tensor):
            return None
        if gathered := self._maker(bias):  # each row has its expert's bias
            is_bias = gathered.name == "index" and gathered.weight_bytes > 0
        else:
            is_bias = bias.dim() == 1 and storage_of(bias) in self._static and maker.weight_bytes > 0
        return Work(bias_adds=call.out.numel()) if is_bias else None

    def _maker(self, tensor: Any) -> Operator | None:
        """Return the operator that last wrote a tensor, views aside; None for parameters and inputs."""
        place = self._writers.get(storage_of(tensor), -1) if isinstance(tensor, torch.Tensor) else -1
        return self.trace.operators[place] if place >= 0 else None


def _bytes(tensor: torch.Tensor, most: int | None = None) -> int:
    """Return the bytes of a tensor's own numbers, and no more than ``most``."""
    own = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
    return own if most is None else min(own, most)
