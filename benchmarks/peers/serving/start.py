"""The same no-op model on other servers; runs in a peer's own environment and knows nothing of narrowcast.

python start.py PEER CORE

Each peer is set up as its documentation shows for one worker: it parses a request with four numbers, makes an FP32 array of
them, gives it back, and writes the answer. The port is printed as a line of JSON when the server answers; SIGTERM ends it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def command(peer: str, port: int, folder: Path) -> tuple[list[str | Path], str]:
    """Return the command that starts a peer, and the target that answers when it is ready."""
    if peer == "mlserver":
        settings = {"http_port": port, "grpc_port": free_port(), "metrics_port": free_port(), "host": "127.0.0.1"}
        (folder / "settings.json").write_text(json.dumps(settings | {"parallel_workers": 0, "debug": False}))
        model = {"name": "noop", "implementation": "mlserver_model.NoOp"}
        (folder / "model-settings.json").write_text(json.dumps(model))
        (folder / "mlserver_model.py").write_bytes((HERE / "mlserver_model.py").read_bytes())
        return [BIN / "mlserver", "start", folder], "/v2/models/noop/ready"
    if peer == "bentoml":
        service = ["serve", "bentoml_service:NoOp", "--host", "127.0.0.1", "--port", str(port)]
        return [BIN / "bentoml", *service, "--working-dir", HERE], "/readyz"
    return [sys.executable, HERE / f"{peer}_server.py", str(port)], "/health"


def wait(port: int, target: str, process: subprocess.Popen) -> None:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{target}", timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(process.returncode or 1)


def main() -> None:
    peer, core = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    port = free_port()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        line, target = command(peer, port, folder)
        environment = os.environ | {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": temporary}
        process = subprocess.Popen(line, stdout=sys.stderr, env=environment, start_new_session=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            wait(port, target, process)
            print(json.dumps({"http": port}), flush=True)
            process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            finally:
                with suppress(ProcessLookupError):  # what it left behind
                    os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
