"""From a deployment to the file of one kind."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from narrowcast._version import __version__
from narrowcast.errors import ConfigError, choices
from narrowcast.serving.render import quoting
from narrowcast.serving.render.deployment import Deployment
from narrowcast.serving.render.pins import pins
from narrowcast.serving.text_templates import render_text

__all__ = ["KINDS", "Rendered", "check_kind", "render"]

#: Where containers have the models; KServe decides it itself.
_MODELS = "/srv/models"
_KSERVE_MODELS = "/mnt/models"
#: Folders that ``ProtectHome=yes`` of a unit hides.
_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
_PRIVILEGED_PORTS = 1024


@dataclass(frozen=True)
class Rendered:
    """A file: its usual name and its text."""

    name: str
    text: str


def _systemd(deployment: Deployment) -> dict[str, object]:
    words = (sys.executable, "-m", "narrowcast", "serve", *deployment.command_here())
    paths = [Path(sys.executable), Path(sys.prefix), *(place.absolute() for place in deployment.places)]
    return {
        "command": quoting.systemd_command(words),
        "home": any(path.is_relative_to(home) for path in paths for home in _HOMES),
        "low_port": any(port < _PRIVILEGED_PORTS for port in deployment.ports.values()),
    }


def _containerfile(deployment: Deployment) -> dict[str, object]:
    extras = deployment.extras
    versions = pins("narrowcast", extras)
    versions.pop("narrowcast", None)
    words = deployment.command_inside(_MODELS)
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "requirement": f"narrowcast[{','.join(extras)}]=={__version__}",
        "pins": [f"{name}=={version}" for name, version in versions.items()],
        "command": quoting.json_words(words),
        "entrypoint": quoting.json_words(["python", "-m", "narrowcast", "serve"]),
        "probe": quoting.json_words(["python", "-c", _probe(deployment.ports["http"])]),
    }


def _probe(port: int) -> str:
    return f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/v2/health/ready', timeout=4)"


def _compose(deployment: Deployment) -> dict[str, object]:
    return {
        "command": deployment.command_inside(_MODELS),
        "mounts": deployment.mounts(_MODELS),
        "address": _address(deployment.options.host),
    }


def _address(host: str) -> str:
    """Return the address that ports are published on.

    Raises:
        ConfigError: The host is a name.
    """
    try:
        return str(ipaddress.ip_address("127.0.0.1" if host == "localhost" else host))
    except ValueError:
        raise ConfigError(
            f"host {host!r} is no address, and ports are published on addresses", allowed="an address such as 127.0.0.1"
        ) from None


def _kubernetes(deployment: Deployment) -> dict[str, object]:
    return {"command": deployment.command_inside(_MODELS), "mounts": deployment.mounts(_MODELS)}


def _kserve(deployment: Deployment) -> dict[str, object]:
    return {
        "command": deployment.command_inside(_KSERVE_MODELS),
        "models": _KSERVE_MODELS,
        "mounts": deployment.mounts(_KSERVE_MODELS),
    }


@dataclass(frozen=True)
class _Kind:
    """The usual name of a file, what its template needs, and what the file is for."""

    file: str
    values: Callable[[Deployment], Mapping[str, object]]


KINDS: dict[str, _Kind] = {
    "systemd": _Kind("narrowcast.service", _systemd),
    "containerfile": _Kind("Containerfile", _containerfile),
    "compose": _Kind("compose.yaml", _compose),
    "kubernetes": _Kind("kubernetes.yaml", _kubernetes),
    "kserve": _Kind("kserve.yaml", _kserve),
}

_FILTERS = {
    "printable": quoting.printable,
    "yaml": quoting.yaml_word,
    "compose": quoting.compose_word,
    "kubernetes": quoting.compose_word,
    "systemd": quoting.systemd_word,
}


def check_kind(kind: str) -> None:
    """Make sure that there is such a kind of file.

    Raises:
        ConfigError: There is none.
    """
    if kind not in KINDS:
        raise ConfigError(f"nothing can be rendered for {kind!r}", allowed=choices(kind, KINDS))


def render(kind: str, deployment: Deployment) -> Rendered:
    """Return the file that deploys a server in one way.

    Args:
        kind: One of :data:`KINDS`.
        deployment: What to deploy.

    Raises:
        ConfigError: There is no such kind, or an option means nothing there.
        ArtifactError: A place is neither an artifact nor a folder of models.
    """
    check_kind(kind)
    chosen = KINDS[kind]
    values: dict[str, object] = {
        "administered": deployment.administered,
        "cores": deployment.cores,
        "image": f"narrowcast-serve:{__version__}",
        "memory": deployment.memory_bytes,
        "models": _MODELS,
        "ports": deployment.ports,
        "stop_seconds": deployment.stop_seconds,
        "version": __version__,
    }
    values |= chosen.values(deployment)
    template = Path(__file__).parent / "templates" / f"{chosen.file}.j2"
    return Rendered(chosen.file, render_text(template, values, _FILTERS))
