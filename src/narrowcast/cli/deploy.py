"""``narrowcast serve --render``: the command as a file that deploys it, instead of a server."""

from __future__ import annotations

from pathlib import Path

import typer

from narrowcast.cli.console import console, print_json
from narrowcast.cli.files import check_file, write_file
from narrowcast.cli.given import given
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.render import Deployment, Given, check_kind, render
from narrowcast.serving.server import ServerOptions

__all__ = ["given_options", "render_serve"]

#: Parameters of the command that deployments know by themselves, that are secret, or that are about rendering.
_LEFT_OUT = {"places", "host", "token", "render", "render_to", "engine", "json", "debug"}


def given_options(context: typer.Context) -> tuple[Given, ...]:
    """Return the options that were typed, with the values that were understood."""
    found: list[Given] = []
    for name, how in given(context).items():
        if name in _LEFT_OUT:
            continue
        value = context.params[name]
        if isinstance(value, bool):
            found.append(Given(how.name if value else how.off))
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        is_path = any(isinstance(item, Path) for item in values)
        found.append(Given(how.name, tuple(str(item) for item in values), is_path))
    return tuple(found)


def render_serve(
    context: typer.Context,
    kind: str,
    folder: Path | None,
    places: list[Path],
    hosting: Hosting,
    options: ServerOptions,
    *,
    json: bool,
) -> None:
    """Print the file that deploys a ``serve`` command in one way, or write it into a folder.

    Raises:
        ConfigError: There is no such way, or an option means nothing there.
        OutputError: The file is there already, or cannot be written.
        ArtifactError: A place is neither an artifact nor a folder of models.
    """
    check_kind(kind)
    rendered = render(kind, Deployment(tuple(places), hosting, options, given_options(context)))
    if folder is not None:
        file = folder / rendered.name
        check_file(file, force=False)
        write_file(file, rendered.text)
    if json:
        print_json({"file": str(folder / rendered.name) if folder else rendered.name, "text": rendered.text})
    elif folder is not None:
        console().print(str(folder / rendered.name), markup=False, soft_wrap=True)
    else:
        typer.echo(rendered.text, nl=False)
