"""Versions of everything that a server is made of, as they are installed here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from narrowcast.errors import RuntimeMissingError

__all__ = ["pins"]


def pins(package: str, extras: Sequence[str]) -> dict[str, str]:
    """Return the versions of a package's dependencies and theirs, as far as they are installed, by name in order.

    What this machine's markers leave out is left out. The package itself is in it under its name.

    Raises:
        RuntimeMissingError: The package as it is installed knows no such extra.
    """
    for extra in extras:
        if extra not in (distribution(package).metadata.get_all("Provides-Extra") or ()):
            raise RuntimeMissingError(
                f"{package} as it is installed knows no extra {extra!r}", next_step=f"pip install '{package}[{extra}]'"
            )
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(package, extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # an extra that is not here: the image gets what its index has
        found[name] = installed.version
        for text in installed.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(needed.name), more) for more in ("", *needed.extras)]
    return dict(sorted(found.items()))
