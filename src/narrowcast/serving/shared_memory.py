"""Regions of system shared memory that clients register, as the shared memory extension has them.

They are read and written as files, never mapped: a client that truncates a mapped object would kill the server with a bus
error, and what was checked must be what is computed with, so inputs are copied anyway.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowcast.serving.refusals import Refusal, shown
from narrowcast.serving.signature import SharedSlice

__all__ = ["SharedMemory"]

#: A POSIX shared memory object: one slash, which many clients leave out, and a plain name.
_KEY = re.compile(r"/?([A-Za-z0-9_][A-Za-z0-9_.-]{0,254})")
_FOLDER = Path("/dev/shm")
_MOST_REGIONS = 256


@dataclass(frozen=True)
class _Region:
    key: str
    offset: int
    size: int
    descriptor: int


class SharedMemory:
    """Registered regions by name.

    Args:
        allowed: Whether clients may register any. A client that may can make the server read and write objects of other
            programs of the same user.
    """

    def __init__(self, *, allowed: bool) -> None:
        self._allowed = allowed
        self._regions: dict[str, _Region] = {}

    def register(self, name: str, key: Any, offset: Any, size: Any) -> None:
        """Open a region.

        Raises:
            Refusal: It is not allowed (403), the name is taken, the key is no plain name, there is no such object, or it
                is smaller than what is asked for (400).
        """
        if not self._allowed:
            raise Refusal(403, "shared memory is off; start the server with it to let clients register regions")
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if not name or match is None:
            raise Refusal(400, f"shared memory key {shown(key)} is no plain name")
        if type(offset) is not int or type(size) is not int or offset < 0 or size <= 0:
            raise Refusal(400, "a region needs an 'offset' of at least 0 and a 'byte_size' above 0")
        if name in self._regions or len(self._regions) >= _MOST_REGIONS:
            raise Refusal(400, f"region {name!r} is registered already, or {_MOST_REGIONS} regions are")
        self._regions[name] = _Region(key, offset, size, _opened(key, match[1], offset + size))

    def read(self, place: SharedSlice) -> bytes:
        """Return a copy of a part of a region.

        Raises:
            Refusal: There is no such region, or the part reaches past its end (400).
        """
        region, start = self._at(place)
        data = os.pread(region.descriptor, place.size, start)
        if len(data) != place.size:
            raise Refusal(400, f"the object behind region {place.region!r} has become smaller")
        return data

    def write(self, place: SharedSlice, data: bytes | memoryview) -> None:
        """Write to a part of a region.

        Raises:
            Refusal: There is no such region, the part reaches past its end, or its memory is used up (400).
        """
        region, start = self._at(place)
        if os.fstat(region.descriptor).st_size < region.offset + region.size:
            raise Refusal(400, f"the object behind region {place.region!r} has become smaller")
        try:
            os.pwrite(region.descriptor, data, start)
        except OSError as error:
            raise Refusal(400, f"region {place.region!r} cannot be written: {error.strerror}") from None

    def _at(self, place: SharedSlice) -> tuple[_Region, int]:
        region = self._regions.get(place.region)
        if region is None:
            raise Refusal(400, f"shared memory region {place.region!r} is not registered")
        if place.offset + place.size > region.size:
            raise Refusal(400, f"bytes {place.offset} to {place.offset + place.size} are past the end of the region")
        return region, region.offset + place.offset

    def unregister(self, name: str) -> None:
        """Close a region, or all of them where no name is given; one that is not registered is none."""
        for key in [name] if name else list(self._regions):
            region = self._regions.pop(key, None)
            if region is not None:
                os.close(region.descriptor)

    def status(self, name: str) -> list[dict[str, Any]]:
        """Return the registered regions, or one of them.

        Raises:
            Refusal: There is no region of that name (400).
        """
        if name and name not in self._regions:
            raise Refusal(400, f"shared memory region {name!r} is not registered")
        return [
            {"name": key, "key": region.key, "offset": region.offset, "byte_size": region.size}
            for key, region in sorted(self._regions.items())
            if not name or key == name
        ]


def _opened(key: str, name: str, size: int) -> int:
    """Return the descriptor of an object that is large enough; links are not followed."""
    try:
        descriptor = os.open(_FOLDER / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise Refusal(400, f"shared memory object {key!r} cannot be opened: {error.strerror}") from None
    if os.fstat(descriptor).st_size < size:
        os.close(descriptor)
        raise Refusal(400, f"shared memory object {key!r} is smaller than the region")
    return descriptor
