"""The page about a running server: what it says as JSON, how it is sent, and what a browser makes of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving_models import doubled, function, request, write_artifact

from narrowcast.artifacts.manifest import Manifest
from narrowcast.errors import DataError
from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.watching import api
from narrowcast.serving.workers.sources import Placement

#: Would be markup, a program, or a broken attribute, if it were ever taken for more than text.
NASTY = "<img src=x onerror=document.title='owned'>\"'&amp;</script>"


def poisoned(inputs: Any) -> Any:
    if inputs["x"][:, 0].max() > 1e6:
        raise DataError("too much")
    return doubled(inputs)


@pytest.fixture
def running(serve: Any, tmp_path: Path, manifest_of: Callable[..., Manifest]) -> Any:
    """Model ``scale`` in versions 2 and 3, split, and 4, which is damaged; and a model with a nasty name.

    The latter has answered four requests in batches of 1, 2 and 2 rows, failed one, and refused two.
    """
    models = tmp_path / "models"
    for version in (2, 3):
        write_artifact(models / "scale" / str(version) / "artifact", manifest_of(), float(version))
    hosting = Hosting(Placement.INLINE, 1, Settings(Batching(8), queue=7))
    running = serve({NASTY: function(poisoned)}, (models,), hosting, metrics_port=0)
    catalogue = running.server.catalogue
    running.call(catalogue.split("scale", {2: 3.0, 3: 1.0}))
    damaged = write_artifact(models / "scale" / "4" / "artifact", manifest_of())
    (damaged / "model.onnx").write_bytes(b"damaged")
    assert running.admin("scale/versions/4/promote").status == 400
    scheduler = catalogue.find(NASTY).scheduler
    for rows in ([1.0], [1.0, 2.0], [3.0, 4.0], [2e6]):
        target = "/v2/models/" + "".join(f"%{byte:02X}" for byte in NASTY.encode()) + "/infer"
        assert running.ask("POST", target, request(*rows)).status == (400 if rows[0] > 1e6 else 200)
    for _ in range(2):
        scheduler.statistics.reject("queue_full")
    return running


def test_the_document_says_it_all(running: Any) -> None:
    answer = running.ask("GET", "/status", port="metrics")
    document = answer.json
    assert answer.headers["Content-Type"] == "application/json"
    assert document["state"] == "ready"
    assert document["placement"] == "inline"
    assert document["now"] > document["host"]["started"]
    assert document["gpus"] == []
    assert document["memory"].items() >= {"budget": None, "loads": 3, "evictions": 0}.items()
    models = {model["name"]: model["versions"] for model in document["models"]}
    assert models.keys() == {"scale", NASTY}
    assert [(item["version"], item["state"]) for item in models["scale"]] == [
        ("2", "READY"),
        ("3", "READY"),
        ("4", "UNAVAILABLE"),
    ]
    assert [item["loaded"] and item["loaded"]["share"] for item in models["scale"]] == [0.75, 0.25, None]
    assert "damaged" in models["scale"][2]["reason"]
    (nasty,) = models[NASTY]
    loaded = nasty["loaded"]
    assert loaded["workers_wanted"] == 1
    counted = loaded["counted"]
    assert counted["padding"] == counted["overruns"] == 0
    assert (loaded["workers"], loaded["pending"], loaded["queue"], loaded["running"]) == (1, 0, 7, 0)
    assert (counted["succeeded"], counted["failed"], counted["rows"], counted["executions"]) == (3, 1, 5, 3)
    assert counted["refused"] == {"queue_full": 2, "expired": 0}
    assert counted["batches"] == {"1": 1, "2": 2}
    assert sum(counted["buckets"]) == 3
    assert len(counted["buckets"]) == len(document["bounds"]) + 1
    times = counted["seconds"]
    assert 0 < times["model"] <= times["total"]
    assert sum(times[part] for part in ("queue", "input", "model", "output")) <= times["total"]


def test_the_states_of_a_server(running: Any) -> None:
    def state() -> str:
        return running.ask("GET", "/status", port="metrics").json["state"]

    assert state() == "ready"
    scheduler = running.server.catalogue.find("scale", "2").scheduler
    running.call(_down(scheduler))
    assert state() == "not ready"
    running.server._service.draining = True
    assert state() == "ending"


async def _down(scheduler: Any) -> None:
    (worker,) = scheduler._workers
    worker.on_down(worker)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/status?again", "application/json"),
    ],
)
def test_nothing_is_taken_for_what_it_is_not(running: Any, target: str, kind: str) -> None:
    answer = running.ask("GET", target, port="metrics")
    assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert running.ask("POST", target, port="metrics").status == 405
    assert running.ask("GET", target, port="http").status == 404, "not where models are asked"


@pytest.mark.parametrize("target", ["/page/page.js", "/../api.py", "/%2e%2e/api.py", "//", "/page.html"])
def test_no_other_file_is_sent(running: Any, target: str) -> None:
    assert running.ask("GET", target, port="metrics").status == 404


def test_the_page_asks_nobody_else_and_writes_no_markup() -> None:
    page = "".join((api._PAGE / name).read_text() for name in ("page.html", "page.js", "page.css"))
    assert set(re.findall(r"https?://[\w.]+", page)) <= {"http://www.w3.org"}, "the name of SVG alone"
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "@import", "url("):
        assert word not in page
    assert not re.search(r"<[^>]+\s(style|on\w+)=", page), "no attribute that the policy forbids"


# a browser ------------------------------------------------------------------------------------------------------------


def browse(folder: Path, url: str, *arguments: str) -> str:
    """Return what a headless browser says of a page that it has watched for a while."""
    binary = shutil.which("chromium")
    if binary is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is not installed, so nobody opened the page")
        pytest.skip("chromium is not installed")
    fixed = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    fixed += " --disable-component-update --disable-sync --disable-dev-shm-usage --virtual-time-budget=7000"
    profile = f"--user-data-dir={folder / 'profile'}-{len(list(folder.iterdir()))}"
    done = subprocess.run(
        [binary, *fixed.split(), profile, *arguments, url], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def words(markup: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", markup)).split())


@pytest.mark.slow
def test_a_browser_shows_the_server(running: Any, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{running.server.ports['metrics']}/"
    dom = browse(tmp_path, url, "--dump-dom")
    said = words(dom)
    assert "<title>ready: narrowcast at 127.0.0.1" in dom
    assert "2 models answer" in said
    assert NASTY in said, "as text"
    assert "<img" not in dom
    assert "owned" not in re.findall(r"<title>(.*?)</title>", dom)[0]
    assert re.search(r"Version 2 ready 75 % 1 .*?0 of 7", said)
    assert re.search(r"Version 3 ready 25 %", said)
    assert re.search(r"Version 4 not loaded .*damaged", said)
    assert re.search(r"failed 1, queue full 2", said)
    assert re.search(r"Batch sizes 3 batches .*1 row 33 % 2 rows 67 %", said)
    assert re.search(r"0 per second none refused", said), "two looks make a rate"
    assert "does not answer" not in said
    tables = re.findall(r"<table.*?</table>", dom, re.DOTALL)
    assert tables
    assert all("<th" in table and "scope=" in table for table in tables)
    assert re.findall(r"<h(\d)", dom)[:3] == ["1", "2", "3"]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1200, 2000), (400, 3000)], ids=["wide", "phone"])
def test_the_page_fits_its_window(running: Any, tmp_path: Path, width: int, height: int) -> None:
    seen = tmp_path / "seen.png"
    url = f"http://127.0.0.1:{running.server.ports['metrics']}/"
    browse(tmp_path, url, f"--screenshot={seen}", f"--window-size={width},{height}", "--hide-scrollbars")
    with Image.open(seen) as image:
        pixels = np.asarray(image.convert("L"), np.float64)
    assert pixels.shape == (height, width)
    assert min(band.std() for band in np.array_split(pixels[: height // 2], 3)) > 5, "there is something all the way"
    assert pixels[:, -8:].std() < 1, "nothing runs out of the window"


@pytest.mark.slow
def test_a_server_that_has_ended_is_said_to_be_silent(running: Any, tmp_path: Path) -> None:
    """The files of the page are sent, and its document is not."""
    server = running.server
    server._watch._status = lambda gpus: (_ for _ in ()).throw(RuntimeError("planted"))
    said = words(browse(tmp_path, f"http://127.0.0.1:{server.ports['metrics']}/", "--dump-dom"))
    assert "The server does not answer (status 500)" in said
