"""Pages as tests read them: parsed, checked to need nothing else, and opened in a browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

__all__ = ["Page", "alone", "chromium"]

VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th", "p", "li", "dd", "dt", "h1", "h2", "h3"):
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def alone(source: str) -> Page:
    """Return a page that was found to be whole: it loads and runs nothing, names are given once, and drawings are sound."""
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "iframe", "img", "object", "embed"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, name, value)
    assert not re.search(r"url\(\s*['\"]?(?!#)", source)
    assert "@import" not in source
    assert "://" not in source
    assert "Content-Security-Policy" in source
    identities = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert [name for name, count in identities.items() if count > 1] == []
    for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        ElementTree.fromstring(svg)
    return page


def chromium(folder: Path, page: Path, *arguments: str) -> str:
    binary = shutil.which("chromium")
    if binary is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is not installed, so nobody opened the report")
        pytest.skip("chromium is not installed")
    profile = folder / f"profile-{len(list(folder.iterdir()))}"
    fixed = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    fixed += " --disable-component-update --disable-sync --disable-dev-shm-usage"
    command = [binary, *fixed.split(), f"--user-data-dir={profile}", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
