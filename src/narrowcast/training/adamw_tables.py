"""Where the tensors of an update lie: tables on the device, by which one launch serves all tensors of a kind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from narrowcast.training.adamw_reference import Group, Member, logarithm

__all__ = ["Launch", "Layout", "Tables"]

_ALIGNMENT = 16  # bytes: what one thread reads at once


class Launch(NamedTuple):
    """A range of chunks whose tensors are of one kind; the chunks of all launches lie in one table."""

    first: int
    chunks: int
    group: int
    parameter: torch.dtype
    gradient: torch.dtype
    aligned: bool
    compensated: bool


class Layout(NamedTuple):
    """Where everything is, on the device.

    Args:
        launches: What the second pass runs; the first pass joins neighbours whose gradients are of one kind.
        rows: The members in the order of the rows of the tables: position in the groups, one after the other.
        addresses: Of parameters, gradients, moments and compensations: int64, shape [5, rows].
        lengths: Elements of each row: int64.
        indices: ``Member.number`` of each row: int32.
        places: Row in the step counters: int32.
        chunk_rows: Row of each chunk: int32, shape [chunks].
        chunk_members: Which member each chunk is of, in the order of the groups: int32, shape [chunks].
        chunk_starts: First element of each chunk: int64, shape [chunks].
        logarithms: Of both betas: float64, shape [rows, 2].
    """

    launches: list[Launch]
    rows: list[int]
    addresses: torch.Tensor
    lengths: torch.Tensor
    indices: torch.Tensor
    places: torch.Tensor
    chunk_rows: torch.Tensor
    chunk_members: torch.Tensor
    chunk_starts: torch.Tensor
    logarithms: torch.Tensor


class Tables:
    """The layout of the tensors of an optimizer, kept while none moves.

    Args:
        device: Where the tensors are.
        chunk: Elements that one program works on.
    """

    def __init__(self, device: torch.device, chunk: int) -> None:
        self._device = device
        self._chunk = chunk
        self._layout: Layout | None = None
        self._fixed: object = None
        self._gradients: list[int] = []
        self._kinds: list[tuple[torch.dtype, bool, torch.dtype, bool]] = []

    def of(self, groups: Sequence[Group]) -> Layout:
        """Return the layout: as it was, with new addresses of gradients, or new."""
        members = [member for group in groups for member in group.members]
        gradients = [member.gradient.data_ptr() for member in members]
        fixed = (
            [(len(group.members), group.betas) for group in groups],
            [member.parameter.data_ptr() for member in members],
            [member.exp_avg.data_ptr() for member in members],
            [member.exp_avg_sq.data_ptr() for member in members],
            [None if member.compensation is None else member.compensation.data_ptr() for member in members],
        )
        if self._layout is not None and fixed == self._fixed and gradients == self._gradients:
            return self._layout
        kinds = [_kind(member) for member in members]
        if self._layout is not None and fixed == self._fixed and kinds == self._kinds:
            moved = torch.tensor([gradients[row] for row in self._layout.rows], device="cpu")
            self._layout.addresses[1].copy_(_pinned(moved, self._device), non_blocking=True)
        else:
            self._layout = _lay_out(groups, self._device, self._chunk)
        self._fixed, self._gradients, self._kinds = fixed, gradients, kinds
        return self._layout


def _kind(member: Member) -> tuple[torch.dtype, bool, torch.dtype, bool]:
    """Return what tensors must have in common to share a launch."""
    tensors = [x for x in member[1:] if x is not None]
    aligned = all(x.data_ptr() % _ALIGNMENT == 0 for x in tensors)
    return member.gradient.dtype, aligned, member.parameter.dtype, member.compensation is not None


def _lay_out(groups: Sequence[Group], device: torch.device, chunk: int) -> Layout:
    listed = [(number, member) for number, group in enumerate(groups) for member in group.members]
    order = sorted(range(len(listed)), key=lambda at: (str(_kind(listed[at][1])), listed[at][0]))
    lengths = torch.tensor([listed[at][1].parameter.numel() for at in order], device="cpu")
    counts = (lengths + chunk - 1) // chunk
    chunk_rows = torch.repeat_interleave(torch.arange(len(order), device="cpu"), counts)
    chunk_starts = (torch.arange(len(chunk_rows), device="cpu") - (counts.cumsum(0) - counts)[chunk_rows]) * chunk
    launches, first, row = [], 0, 0
    for (kind, group), same in groupby(order, key=lambda at: (_kind(listed[at][1]), listed[at][0])):
        rows = len(list(same))
        chunks = int(counts[row : row + rows].sum())
        gradient, aligned, parameter, compensated = kind
        launches.append(Launch(first, chunks, group, parameter, gradient, aligned, compensated))
        first, row = first + chunks, row + rows
    pointers = [[0 if x is None else x.data_ptr() for x in listed[at][1][1:]] for at in order]
    addresses = torch.tensor(pointers, device="cpu").T
    betas = [[logarithm(beta) for beta in groups[listed[at][0]].betas] for at in order]

    def there(values: torch.Tensor) -> torch.Tensor:
        return _pinned(values.contiguous(), device).to(device, non_blocking=True)

    return Layout(
        launches,
        order,
        addresses=there(addresses),
        lengths=there(lengths),
        indices=there(torch.tensor([listed[at][1].number for at in order], dtype=torch.int32, device="cpu")),
        places=there(torch.tensor(order, dtype=torch.int32, device="cpu")),
        chunk_rows=there(chunk_rows.int()),
        chunk_members=there(torch.tensor(order, dtype=torch.int32, device="cpu")[chunk_rows]),
        chunk_starts=there(chunk_starts),
        logarithms=there(torch.tensor(betas, dtype=torch.float64, device="cpu")),
    )


def _pinned(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor that the device can fetch while the host goes on."""
    return values.pin_memory() if device.type == "cuda" else values
