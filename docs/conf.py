"""Sphinx configuration; the reference of the command line is generated here from the commands themselves.

What the pages on number formats and devices show is computed by the package too: see ``_ext/``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer
from sphinx.application import Sphinx

import narrowcast
from narrowcast.cli.app import app as commands

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import device_pages
import format_pages
import training_pages

project = "narrowcast"
author = "The narrowcast developers"
copyright = author
version = release = narrowcast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**/*.inc"]

html_theme = "furo"
html_title = f"narrowcast {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["formats.css"]
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

add_module_names = False
maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"exclude-members": "model_config"}
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if getattr(parameter, "is_flag", False) or parameter.default is None or callable(parameter.default):
        return ""
    return f"`{parameter.default}`"


def _forms(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    forms = ", ".join(f"`{form}`" for form in parameter.opts)
    return forms if getattr(parameter, "is_flag", False) else f"{forms} *{parameter.metavar or parameter.name.upper()}*"


def _command(name: str, command: Any) -> list[str]:
    described = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    arguments = " ".join(p.name.upper() for p in command.params if p.param_type_name == "argument")
    lines = [f"## narrowcast {name}", ""]
    for part in described:
        lines += [part, ""]
    lines += ["```text", f"narrowcast {name} [OPTIONS] {arguments}".rstrip(), "```", ""]
    lines += ["| | default | |", "|---|---|---|"]
    for parameter in command.params:
        described = " ".join((parameter.help or "").split()).replace("|", "\\|")
        lines.append(f"| {_forms(parameter)} | {_default(parameter)} | {described} |")
    return [*lines, ""]


def write_command_line(target: Path) -> None:
    """Write the arguments and options of every command as MyST, read from the commands."""
    group: Any = typer.main.get_command(commands)
    lines: list[str] = []
    for name, command in group.commands.items():
        lines += _command(name, command)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Generate before any source is read."""
    source = Path(app.srcdir)
    write_command_line(source / "reference" / "generated" / "commands.inc")
    format_pages.write(source / "formats" / "generated")
    device_pages.write(source / "reference" / "generated")
    training_pages.write(source / "reference" / "generated")
