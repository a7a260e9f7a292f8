"""Training on several processes: who they are, what they agree on, and how a module's weights are held among them.

The processes are started by ``torchrun``, and every part is PyTorch's own: the process group (gloo on the CPU, NCCL on
CUDA) and DistributedDataParallel for modules that every process holds whole; :mod:`narrowcast.training.sharding` has FSDP2
for modules that are held in parts.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from narrowcast.errors import DeviceError, NarrowcastError, TrainingError
from narrowcast.training.alarm import Alarm, Failure
from narrowcast.training.policies import Precision
from narrowcast.training.policies import precision as policy_of

__all__ = ["Ranks", "lost_ranks", "replicate"]

_log = logging.getLogger(__name__)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
#: What gloo and the store say of a process that is gone or does not answer.
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|[Tt]imed out|[Tt]imeout|Wait timeout|Rank \d+ .*(failed|error)"
    r"|NCCL|recvValue failed|sendBytes failed|closed by remote peer|wait_socket|ProcessGroup|gloo"
)


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that train together.

    As a context it leaves the group at the end, and when it is left by an error it tells the other processes: they do not wait
    for this one until the timeout, but end with an error that names its rank and says what happened.

    Attributes:
        rank: The number of this one, from 0.
        world: How many there are.
        device: Where this one computes.
        mesh: Their devices in a row; None if there is one process alone.
        timeout_s: Seconds after which a process that does not answer is given up.
        alarm: Tells the others that this one failed, and hears it of them; None where processes met without a store.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    timeout_s: float = 900.0
    alarm: Alarm | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls, device: str | torch.device = "cpu", *, timeout_s: float = 900.0) -> Ranks:
        """Join the processes that ``torchrun`` started; without its variables this process is alone.

        Args:
            device: ``cpu`` or ``cuda``; each process takes the GPU of its local rank.
            timeout_s: Seconds that the others are waited for, here and in every exchange: longer than the longest time
                that one process works alone, such as rank 0 in a validation.

        Raises:
            TrainingError: Variables are missing or contradict each other, or the others do not come.
            DeviceError: There is no GPU for this process.
        """
        kind = torch.device(device).type
        given = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        if "RANK" not in given and "WORLD_SIZE" not in given:
            return cls(device=torch.device(device), timeout_s=timeout_s)
        rank, world, local = _numbers(given)
        if kind not in _BACKENDS:
            raise DeviceError(f"several processes on device {kind}", allowed=", ".join(_BACKENDS))
        if kind == "cuda" and local >= torch.cuda.device_count():
            raise DeviceError(
                f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}",
                next_step=f"start at most {torch.cuda.device_count()} with torchrun --nproc-per-node",
            )
        place = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(place)
        timeout = timedelta(seconds=timeout_s)
        with lost_ranks(timeout_s):
            met, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
            number = (met.add("narrowcast", 1) - 1) // world  # of this group among those that meet in one store
            store = dist.PrefixStore(f"narrowcast/{number}", met)
            dist.init_process_group(
                _BACKENDS[kind],
                store=store,
                rank=rank,
                world_size=world,
                timeout=timeout,
                device_id=place if kind == "cuda" else None,
            )
            mesh = init_device_mesh(kind, (world,))
            alarm = Alarm(dist.PrefixStore("alarm", store), rank, world, _wake) if world > 1 else None
            return cls(rank, world, place, mesh, timeout_s, alarm)

    def maximum(self, tensor: Tensor) -> Tensor:
        """Return the greatest of all ranks' numbers, element by element, without a host synchronisation."""
        self._check()
        if self.world == 1:
            return tensor
        greatest = tensor.detach().clone()
        dist.all_reduce(greatest, dist.ReduceOp.MAX)
        return greatest

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, without a host synchronisation."""
        self._check()
        if self.world == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank gave, which JSON can hold, in order of ranks."""
        return [json.loads(text) for text in self.gather_bytes(json.dumps(value).encode())]

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Return the bytes that each rank gave, in order of ranks."""
        self._check()
        if self.world == 1:
            return [content]
        own = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8).to(self.device)
        length = torch.tensor([len(content)], device=self.device)
        lengths = [torch.empty_like(length) for _ in range(self.world)]
        dist.all_gather(lengths, length)
        sizes = [int(one) for one in lengths]
        padded = torch.zeros(max(*sizes, 1), dtype=torch.uint8, device=self.device)
        padded[: own.numel()] = own[: padded.numel()]
        received = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(received, padded)
        return [one[:size].cpu().numpy().tobytes() for one, size in zip(received, sizes, strict=True)]

    def check_same(self, value: Any, what: str) -> None:
        """Make sure that every rank has the same value, which JSON can hold.

        Raises:
            TrainingError: They differ.
        """
        everyone = self.gather(value)
        others = [rank for rank, one in enumerate(everyone) if one != everyone[0]]
        if others:
            raise TrainingError(
                f"{what} is {everyone[0]!r} on rank 0 and {everyone[others[0]]!r} on rank {others[0]}",
                allowed="the same on all ranks",
                next_step="start all processes with the same command",
            )

    @contextmanager
    def watched(self) -> Generator[None]:
        """Say in one error that another process failed, is gone or does not answer, whatever noticed it.

        Raises:
            TrainingError: An exchange failed, or took longer than the timeout; or replicas have parameters without gradient.
        """
        try:
            with lost_ranks(self.timeout_s):
                yield
        except TrainingError as error:
            failure = self._failure(wait=True) if _is_lost(error.__cause__) else None
            if failure is None:
                raise
            raise failure.error() from error
        except RuntimeError as error:
            if "finished reduction in the prior iteration" not in str(error):
                raise
            raise TrainingError(
                "some parameters of the replicas had no part in the loss, so their gradients were waited for in vain",
                allowed="modules of which every parameter gets a gradient in each step",
                next_step="freeze them with requires_grad_(False), or shard the module, or call replicate(..., unused=True)",
            ) from error

    def close(self) -> None:
        """Leave the group."""
        if self.alarm is not None:
            self.alarm.stop()
        if self.mesh is not None and dist.is_initialized():
            dist.destroy_process_group()

    def _failure(self, *, wait: bool = False) -> Failure | None:
        """Return which other process said that it failed."""
        failure = None if self.alarm is None else self.alarm.failure(wait=wait)
        return None if failure is None or failure.rank == self.rank else failure

    def _check(self) -> None:
        """Enter no exchange with a process that has failed.

        Raises:
            TrainingError: One has.
        """
        failure = self._failure()
        if failure is not None:
            raise failure.error()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception) and self.alarm is not None:
                self._tell(error, self.alarm)
        finally:
            self.close()

    def _tell(self, error: Exception, alarm: Alarm) -> None:
        """Tell the others of what ended this process, unless they told it first.

        Raises:
            TrainingError: What another process said, or what ended this one if it was no error of narrowcast's kind.
        """
        lost = any(map(_is_lost, _causes(error)))
        failure = self._failure(wait=lost)
        if failure is None and not lost:
            alarm.ring(error)
            if not isinstance(error, NarrowcastError):
                _log.error("rank %d failed", self.rank, exc_info=error)  # where it happened, for who wrote that code
                failure = Failure.of(self.rank, error)
        if failure is not None and str(failure.error()) != str(error):
            raise failure.error() from error


def replicate(
    module: nn.Module, ranks: Ranks, precision: str | Precision = "fp32", *, unused: bool = False
) -> nn.Module:
    """Return a module whose weights every rank holds, with the mean of all ranks' gradients; rank 0's weights count.

    Statistics such as those of batch normalisation are rank 0's.

    Args:
        module: On the ranks' device; it is prepared for the precision.
        ranks: The processes.
        precision: What the module will be trained in.
        unused: Whether some parameters may get no gradient in a step, which costs a walk through the graph each time.

    Returns:
        The module itself where there is one process.
    """
    policy_of(precision).prepare(module)
    if ranks.world == 1 or not any(one.requires_grad for one in module.parameters()):
        return module
    with ranks.watched():
        return DistributedDataParallel(
            module,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=unused,
        )


@contextmanager
def lost_ranks(timeout_s: float) -> Generator[None]:
    """Turn what the process group raises for a lost process into an error.

    Raises:
        TrainingError: Another process is gone or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"another process of this training is gone, or has not answered for {timeout_s:g} s: {first}",
            next_step="look at what the other processes said, then start all of them again with --resume",
        ) from error


def _is_lost(error: BaseException | None) -> bool:
    """Return whether it is what the process group raises for a lost process."""
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or bool(_LOST.search(str(error))))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it came from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _wake() -> None:
    """End the exchanges that this process waits in: NCCL's; gloo's end as soon as the process that failed does."""
    if dist.is_initialized() and dist.group.WORLD is not None:
        dist.group.WORLD.abort()


def _numbers(given: Mapping[str, str]) -> tuple[int, int, int]:
    """Return rank, number of ranks and rank on this machine."""
    missing = [name for name in _VARIABLES if name not in given]
    if missing:
        raise TrainingError(
            f"variables of torchrun are missing: {', '.join(missing)}",
            allowed="all of " + ", ".join(_VARIABLES) + ", or none",
            next_step="start with torchrun --nproc-per-node N -m narrowcast train CONFIG",
        )
    try:
        rank, world, local = (int(given[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError:
        rank, world, local = -1, 0, -1
    if not 0 <= rank < world or not 0 <= local < world:
        said = ", ".join(f"{name}={given[name]}" for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        raise TrainingError(
            f"variables of torchrun contradict each other: {said}", allowed="ranks from 0, below WORLD_SIZE"
        )
    return rank, world, local
