"""The process that runs a model: ``python -m narrowcast.serving.workers.child SOCKET MARKS INPUTS... OUTPUTS... ARTIFACT``.

All but the last are descriptors that the server opened; memory for inputs, and then for outputs, as often as there are slots.
It ends when its server does, or closes the socket.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from narrowcast.errors import NarrowcastError
from narrowcast.serving.datatypes import datatype_of
from narrowcast.serving.workers.arena import Arena, Placed
from narrowcast.serving.workers.base import LoadedModel
from narrowcast.serving.workers.frames import pack, receive, write_signature
from narrowcast.serving.workers.loading import open_artifact
from narrowcast.serving.workers.marks import SLOTS, Marks

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Load the artifact, then run one batch after the other; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the whole group; the server decides
    *descriptors, artifact = arguments
    connection = socket.socket(fileno=int(descriptors[0]))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server has gone meanwhile
        return _serve(connection, [int(descriptor) for descriptor in descriptors[1:]], Path(artifact))
    return 0


def _serve(connection: socket.socket, descriptors: list[int], artifact: Path) -> int:
    marks, arenas = Marks(descriptors[0]), [Arena(descriptor) for descriptor in descriptors[1:]]
    try:
        model = open_artifact(artifact)
    except NarrowcastError as error:
        failure = {"type": type(error).__name__, "what": error.what, "allowed": error.allowed, "next": error.next_step}
        connection.sendall(pack({"refused": failure}))
        return 1
    connection.sendall(pack({"signature": write_signature(model.signature)}))
    for request in receive(connection):
        number = request["number"]
        # In this order: a server that does not see that it has begun may say that its time is over.
        if not marks.begin(number) or _late(request["before"]):
            answer: dict[str, Any] = {"left_out": True}
        else:
            slot = number % SLOTS
            answer = _run(model, request["inputs"], arenas[slot], arenas[SLOTS + slot])
        connection.sendall(pack(answer))
    return 0


def _late(before: int | None) -> bool:
    return before is not None and time.monotonic_ns() >= before


def _run(model: LoadedModel, placed: list[Placed], inputs: Arena, outputs: Arena) -> dict[str, Any]:
    """Run a batch, and return where its outputs are and what it took, or why there are none."""
    begun = time.monotonic_ns()
    try:
        given = model.run(inputs.read(placed))
        ran = time.monotonic_ns()
        tensors = [(name, datatype_of(array.dtype), [array]) for name, array in given.items()]
        known = [(name, datatype, parts) for name, datatype, parts in tensors if datatype is not None]
        written = outputs.write(known)
    except Exception as error:  # whatever a model raises is the answer to its requests
        what = error.what if isinstance(error, NarrowcastError) else f"{type(error).__name__}: {error}"
        return {"failed": what, "type": type(error).__name__}
    return {"outputs": written, "infer_ns": ran - begun, "output_ns": time.monotonic_ns() - ran}


if __name__ == "__main__":
    # Nothing is left to clean up: the memory is the server's, and sessions of some runtimes end slowly.
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
