"""What the C library keeps of the memory that models leave behind."""

from __future__ import annotations

import ctypes
import platform

__all__ = ["give_back"]

_GLIBC = platform.libc_ver()[0] == "glibc"


def give_back() -> None:
    """Give freed memory back to the system; takes a few milliseconds, without the interpreter's lock.

    The C library of most Linux systems keeps what is freed between other blocks, in as many heaps as there were threads at a
    time. A server that loads models again and again otherwise grows by a third before it stays as large as it is.
    """
    if _GLIBC:
        ctypes.CDLL(None).malloc_trim(0)
