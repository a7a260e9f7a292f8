"""``narrowcast models``: what a running server serves, and changes to it."""

from __future__ import annotations

import http.client
import json as jsonlib
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import typer
from rich.table import Table

from narrowcast.cli.console import Debug, Json, console, print_json
from narrowcast.errors import ConfigError, RuntimeFailedError
from narrowcast.serving.administration import check_token

__all__ = ["models"]

#: A server gives up a load after 600 seconds unless it was told otherwise: its answer is waited for.
_SECONDS = 660.0
_USAGE = "list, load NAME, unload NAME, promote NAME VERSION, rollback NAME, split NAME [3=90,4=10 or off]"
_WEIGHTS = re.compile(r"\d{1,18}=\d+(\.\d+)?(,\d{1,18}=\d+(\.\d+)?)*")


class Action(StrEnum):
    """What to do."""

    LIST = "list"
    LOAD = "load"
    UNLOAD = "unload"
    PROMOTE = "promote"
    ROLLBACK = "rollback"
    SPLIT = "split"


def models(
    action: Annotated[Action, typer.Argument(help="What to do.")],
    name: Annotated[str, typer.Argument(help="Model; list takes none.")] = "",
    versions: Annotated[
        str,
        typer.Argument(
            help="For promote a version; for split weights by version as in 3=90,4=10, off, or nothing to see it."
        ),
    ] = "",
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    token: Annotated[
        str, typer.Option("--admin-token", envvar="NARROWCAST_ADMIN_TOKEN", help="The server's token.")
    ] = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List what a server serves, load or unload a model, promote a version, split requests among versions, or roll back."""
    wants = {Action.PROMOTE: (True,), Action.SPLIT: (True, False)}.get(action, (False,))
    if bool(name) != (action is not Action.LIST) or bool(versions) not in wants:
        raise ConfigError(
            f"models {action} {name} {versions}".rstrip() + " does not say what to change", allowed=_USAGE
        )
    server = _Server.of(url, token)
    if action is Action.LIST:
        _show(server.ask("POST", "/v2/repository/index"), json=json)
        return
    changed = _change(server, action, f"/v2/repository/models/{quote(name, safe='')}", versions)
    if json:
        print_json({"done": str(action), "model": name, **changed})
        return
    console().print(f"{action}: {name} {versions}".rstrip(), markup=False)
    for version, share in changed.get("traffic", {}).items():
        console().print(f"version {version} answers {share:.1%} of the requests that name none", markup=False)
    if not changed.get("kept", True):
        console().print(f"a restart will forget this: {changed.get('reason', '')}", markup=False)


def _change(server: _Server, action: Action, model: str, versions: str) -> dict[str, Any]:
    """Make a change, and return which versions answer after it."""
    if action is not Action.SPLIT:
        middle = f"/versions/{quote(versions, safe='')}" if versions else ""
        return server.ask("POST", f"{model}{middle}/{action}")
    if not versions:
        return server.ask("GET", f"{model}/traffic")
    if versions != "off" and not _WEIGHTS.fullmatch(versions):
        raise ConfigError(f"split {versions!r} cannot be read", allowed="weights by version as in 3=90,4=10, or off")
    pairs = [] if versions == "off" else [part.split("=") for part in versions.split(",")]
    weights = {version: float(weight) for version, weight in pairs}
    if len(weights) != len(pairs):
        raise ConfigError(f"split {versions!r} names a version twice", allowed="each version once")
    return server.ask("POST", f"{model}/traffic", {"weights": weights})


def _show(entries: list[dict[str, str]], *, json: bool) -> None:
    if json:
        print_json({"models": entries})
        return
    table = Table("model", "version", "state", "reason")
    for entry in entries:
        table.add_row(entry["name"], entry["version"], entry["state"], entry["reason"])
    console().print(table)


@dataclass(frozen=True)
class _Server:
    """A server that runs, and what lets us change it."""

    url: str
    host: str
    port: int
    token: str

    @classmethod
    def of(cls, url: str, token: str) -> _Server:
        """Return the server at a URL.

        Raises:
            ConfigError: The URL is none, or the token cannot be sent.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or 80
        except ValueError:
            host, port = None, 0
        if not host or not url.startswith("http://"):
            raise ConfigError(f"server {url!r} is no URL", allowed="http://HOST:PORT")
        if token:
            check_token(token)
        return cls(url, host, port, token)

    def ask(self, method: str, target: str, document: dict[str, Any] | None = None) -> Any:
        """Return what the server answers.

        Raises:
            ConfigError: Nobody answers there, or somebody else does.
            RuntimeFailedError: The server refuses, or does not answer in time.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_SECONDS)
        body = None if document is None else jsonlib.dumps(document)
        headers = {"Authorization": f"Bearer {self.token}".encode()} if self.token else {}
        try:
            connection.request(method, target, body, headers)
            response = connection.getresponse()
            text = response.read()
            answer = jsonlib.loads(text) if text else {}
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError) and connection.sock is not None:  # it was reached
                raise RuntimeFailedError(
                    f"{self.url} has not answered within {_SECONDS:g} s; what it was asked to do may still be under way",
                    next_step="see what became of it with narrowcast models list",
                ) from error
            said = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
            raise ConfigError(
                f"nobody answers at {self.url}: {said}", next_step="start narrowcast serve, or name its --url"
            ) from error
        except ValueError as error:
            raise ConfigError(
                f"{self.url} is no server of the Open Inference Protocol: its answer is no JSON",
                next_step="name the server's --url",
            ) from error
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            said = answer.get("error", "") if isinstance(answer, dict) else ""
            raise RuntimeFailedError(f"the server refuses ({response.status}): {said}")
        return answer
