"""Peers of `serving.py`: what each needs, how it is asked, and the environment that it is installed in."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PEERS", "Peer", "python_of"]


@dataclass(frozen=True)
class Peer:
    """Another server.

    Attributes:
        name: As `peers/serving/start.py` knows it.
        packages: What pip installs for it.
        target: Path of its inference call.
        body: A request with four numbers in the form that it takes.
        answer: Part of the right answer, without spaces.
    """

    name: str
    packages: tuple[str, ...]
    target: str
    body: bytes
    answer: bytes


_V2 = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1.0,2.0,3.0,4.0]}]}'

PEERS = (
    Peer("fastapi", ("fastapi", "uvicorn[standard]", "numpy"), "/infer", _V2, b'"data":[1.0,2.0,3.0,4.0]'),
    Peer("litserve", ("litserve", "numpy"), "/predict", b'{"data":[1.0,2.0,3.0,4.0]}', b'{"data":[1.0,2.0,3.0,4.0]}'),
    Peer("mlserver", ("mlserver", "numpy"), "/v2/models/noop/infer", _V2, b'"data":[1.0,2.0,3.0,4.0]'),
    Peer("bentoml", ("bentoml", "numpy"), "/infer", b'{"x":[[1.0,2.0,3.0,4.0]]}', b"[[1.0,2.0,3.0,4.0]]"),
)


def python_of(peer: Peer, folder: Path) -> Path | str:
    """Return the interpreter of a peer's environment, which is made if it is not there, or why it cannot be made."""
    place = folder / peer.name
    python = place / "bin/python"
    done = place / "installed"
    if done.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *peer.packages]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode:
        return (installed.stderr.strip().splitlines() or ["pip failed"])[-1]
    frozen = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True)
    done.write_text(frozen.stdout)
    return python
