"""``narrowcast models``: what a running server serves, and changes to it."""

from __future__ import annotations

import http.client
import json as jsonlib
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import typer
from rich.table import Table

from narrowcast.cli.console import Debug, Json, console, print_json
from narrowcast.errors import ConfigError, RuntimeFailedError

__all__ = ["models"]

_SECONDS = 300.0


class Action(StrEnum):
    """What to do."""

    LIST = "list"
    LOAD = "load"
    UNLOAD = "unload"
    PROMOTE = "promote"
    ROLLBACK = "rollback"


def models(
    action: Annotated[Action, typer.Argument(help="What to do.")],
    name: Annotated[str, typer.Argument(help="Model; list takes none.")] = "",
    version: Annotated[str, typer.Argument(help="Version; promote alone takes one.")] = "",
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    token: Annotated[
        str, typer.Option("--admin-token", envvar="NARROWCAST_ADMIN_TOKEN", help="The server's token.")
    ] = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List what a server serves, load or unload a model, promote a version, or roll back to the one before."""
    if bool(name) != (action is not Action.LIST) or bool(version) != (action is Action.PROMOTE):
        raise ConfigError(
            f"models {action} {name} {version}".rstrip() + " does not say what to change",
            allowed="list, load NAME, unload NAME, promote NAME VERSION, rollback NAME",
        )
    if action is Action.LIST:
        _show(_ask(url, "/v2/repository/index", token), json=json)
        return
    middle = f"/versions/{quote(version, safe='')}" if version else ""
    _ask(url, f"/v2/repository/models/{quote(name, safe='')}{middle}/{action}", token)
    if json:
        print_json({"done": str(action), "model": name})
        return
    console().print(f"{action}: {name} {version}".rstrip(), markup=False)


def _show(entries: list[dict[str, str]], *, json: bool) -> None:
    if json:
        print_json({"models": entries})
        return
    table = Table("model", "version", "state", "reason")
    for entry in entries:
        table.add_row(entry["name"], entry["version"], entry["state"], entry["reason"])
    console().print(table)


def _ask(url: str, target: str, token: str) -> Any:
    """Return what a server answers to an empty POST.

    Raises:
        ConfigError: The URL is none, or nobody answers there.
        RuntimeFailedError: The server refuses.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(f"server {url!r} is no URL", allowed="http://HOST:PORT")
    connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=_SECONDS)
    try:
        connection.request("POST", target, headers={"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        body = response.read()
    except OSError as error:
        raise ConfigError(
            f"nobody answers at {url}: {error.strerror or error}", next_step="start narrowcast serve, or name its --url"
        ) from error
    finally:
        connection.close()
    answer = jsonlib.loads(body) if body else {}
    if response.status != http.HTTPStatus.OK:
        raise RuntimeFailedError(f"the server refuses ({response.status}): {answer.get('error', '')}")
    return answer
