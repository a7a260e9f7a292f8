"""``narrowcast serve --engine ray``: the same command on a Ray cluster."""

from __future__ import annotations

from pathlib import Path

import typer

from narrowcast.cli.console import console, print_json
from narrowcast.cli.given import given, written
from narrowcast.errors import ConfigError
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.ray.plan import Scale, plan
from narrowcast.serving.server import ServerOptions

__all__ = ["serve_on_ray"]

#: Parameters of the command that mean the same with Ray.
_MEANT = frozenset(
    {
        *("places", "host", "port", "grpc_port", "workers", "versions", "grace"),
        *("max_batch", "batching", "preferred", "pad", "delay", "queue", "timeout"),
        *("engine", "max_workers", "ray_address", "json", "debug"),
    }
)
#: Why others mean nothing there.
_WHY = {
    "placement": "Ray places the replicas, and each runs its model in a thread",
    "metrics_port": "Ray has metrics of its own, and statistics are at /v2/models/stats",
    "token": "what is served is changed by serving again",
    "shared_memory": "replicas may be on other machines than clients",
    "batch_timeout": "a thread cannot be ended, and Ray watches over replicas",
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
        NarrowcastError: A model cannot be loaded, or the cluster or a port cannot be had.
    """
    typed = given(context)
    refused = [name for name in typed if name not in _MEANT]
    if options.token is not None and "token" not in refused:
        refused.append("token")
    for name in refused:
        raise ConfigError(
            f"{written(context)[name].name} means nothing with --engine ray: "
            f"{_WHY.get(name, 'it is an option of servers on one machine')}",
            next_step="leave it out, and NARROWCAST_ADMIN_TOKEN too" if name == "token" else "leave it out",
        )
    if options.port == 0 or ("grpc_port" in typed and options.grpc_port == 0):
        raise ConfigError("Ray cannot choose a port", allowed="numbers; gRPC may be left out with -1")
    if "grpc_port" not in typed:
        # Ray's proxy listens for gRPC on all addresses, whatever --host says: nobody gets that without asking for it.
        options = ServerOptions(options.host, options.port, None, None, options.limits, grace=options.grace)
    models = plan(places, hosting, options.limits, options.grace)

    from narrowcast.serving.ray import engine

    def listening(ports: dict[str, int]) -> None:
        addresses = {
            name: f"{options.host}:{port}" if name == "grpc" else f"http://{options.host}:{port}"
            for name, port in ports.items()
        }
        names = [model.name for model in models]
        if json:
            print_json({"listening": addresses, "models": names})
            return
        for name, address in addresses.items():
            console().print(f"{name}: {address}", markup=False)
        console().print(f"models: {', '.join(names)}", markup=False)

    engine.run(models, scale, options, listening)
