"""The documentation runs: commands and code of the README and the tutorial, links, and what no text may name."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import typer

from narrowcast.cli.app import app
from narrowcast.data.loaders import load_data
from narrowcast.data.metrics import get_metric
from narrowcast.models.loaders import load_model

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("changelog.d/*.md"),
        *ROOT.glob("examples/*.md"),
        *(path for path in ROOT.glob("docs/**/*.md") if "_build" not in path.parts),
    ]
)
#: Pages whose commands and Python blocks are run, in the order of the page.
RUN = ["README.md", "docs/tutorial.md"]
#: What a page says that a command prints.
PRINTS = {'|| echo "exit code $?"': "exit code 3"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and its lines."""

    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"^```(\S*)[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def commands_of(block: Block) -> Iterator[str]:
    """Yield the commands of a shell block, continued lines joined, comments dropped."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        if line:
            yield line


def is_shell(block: Block) -> bool:
    return block.language in ("sh", "console", "bash", "shell")


def is_run(command: str) -> bool:
    """Whether a command is run; all others are checked: see check_without_running."""
    return not (command.startswith(("make ", "pip install ", "cd ")) or "my/" in command or "py:" in command)


def check_without_running(command: str) -> None:
    """Check a command that needs the user's files, a new environment or many minutes."""
    words = shlex.split(command)
    match words:
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        case ["pip", "install", "-e", requirement]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
                "optional-dependencies"
            ]
            found = re.fullmatch(r"\.\[(.*)\]", requirement)
            assert found is not None
            assert set(found.group(1).split(",")) <= set(extras)
        case ["cd", folder]:
            assert (ROOT / folder).is_dir()
        case ["narrowcast", name, *arguments]:
            parse(name, arguments)
        case _:
            raise AssertionError(f"neither run nor known: {command}")


def parse(name: str, arguments: list[str]) -> None:
    """Parse arguments as the command line would; an unknown option or a missing one raises."""
    group = typer.main.get_command(app)
    group.commands[name].make_context(name, list(arguments))


EVERY_COMMAND = [
    pytest.param(command, id=f"{page.relative_to(ROOT)}: {command[:60]}")
    for page in PAGES
    for block in blocks_of(page)
    if is_shell(block)
    for command in commands_of(block)
]


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_every_command_is_one_that_exists(command: str) -> None:
    first = command.split(" || ")[0]
    if first.startswith("python "):
        assert (ROOT / shlex.split(first)[1]).is_file()
    else:
        check_without_running(first)


def test_a_command_with_an_unknown_option_is_found() -> None:
    with pytest.raises(Exception, match="no-such-option"):
        parse("optimize", ["my/model.onnx", "--data", "npz:my/data.npz", "--out", "my/out", "--no-such-option", "1"])


# Running ----------------------------------------------------------------------------------------------------------


#: A sitecustomize.py, which Python imports before anything else; see Place.
HURRIED = "from hurry import hurry\nhurry()\n"


@dataclass
class Place:
    """A folder with the examples in it, and the commands that were run there already.

    The first optimisation runs as a reader's does. Later ones differ in what they ask for, not in how long they
    measure, so they measure for a moment only.
    """

    folder: Path
    done: set[str] = field(default_factory=set)

    def run(self, command: str, arguments: list[str]) -> str:
        """Run something once and return what it printed."""
        if command in self.done:
            return ""
        again = "optimize" in command and any("optimize" in other for other in self.done)
        self.done.add(command)
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        if again:
            before = (str(self.folder / "hurried"), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, before))
        finished = subprocess.run(
            arguments, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
        return finished.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "hurried").mkdir()
    (folder / "hurried" / "sitecustomize.py").write_text(HURRIED)
    return Place(folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_commands_and_code_run(page: str, place: Place) -> None:
    ran = 0
    for block in blocks_of(ROOT / page):
        if block.language == "python":
            place.run(block.text, [sys.executable, "-c", block.text])
            ran += 1
        for command in filter(is_run, commands_of(block) if is_shell(block) else ()):
            printed = place.run(command, ["bash", "-c", command])
            ran += 1
            for end, expected in PRINTS.items():
                assert not command.endswith(end) or expected in printed
    assert ran >= 5


def test_the_python_example_fits_its_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    model = load_model("py:own_python:model")
    data = load_data("py:own_python:data", model)
    metric = get_metric("py:own_python:margin")
    assert [info.name for info in model.graph.inputs] == ["features"]
    assert (data.size, len(np.unique(data.groups))) == (300, 60)
    assert (metric.needs, metric.higher_is_better) == ("original", True)
    scores = np.array([[3.0, 1.0], [0.5, 2.0]], np.float32)
    assert metric.terms(scores, scores)[:, 0].tolist() == [2.0, 1.5]


# Links and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors_of(found), f"{page.name} links to {target}"


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that MyST and GitHub give to headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readme_keeps_a_place_for_the_measured_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"<!-- demo-table:begin -->\n.+\n<!-- demo-table:end -->", text, re.DOTALL)


def tracked() -> list[Path]:
    """Return the files that git tracks, or, outside a checkout, those that a source archive holds."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    parts = [ROOT / name for name in ("src", "tests", "docs", "examples", "benchmarks", "constraints", "changelog.d")]
    return [*(p for p in ROOT.glob("*") if p.is_file()), *(p for part in parts for p in part.rglob("*") if p.is_file())]


#: Hosts of package registries, and folders that exist on one machine only; joined here, so that this file has none.
HOSTS = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"), ("npmjs", "org"))]
FOLDERS = [f"/{name}/" for name in ("work", "root", "tmp")]
FORBIDDEN = re.compile("|".join([*map(re.escape, HOSTS), *(rf"(?<![\w.~-]){folder}" for folder in FOLDERS)]))


def test_forbidden_names_are_found() -> None:
    assert FORBIDDEN.findall(f"https://files.{HOSTS[1]}/x and {FOLDERS[0]}main") == [HOSTS[1], FOLDERS[0]]
    assert not FORBIDDEN.search(f"a/relative{FOLDERS[0]}folder")


def test_no_text_names_a_registry_or_a_place_on_one_machine() -> None:
    found: list[str] = []
    for path in tracked():
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
            found += [f"{path.relative_to(ROOT)}:{number}: {word}" for word in FORBIDDEN.findall(line)]
    assert not found, "\n".join(found)
