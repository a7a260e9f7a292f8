"""Traced inference and training steps as PyTorch runs them, for what they allocate."""

from __future__ import annotations

import copy
import fnmatch
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from narrowcast.accounting.backward import Backward, summed_loss, tensors_of
from narrowcast.accounting.building import failed
from narrowcast.accounting.higher_order import uncompiled_flex
from narrowcast.accounting.lives import LifeRecorder, Lives
from narrowcast.accounting.optimizers import optimizer
from narrowcast.accounting.policies import Policy
from narrowcast.accounting.sdpa import CudaAttention
from narrowcast.accounting.traffic import bits_of
from narrowcast.accounting.workspace import Backend, backend, eight_bit_products, integer_kernels
from narrowcast.errors import ModelError, NarrowcastError

__all__ = ["DTYPES", "Setting", "inference", "placed", "training"]

#: What PyTorch computes in, by the names of :mod:`narrowcast.formats`.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_HALF = {"fp16-mixed": torch.float16}  # what autocast casts to, if not BF16


@dataclass(frozen=True)
class Setting:
    """How a model runs.

    Args:
        policy: Number formats.
        device: ``cpu`` or ``cuda``.
        capability: CUDA's compute capability.
        optimizer: One of :data:`narrowcast.accounting.optimizers.OPTIMIZERS`.
        accumulate: Backward passes for each step of the optimizer.
        checkpoint: Which modules are computed again in backward: none, all repeated blocks, or those whose names match a
            pattern of :mod:`fnmatch`.
    """

    policy: Policy
    device: str = "cpu"
    capability: tuple[int, int] = (8, 0)
    optimizer: str = "adamw"
    accumulate: int = 1
    checkpoint: bool | str = False

    @property
    def backend(self) -> Backend:
        """How the device allocates, with the 8-bit copies that products read where the policy has them."""
        found = backend(self.device, self.capability)
        if self.bits is not None:
            return integer_kernels(found)
        return eight_bit_products(found) if self.policy.compute == "e4m3fn" else found

    @property
    def bits(self) -> int | None:
        """What activations are stored in, where PyTorch does not compute in it: those of integer policies."""
        return None if self.policy.activations in DTYPES else round(bits_of(self.policy.activations))

    @property
    def dtype(self) -> torch.dtype:
        """What the module is built in."""
        return DTYPES[self.policy.rest]


def placed(module: nn.Module, mode: FakeTensorMode, setting: Setting) -> nn.Module:
    """Return a copy of a module on the setting's device, with shapes in place of numbers; tied weights stay tied."""
    moved: dict[int, Any] = {}  # what deepcopy takes in place of a copy
    with mode, torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            there = torch.empty_like(tensor.detach(), device=setting.device)
            moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
        return copy.deepcopy(module, moved)


def inference(
    module: nn.Module,
    mode: FakeTensorMode,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    setting: Setting,
    sizes: Mapping[int, int] | None = None,
) -> Lives:
    """Return the storages of one run without gradients.

    Args:
        module: On the setting's device, see :func:`placed`.
        mode: The mode that its tensors live in.
        args: Inputs; only shapes and dtypes matter.
        kwargs: Inputs by name.
        setting: How it runs.
        sizes: Bytes of tensors that are stored in another form, by their ids.

    Raises:
        ModelError: The inputs do not fit, or the run depends on numbers.
    """
    module.eval()
    run = _Run(module, mode, setting, sizes)
    with run.recording(), torch.no_grad():
        inputs = run.inputs((args, kwargs))
        run.recorder.mark("built")
        run.forward(inputs)
        run.recorder.mark("forward")
    return run.recorder.lives


def training(
    module: nn.Module,
    mode: FakeTensorMode,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    setting: Setting,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> Lives:
    """Return the storages of two training steps; the optimizer makes its states in the first.

    Outputs live until backward is over, as in a loop that keeps them under a name, and gradients are dropped after each
    step. Marks name the points ``built``, and for each step ``forward``, ``backward`` and ``step``.

    Args:
        module: On the setting's device, see :func:`placed`.
        mode: The mode that its tensors live in.
        args: Inputs; only shapes and dtypes matter.
        kwargs: Inputs by name.
        setting: How it runs.
        loss: What backward starts from; see :func:`narrowcast.accounting.backward.summed_loss` for what it is unless given.

    Raises:
        ModelError: The inputs do not fit, or the run depends on numbers.
    """
    module.train()
    if setting.checkpoint:
        _checkpointed(module, setting)
    run = _Run(module, mode, setting)
    parameters = [one for one in module.parameters() if one.requires_grad]
    with run.recording():
        inputs = run.inputs((args, kwargs))
        update = _Update(setting, parameters, run.recorder)
        run.recorder.mark("built")
        for number in ("first", "second"):
            for micro in range(min(setting.accumulate, 2)):  # from the second on all are alike
                name = f"{number} micro {micro}"
                run.recorder.phase = "forward"
                kept, backward = run.forward_with_loss(inputs, loss or summed_loss)
                run.recorder.mark(f"{name} forward")
                run.recorder.phase = "backward"
                backward.run()
                run.recorder.watch([one.grad for one in parameters], "gradients")
                run.recorder.mark(f"{name} backward")
                del kept, backward
            run.recorder.phase = "optimizer"
            run.recorder.running.enter_node(None)
            update()
            run.recorder.mark(f"{number} step")
    return run.recorder.lives


class _Run:
    """What inference and training share: where they run, and what is said of errors."""

    def __init__(
        self, module: nn.Module, mode: FakeTensorMode, setting: Setting, sizes: Mapping[int, int] | None = None
    ) -> None:
        recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
        if recurrent and setting.device == "cuda" and setting.policy.autocast:
            raise ModelError(
                f"recurrent layers in {setting.policy.name} on cuda: what cuDNN casts and keeps cannot be followed",
                allowed="policies without autocast, or device cpu",
            )
        self._module = module
        self._mode = mode
        self._setting = setting
        self.recorder = LifeRecorder(
            module,
            setting.backend,
            sizes=sizes,
            follow_casts=setting.policy.autocast,
            bits=setting.bits,
        )

    @contextmanager
    def recording(self) -> Generator[None]:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of a card that is missing
            for context in (_quiet(), uncompiled_flex(), self._mode, self.recorder.running.following(), self.recorder):
                stack.enter_context(context)
            if self._setting.device == "cuda":
                stack.enter_context(_capability(self._setting.capability))
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # which recurrent layers ask of a card
                stack.enter_context(CudaAttention(self._setting.capability))
            try:
                yield
            except DataDependentOutputException as error:
                raise ModelError(
                    f"the run depends on numbers at {self.recorder.running.where()}: {error.func}",
                    next_step="count a run that takes fixed branches",
                ) from error
            except NarrowcastError:
                raise
            except Exception as error:  # a model may raise anything
                raise failed(error, self.recorder.running.where()) from error

    def inputs(self, given: Any) -> Any:
        """Return inputs on the device, in the dtype that the module is built in."""

        def place(tensor: torch.Tensor) -> torch.Tensor:
            dtype = self._setting.dtype if tensor.is_floating_point() else tensor.dtype
            return torch.empty(tensor.shape, dtype=dtype, device=self._setting.device)

        made = tree_map_only(torch.Tensor, place, (tuple(given[0]), dict(given[1])))
        self.recorder.watch(tree_leaves(made), "data")
        return made

    def forward(self, inputs: Any) -> Any:
        args, kwargs = inputs
        with _autocast(self._setting):
            return self._module(*args, **kwargs)

    def forward_with_loss(
        self, inputs: Any, loss: Callable[[Any], torch.Tensor]
    ) -> tuple[list[torch.Tensor], Backward]:
        """Return the outputs without their graph, and the backward pass to be run."""
        args, kwargs = inputs
        with _autocast(self._setting):
            out = self._module(*args, **kwargs)
            value = loss(out)
        return [tensor.detach() for tensor in tensors_of(out)], Backward(value, self.recorder.running.enter_node)


class _Update:
    """The optimizer's step, on master weights where the policy keeps them."""

    def __init__(self, setting: Setting, parameters: list[nn.Parameter], recorder: LifeRecorder) -> None:
        self._parameters = parameters
        self._recorder = recorder
        self._masters: list[torch.Tensor] = []
        if setting.policy.master:
            dtype = DTYPES[setting.policy.master]
            self._masters = [one.detach().to(dtype) for one in parameters]
            recorder.watch(self._masters, "master")
        self._optimizer = optimizer(
            setting.optimizer, self._masters or list(parameters), foreach=setting.backend.foreach
        )

    def __call__(self) -> None:
        for master, parameter in zip(self._masters, self._parameters, strict=False):
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        self._optimizer.step()
        self._recorder.watch(
            tree_leaves([list(state.values()) for state in self._optimizer.state.values()]), "optimizer_state"
        )
        with torch.no_grad():
            for master, parameter in zip(self._masters, self._parameters, strict=False):
                parameter.copy_(master)
                master.grad = None
        for parameter in self._parameters:
            parameter.grad = None


@contextmanager
def _quiet() -> Generator[None]:
    """Keep PyTorch from logging what is raised here as an error of the user's."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _capability(capability: tuple[int, int]) -> Generator[None]:
    """Say what a card can do that need not be there: models choose their kernels by it."""
    before = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: capability
    try:
        yield
    finally:
        torch.cuda.get_device_capability = before


@contextmanager
def _autocast(setting: Setting) -> Generator[None]:
    """Cast like :class:`torch.autocast`, also for a card that is not there."""
    if not setting.policy.autocast:
        yield
        return
    device = setting.device
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_dtype(device, _HALF.get(setting.policy.name, torch.bfloat16))
    torch.set_autocast_enabled(device, True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def _checkpointed(module: nn.Module, setting: Setting) -> None:
    """Have blocks of a module computed again in backward, without a cache of keys and values that they would fill twice."""
    for block in _blocks(module, setting.checkpoint):
        block.forward = _again(block.forward, setting)
    for part in module.modules():
        config: Any = getattr(part, "config", None)
        if hasattr(config, "use_cache"):  # of transformers, which switches it off likewise
            config.use_cache = False


def _again(forward: Callable[..., Any], setting: Setting) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            determinism_check="none",
            context_fn=lambda: (nullcontext(), _autocast(setting)),
            **kwargs,
        )

    return run


def _blocks(module: nn.Module, which: bool | str) -> list[nn.Module]:
    """Return the outermost blocks that a pattern names, or that stand more than once in a list of modules.

    Raises:
        ModelError: There are none.
    """
    chosen: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        if isinstance(which, str):
            chosen |= {name: part} if name and fnmatch.fnmatchcase(name, which) else {}
        elif isinstance(part, nn.ModuleList | nn.Sequential):
            kinds = Counter(type(child) for child in part)
            chosen |= {
                f"{name}.{key}".lstrip("."): child
                for key, child in part.named_children()
                if kinds[type(child)] > 1 and any(True for _ in child.children())
            }
    outermost = [
        part
        for name, part in chosen.items()
        if not any(name.startswith(f"{other}.") for other in chosen if other != name)
    ]
    if not outermost:
        raise ModelError(
            f"checkpoint {which!r} fits no module",
            next_step="give a pattern of module names, such as 'encoder.layers.*'",
        )
    return outermost
