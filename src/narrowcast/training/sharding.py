"""Modules whose weights, gradients and optimizer states are spread over processes: PyTorch's FSDP2.

Gradients come together after every backward pass, so that none is ever whole for longer than its unit computes: a window of
several micro-batches needs no more memory than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from narrowcast.errors import TrainingError
from narrowcast.training.distributed import Ranks
from narrowcast.training.policies import Precision
from narrowcast.training.policies import precision as policy_of
from narrowcast.training.rounding import accumulate_in_fp32

__all__ = ["listen", "reshard", "shard"]


def shard(
    module: nn.Module,
    ranks: Ranks,
    precision: str | Precision = "fp32",
    *,
    units: Sequence[str] | None = None,
    gather: Literal["stored", "compute"] = "stored",
) -> nn.Module:
    """Spread a module's weights, gradients and optimizer states over the ranks, in place (FSDP2).

    Each unit's weights are together only while it computes. Make the optimizer afterwards: the parameters are new objects.

    Args:
        module: On the ranks' device; it is prepared for the precision. Rank 0's weights and buffers count.
        ranks: The processes; nothing is done where there is one.
        precision: What the module will be trained in.
        units: Names of the modules whose weights come together at once; the repeated blocks unless given. What is left
            belongs to the module itself.
        gather: ``stored``: weights come together as they are stored, and everything is computed as in one process;
            ``compute``: in what a mixed precision computes in, which halves the traffic, and rounds also those weights and
            gradients that one process keeps in FP32 (norms, biases). Gradients are summed in FP32 in both.

    Returns:
        The module.

    Raises:
        TrainingError: A unit does not exist, or shares a weight with the rest of the module, or the
            precision does not go with what is asked for.
    """
    policy = policy_of(precision)
    policy.prepare(module)
    if ranks.mesh is None:
        return module
    accumulate_in_fp32(module.parameters())  # before, as FSDP2 takes over what gradients are to be kept in
    parts = _units(module, units)
    mixed = _mixed(policy, gather)
    with ranks.watched():
        _share(module)
        for part in (*parts, module):
            fully_shard(part, mesh=ranks.mesh, mp_policy=mixed)
    for one in module.parameters():
        if one.dtype == torch.bfloat16 and one.grad_dtype != torch.float32:
            raise TrainingError(
                f"sharded weights in {policy.name}: PyTorch {torch.__version__} sums their gradients in BF16",
                allowed="replicated weights, another precision, or a later PyTorch",
                next_step="use ranks: replicated, or bf16-mixed",
            )
    return module


def reshard(module: nn.Module) -> None:
    """Free weights that came together for a forward pass without a backward pass, which FSDP2 keeps of the outermost unit.

    Args:
        module: A sharded module; nothing happens with any other.
    """
    units: list[Any] = [one for one in module.modules() if isinstance(one, FSDPModule)]
    for one in units:
        one.reshard()


def listen(module: nn.Module, hear: Callable[[list[str], Tensor], None]) -> None:
    """Have a function told of each unit's gradients on this rank alone, before those of all ranks are summed.

    Args:
        module: A sharded module; nothing happens with any other.
        hear: Called after each backward pass of a unit, with the names of the unit's parameters and their gradients in one
            row, on the stream that sums them.
    """
    units: list[tuple[str, Any]] = [(name, one) for name, one in module.named_modules() if isinstance(one, FSDPModule)]
    taken: set[int] = set()
    for name, unit in reversed(units):  # inner ones first: the rest is the outer ones'
        inside = {f"{name}.{key}".lstrip("."): one for key, one in unit.named_parameters() if id(one) not in taken}
        taken |= {id(one) for one in inside.values()}
        unit.set_custom_reduce_scatter(_Heard(list(inside), hear))


class _Heard:
    """Sums gradients as FSDP2 does by itself, and tells of them first (``torch.distributed.fsdp``'s ``ReduceScatter``)."""

    def __init__(self, names: list[str], hear: Callable[[list[str], Tensor], None]) -> None:
        self._names = names
        self._hear = hear

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        self._hear(self._names, input_tensor)
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


@torch.no_grad()
def _share(module: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0."""
    for one in (*module.parameters(), *module.buffers()):
        content = one.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
        dist.broadcast(content, 0)
        one.copy_(content.view(one.dtype).reshape(one.shape))


def _units(module: nn.Module, names: Sequence[str] | None) -> list[nn.Module]:
    """Return the modules that are sharded each for itself, inner ones first."""
    named = dict(module.named_modules())
    if names is not None:
        unknown = [name for name in names if name not in named]
        if unknown:
            raise TrainingError(f"no module {unknown[0]!r} to shard", allowed="names of modules in the model")
        chosen = {name for name in names if name}
        for name in chosen:
            if other := _tied_outside(module, name):
                raise TrainingError(
                    f"module {name!r} has a weight that is {other!r} too, which sharding by itself would untie",
                    allowed="units whose weights are theirs alone",
                    next_step="leave it out of the units: its weights then belong to the module around it",
                )
    else:
        chosen = {name for name in _blocks(module) if not _tied_outside(module, name)}
    return [named[name] for name in reversed(list(named)) if name in chosen]


def _tied_outside(module: nn.Module, unit: str) -> str | None:
    """Return the name, outside of a unit, of a parameter that the unit has too; None if all are its own."""
    inside: set[int] = set()
    outside: dict[int, str] = {}
    for name, one in module.named_parameters(remove_duplicate=False):
        if name.startswith(f"{unit}."):
            inside.add(id(one))
        else:
            outside.setdefault(id(one), name)
    return next((name for key, name in outside.items() if key in inside), None)


def _blocks(module: nn.Module) -> set[str]:
    """Return the names of the outermost repeated blocks: modules with parts, several of one class in a list."""
    found: set[str] = set()
    for name, part in module.named_modules():
        if not isinstance(part, nn.ModuleList | nn.Sequential) or any(name.startswith(f"{one}.") for one in found):
            continue
        blocks = {key: one for key, one in part.named_children() if next(one.children(), None) is not None}
        classes = [type(one) for one in blocks.values()]
        found |= {f"{name}.{key}".lstrip(".") for key, one in blocks.items() if classes.count(type(one)) > 1}
    return found


def _mixed(policy: Precision, gather: str) -> MixedPrecisionPolicy:
    if gather not in ("stored", "compute"):
        raise TrainingError(f"gather = {gather!r}", allowed="stored, compute")
    if gather == "stored" or not policy.mixed:
        return MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    if policy.overrides:
        raise TrainingError(
            "gather = 'compute' with overrides, whose modules need their weights as they are stored",
            next_step="leave out one of the two",
        )
    compute = torch.float16 if policy.compute == "fp16" else torch.bfloat16
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
