"""``narrowcast serve --engine ray``: the same command on a Ray cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from narrowcast.cli.console import console, print_json
from narrowcast.cli.given import given, written
from narrowcast.errors import ConfigError, RuntimeMissingError
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.ray.plan import Scale, check_places
from narrowcast.serving.server import ServerOptions

__all__ = ["serve_on_ray"]

#: Parameters of the command that mean the same with Ray.
_MEANT = frozenset(
    {
        *("places", "host", "port", "grpc_port", "metrics_port", "grace", "token"),
        *("workers", "versions", "load", "load_timeout"),
        *("max_batch", "batching", "preferred", "pad", "delay", "queue", "timeout", "batch_timeout"),
        *("engine", "max_workers", "ray_address", "json", "debug"),
    }
)
#: Why others mean nothing there.
_WHY = {
    "placement": "Ray places the replicas, and each runs its model in a thread",
    "shared_memory": "replicas may be on other machines than clients",
    "log": "Ray keeps the logs of the replicas",
    "trace": "Ray has traces of its own",
    "render": "a file for Ray's own operator is not among those that can be rendered",
}


def serve_on_ray(
    context: typer.Context, places: list[Path], hosting: Hosting, options: ServerOptions, scale: Scale, *, json: bool
) -> None:
    """Serve on a cluster until SIGTERM.

    Raises:
        ConfigError: An option means nothing with Ray.
        RuntimeMissingError: Ray is not installed.
        NarrowcastError: A model cannot be loaded, or the cluster or a port cannot be had.
    """
    typed = given(context)
    for name in typed:
        if name in _MEANT:
            continue
        raise ConfigError(
            f"{written(context)[name].name} means nothing with --engine ray: "
            f"{_WHY.get(name, 'it is an option of servers on one machine')}",
            next_step="leave it out",
        )
    if options.port == 0 or options.metrics_port == 0 or ("grpc_port" in typed and options.grpc_port == 0):
        raise ConfigError("Ray cannot choose a port", allowed="numbers; gRPC and metrics may be left out with -1")
    if "grpc_port" not in typed:
        # Ray's proxy listens for gRPC on all addresses, whatever --host says: nobody gets that without asking for it.
        options = replace(options, grpc_port=None)
    names = check_places(places, hosting, scale)

    try:
        from narrowcast.serving.ray import engine
    except ImportError as error:
        raise RuntimeMissingError(
            f"the engine ray needs {error.name}, which is not installed", next_step="pip install 'narrowcast[ray]'"
        ) from error

    def listening(ports: dict[str, int], failed: dict[str, str]) -> None:
        loaded = [name for name in names if name not in failed]
        addresses = {
            name: f"{options.host}:{port}" if name == "grpc" else f"http://{options.host}:{port}"
            for name, port in ports.items()
        }
        if json:
            print_json({"listening": addresses, "models": loaded, "failed": failed})
            return
        for name, address in addresses.items():
            console().print(f"{name}: {address}", markup=False)
        console().print(f"models: {', '.join(loaded)}", markup=False)
        for name, why in failed.items():
            console().print(f"not loaded: {name}: {why}", markup=False)

    engine.run(places, hosting, scale, options, listening)
