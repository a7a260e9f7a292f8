"""Real text for training benchmarks: documentation that is on the machine anyway."""

import hashlib
import itertools
import os
import sys
from pathlib import Path


def collected_text(limit):
    """Return documentation that installed packages ship, as bytes, and what it is made of."""
    roots = sorted({Path(path) for path in sys.path if path.endswith("-packages") and Path(path).is_dir()})
    roots += [Path(os.__file__).parent]
    found, files, seen = bytearray(), 0, set()
    for root in roots:
        for path in sorted(itertools.chain(root.rglob("*.md"), root.rglob("*.rst"), root.rglob("*.txt"))):
            if path.name in ("top_level.txt", "entry_points.txt", "SOURCES.txt") or len(found) >= limit:
                continue
            text = path.read_bytes()
            digest = hashlib.sha256(text).digest()
            if 2000 <= len(text) <= 400_000 and digest not in seen and text.isascii():
                seen.add(digest)
                found += text[: limit - len(found)] + b"\n"
                files += 1
    kind = "*.md, *.rst and *.txt of installed packages"
    if len(found) < limit // 4:  # too few documents: the sources of the standard library, docstrings and all
        kind += ", and the standard library's sources"
        for path in sorted(Path(os.__file__).parent.glob("*.py")):
            found += path.read_bytes() + b"\n"
            files += 1
    return bytes(found), {
        "text": kind,
        "tokens": "bytes",
        "bytes": len(found),
        "files": files,
        "sha256": hashlib.sha256(found).hexdigest(),
    }
