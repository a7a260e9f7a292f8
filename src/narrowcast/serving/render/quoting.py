"""How the words of a command are written in the files of others, so that they come out as they went in."""

from __future__ import annotations

import json
from collections.abc import Sequence

from narrowcast.errors import ConfigError

__all__ = ["compose_word", "json_words", "printable", "systemd_command", "systemd_word", "yaml_word"]


def printable(word: object) -> str:
    """Return a word that every one of the formats can hold.

    Raises:
        ConfigError: It has control characters, or others that do not print.
    """
    text = str(word)
    if not text.isprintable():
        raise ConfigError(f"{text!r} has characters that do not print", next_step="name it otherwise")
    return text


def yaml_word(word: object) -> str:
    """Return a YAML scalar in double quotes: what JSON calls a string is one."""
    return json.dumps(printable(word), ensure_ascii=False)


def compose_word(word: object) -> str:
    """The same for Compose files and the arguments of Kubernetes, where a dollar begins a variable unless it is doubled."""
    return yaml_word(str(word).replace("$", "$$"))


def json_words(words: Sequence[str]) -> str:
    """Return a JSON array, the exec form of instructions in container files."""
    return json.dumps([printable(word) for word in words], ensure_ascii=False)


def systemd_word(word: object) -> str:
    """Return a word of a setting in a unit: quotes and backslashes as in C, percent signs doubled."""
    text = printable(word).replace("%", "%%")
    if text and not set(text) & set(" \\\"'"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def systemd_command(words: Sequence[str]) -> str:
    """Return a command line for ``ExecStart=``: dollars are doubled behind the program, where variables are filled in.

    A word that is a semicolon alone would end the command.
    """
    program, *arguments = words
    shown = [systemd_word(word.replace("$", "$$")) if word != ";" else "\\;" for word in arguments]
    return " ".join([systemd_word(program), *shown])
