"""What of a trainer is kept between processes: everything that its next step depends on, as one state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from narrowcast.errors import TrainingError
from narrowcast.training.checks import unwrapped
from narrowcast.training.loss_scale import ScaleState
from narrowcast.training.policies import Precision
from narrowcast.training.rounding import WideUpdate
from narrowcast.training.settling import Books
from narrowcast.training.weighing import Unit

__all__ = ["Keeping"]


@dataclass(frozen=True)
class Keeping:
    """Saves and restores the parts of a trainer, between two windows and without a decision under way.

    Args:
        model: As it is called.
        optimizer: What moves it.
        precision: The policy.
        books: What decisions move.
        wide: What rounding cut off.
        unit: What micro-batches are weighed in.
    """

    model: nn.Module
    optimizer: Optimizer
    precision: Precision
    books: Books
    wide: WideUpdate
    unit: Unit

    def state(self, loss: Callable[..., Any]) -> dict[str, Any]:
        """Return the state, which refers to the tensors that training goes on with.

        Args:
            loss: The loss function, whose own state is kept if it is a module.
        """
        books = self.books
        return {
            "precision": self.precision.name,
            "model": unwrapped(self.model).state_dict(),
            "loss": loss.state_dict() if isinstance(loss, nn.Module) else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if books.schedule is None else books.schedule.state_dict(),
            "scale": dict(books.scale._asdict()),
            "rounding": self.wide.state_dict(),
            "counters": {"steps": books.steps, "skipped": books.skipped},
            "unit": self.unit.state_dict(),
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Make sure that a state was saved by such a trainer.

        Raises:
            TrainingError: It was saved in another precision or by an earlier version, or a schedule is missing on one side.
        """
        if state["precision"] != self.precision.name:
            raise TrainingError(
                f"the state was saved in precision {state['precision']}, and this trainer runs in {self.precision.name}",
                next_step=f"build the trainer with precision={state['precision']!r}, or load state['model'] alone",
            )
        if (self.books.schedule is None) != (state["schedule"] is None):
            raise TrainingError(
                f"the state holds {'no' if state['schedule'] is None else 'a'} schedule, and this trainer has "
                f"{'none' if self.books.schedule is None else 'one'}",
                next_step="build the trainer as it was when the state was saved",
            )
        if "unit" not in state:
            raise TrainingError(
                "the state was saved by an earlier version of narrowcast, which kept less than the next step depends on now",
                next_step="finish the run with the version that began it, or begin anew; load state['model'] alone to go on "
                "from its weights",
            )

    def load(self, state: Mapping[str, Any], loss: Callable[..., Any]) -> None:
        """Restore a state that was checked."""
        books = self.books
        with self.wide.held():
            self.optimizer.load_state_dict(dict(state["optimizer"]))
        unwrapped(self.model).load_state_dict(state["model"])
        if isinstance(loss, nn.Module):
            loss.load_state_dict(state["loss"])
        if books.schedule is not None:
            books.schedule.load_state_dict(dict(state["schedule"]))
        self.wide.load_state_dict(state["rounding"])
        books.scale = ScaleState(**state["scale"])
        books.steps, books.skipped = state["counters"]["steps"], state["counters"]["skipped"]
        self.unit.load_state_dict(state["unit"])
