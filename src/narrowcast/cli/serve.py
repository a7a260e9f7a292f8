"""``narrowcast serve``: artifacts as a service that speaks the Open Inference Protocol."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from narrowcast.cli.console import Debug, Json, console, print_json
from narrowcast.errors import ConfigError, RuntimeMissingError

if TYPE_CHECKING:
    from narrowcast.serving.server import InferenceServer

__all__ = ["serve"]


_LISTENS = "Where it listens, and for whom"
_MODELS = "Which models, and where they run"
_QUEUE = "Who runs when"
_WATCHED = "What can be watched"
_ELSEWHERE = "Another engine, or files that deploy"


def serve(
    context: typer.Context,
    places: Annotated[
        list[Path], typer.Argument(help="Artifact folders, or folders of NAME/VERSION/artifact.", metavar="PLACE...")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is this machine alone.", rich_help_panel=_LISTENS)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the REST protocol; 0: any.", rich_help_panel=_LISTENS)
    ] = 8000,
    grpc_port: Annotated[
        int,
        typer.Option(min=-1, max=65535, help="Port of the gRPC protocol; 0: any, -1: none.", rich_help_panel=_LISTENS),
    ] = 8001,
    metrics_port: Annotated[
        int,
        typer.Option(
            min=-1, max=65535, help="Port of the Prometheus metrics; 0: any, -1: none.", rich_help_panel=_LISTENS
        ),
    ] = 8002,
    placement: Annotated[
        str,
        typer.Option(
            help="Where models run: process (survives anything), thread, or inline (small models).",
            rich_help_panel=_MODELS,
        ),
    ] = "process",
    workers: Annotated[int, typer.Option(min=1, help="Workers of each model version.", rich_help_panel=_MODELS)] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows that run together at most.", rich_help_panel=_QUEUE)] = 32,
    batching: Annotated[
        str,
        typer.Option(
            help="dynamic: what waits runs together; static: full batches alone, filled up after --delay.",
            rich_help_panel=_QUEUE,
        ),
    ] = "dynamic",
    preferred: Annotated[
        str, typer.Option(help="Batch sizes that run at once, as in 4,8.", rich_help_panel=_QUEUE)
    ] = "",
    pad: Annotated[
        bool, typer.Option("--pad", help="Fill batches up to the next preferred size.", rich_help_panel=_QUEUE)
    ] = False,
    delay: Annotated[
        float,
        typer.Option(min=0, help="Milliseconds that the oldest request waits for company.", rich_help_panel=_QUEUE),
    ] = 0.0,
    queue: Annotated[
        int, typer.Option(min=1, help="Requests of a model that may wait; more are refused.", rich_help_panel=_QUEUE)
    ] = 1024,
    timeout: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds that a request waits where its client says nothing; 0: for ever.",
            rich_help_panel=_QUEUE,
        ),
    ] = 60.0,
    batch_timeout: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds that a batch may run before its worker is ended; 0: for ever.", rich_help_panel=_QUEUE
        ),
    ] = 120.0,
    versions: Annotated[
        str,
        typer.Option(
            help="Versions to load: a number of the newest, all, or numbers as in =3,7.", rich_help_panel=_MODELS
        ),
    ] = "1",
    load: Annotated[
        str,
        typer.Option(
            help="When models are loaded: startup, or on-demand, which is at their first request.",
            rich_help_panel=_MODELS,
        ),
    ] = "startup",
    load_timeout: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds that a model version may take to load before that is broken off; 0: for ever.",
            rich_help_panel=_MODELS,
        ),
    ] = 600.0,
    memory_budget: Annotated[
        str,
        typer.Option(
            help="Memory that loaded models may take, as in 4GiB; the least recently used make room for others.",
            rich_help_panel=_MODELS,
        ),
    ] = "",
    token: Annotated[
        str | None,
        typer.Option(
            "--admin-token",
            envvar="NARROWCAST_ADMIN_TOKEN",
            help="Turns load, unload, promote and rollback on, for those who send it.",
            rich_help_panel=_LISTENS,
        ),
    ] = None,
    shared_memory: Annotated[
        bool,
        typer.Option("--shared-memory", help="Let clients register POSIX shared memory.", rich_help_panel=_LISTENS),
    ] = False,
    log: Annotated[
        str,
        typer.Option(
            help="What goes to stderr: quiet (warnings), events, text or json (a line for each request too), json-events.",
            rich_help_panel=_WATCHED,
        ),
    ] = "events",
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Send traces over OTLP/HTTP, where OTEL_EXPORTER_OTLP_ENDPOINT says.",
            rich_help_panel=_WATCHED,
        ),
    ] = False,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that requests have to finish at the end.", rich_help_panel=_LISTENS)
    ] = 30.0,
    engine: Annotated[
        str,
        typer.Option(
            help="Who runs replicas: local (this program), or ray (a Ray cluster).", rich_help_panel=_ELSEWHERE
        ),
    ] = "local",
    max_workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With ray: workers of a model version at most, as load asks for them.",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="With ray: the cluster, HOST:PORT or auto; else one is started here.", rich_help_panel=_ELSEWHERE
        ),
    ] = None,
    render: Annotated[
        str | None,
        typer.Option(
            help="Do not serve; print the file that deploys this command: systemd, containerfile, compose, "
            "kubernetes or kserve.",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
    render_to: Annotated[
        Path | None, typer.Option(help="Folder to write that file into instead.", rich_help_panel=_ELSEWHERE)
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve artifacts over HTTP until SIGTERM; exit code 1 if requests were cut off at the end of the grace."""
    # gRPC would report, for each worker process, that it did not prepare for a fork; the worker is another program.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    try:
        from narrowcast.serving import running
        from narrowcast.serving.administration import check_token
        from narrowcast.serving.catalogue import Hosting
        from narrowcast.serving.memory import read_bytes
        from narrowcast.serving.repository import Repository
        from narrowcast.serving.server import ServerOptions
        from narrowcast.serving.settings import read_options, read_sizes
        from narrowcast.serving.watching.logs import read_log_style
    except ImportError as error:
        raise RuntimeMissingError(
            f"serving needs {error.name}, which is not installed", next_step="pip install 'narrowcast[serve]'"
        ) from error
    if token is not None:
        check_token(token)
    said: dict[str, Any] = {
        "placement": placement,
        "workers": workers,
        "versions": versions,
        "load": load,
        "batching": batching,
        "max_batch": max_batch,
        "delay": delay,
        "preferred": read_sizes(preferred),
        "pad": pad or None,
        "queue": queue,
        "timeout": timeout,
        "batch_timeout": batch_timeout,
    }
    hosting = read_options(said, "serve").over(Hosting())
    options = ServerOptions(
        host,
        port,
        None if grpc_port < 0 else grpc_port,
        None if metrics_port < 0 else metrics_port,
        token=token,
        shared_memory=shared_memory,
        grace=grace,
        memory_budget=read_bytes(memory_budget) if memory_budget else None,
        load_timeout=load_timeout or None,
    )
    if engine != "local":
        from narrowcast.cli.ray import serve_on_ray
        from narrowcast.serving.ray.plan import Scale, check_engine

        check_engine(engine)
        serve_on_ray(context, places, hosting, options, Scale(max_workers, ray_address), json=json)
        return
    if max_workers is not None or ray_address is not None:
        raise ConfigError(
            "--max-workers and --ray-address are for Ray", next_step="add --engine ray, or leave them out"
        )
    if render is not None:
        from narrowcast.cli.deploy import render_serve

        render_serve(context, render, render_to, places, hosting, options, json=json)
        return

    def listening(server: InferenceServer) -> None:
        addresses = {
            name: f"{host}:{number}" if name == "grpc" else f"http://{host}:{number}"
            for name, number in server.ports.items()
        }
        names = server.catalogue.names
        if json:
            print_json({"listening": addresses, "models": names})
            return
        for name, address in addresses.items():
            shown = f"{address}/metrics (a page for people: {address}/)" if name == "metrics" else address
            console().print(f"{name}: {shown}", markup=False, soft_wrap=True)
        none = "none; a folder of models holds NAME/VERSION/artifact"
        console().print(f"models: {', '.join(names) or none}", markup=False, soft_wrap=True)

    if not running.serve(Repository(places), hosting, options, listening, read_log_style(log), trace=trace):
        raise typer.Exit(1)
