"""What a server and its worker process write and read at the same moment: which batch has begun, which is taken back."""

from __future__ import annotations

import mmap
import os
import threading

import numpy as np

from narrowcast.serving.workers.arena import anonymous_file

__all__ = ["SLOTS", "Marks"]

#: Batches that a process may have: the one that it runs, the next, and one taken back that it has not seen yet.
SLOTS = 3


class Marks:
    """A few numbers in memory that a server and its worker process share.

    A batch is taken back by saying so and then looking whether it has begun; it is begun by saying so and then looking whether
    it was taken back. Whichever comes later sees the other, so a batch that was not seen to have begun never runs.

    Args:
        descriptor: The file behind it, which both processes have.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        memory = mmap.mmap(descriptor, 8 * (1 + SLOTS))
        self._numbers = np.frombuffer(
            memory, np.int64
        )  # the batch that began last, then the one taken back of each slot
        self._barrier = threading.Lock()

    @classmethod
    def create(cls) -> Marks:
        """Return marks of which another process may get the descriptor."""
        descriptor = anonymous_file()
        os.ftruncate(descriptor, 8 * (1 + SLOTS))
        return cls(descriptor)

    @property
    def begun(self) -> int:
        """The number of the batch that began last; 0 before the first."""
        return int(self._numbers[0])

    def recall(self, number: int) -> bool:
        """Take a batch back; return whether it had not begun, and so never will."""
        self._numbers[1 + number % SLOTS] = number
        self._order()
        return self.begun < number

    def begin(self, number: int) -> bool:
        """Begin a batch; return whether it may run, for it was not taken back."""
        self._numbers[0] = number
        self._order()
        return int(self._numbers[1 + number % SLOTS]) != number

    def _order(self) -> None:
        """Have what was written seen by other processors before what follows is read, as taking a lock does on x86.

        Elsewhere hundreds of instructions of the interpreter lie between the two.
        """
        with self._barrier:
            pass

    def close(self) -> None:
        """Give the memory back."""
        del self._numbers
        os.close(self.descriptor)
