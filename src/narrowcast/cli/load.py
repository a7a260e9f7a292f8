"""``narrowcast load``: how a server that speaks the Open Inference Protocol fares under load."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from narrowcast.cli.console import Debug, Json, console, errors_console, print_json
from narrowcast.cli.files import check_file, write_file
from narrowcast.errors import OutputError, RuntimeMissingError, UserError

if TYPE_CHECKING:
    from narrowcast.load.session import Watch
    from narrowcast.measure.load.records import Records
    from narrowcast.measure.load.values import LoadResult

__all__ = ["load"]

_ASKED = "What is asked"
_SENT = "What is sent"
_HOW = "How it is sent"
_LET_IN = "How one is let in"
_SHOWN = "What is kept"
_VOID = 1
_UNWRITTEN = 2
_INTERRUPTED = 130

#: A file that was asked for, and what writes it.
_File = tuple[Path, Callable[[], None]]


def load(
    url: Annotated[
        str,
        typer.Argument(
            help="The server: http://HOST:PORT or grpc://HOST:PORT, https:// or grpcs:// over TLS; with --compare-batching an "
            "artifact or a folder of models.",
            metavar="URL",
            show_default=False,
        ),
    ],
    model: Annotated[str, typer.Option(help="Model to ask.", metavar="NAME", show_default=False)],
    version: Annotated[str, typer.Option(help="Its version; the server chooses unless given.", metavar="NUMBER")] = "",
    scenario: Annotated[
        str | None,
        typer.Option(
            help="rate (a fixed one, the default), server (the largest rate that holds --slo), single-stream, multi-stream, "
            "offline, or stress (past capacity and back).",
            metavar="NAME",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests per second; where the search begins (server), or the capacity if it is known (stress).",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    arrivals: Annotated[
        str | None,
        typer.Option(
            help="poisson (unless given), constant, gamma:CV (bursts), ramp:FROM:TO, or replay:FILE (seconds, one a line, "
            "or the records of an earlier run).",
            metavar="PROCESS",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Close the loop: so many requests under way (a capacity test); of offline too; of multi-stream those "
            "of a query.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(help="Bound on latency, as in p99=50ms.", metavar="BOUND", rich_help_panel=_ASKED),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Seconds that count (10); of each try of the search (5).", rich_help_panel=_ASKED),
    ] = None,
    warmup: Annotated[float, typer.Option(min=0, help="Seconds before them.", rich_help_panel=_ASKED)] = 1.0,
    overload: Annotated[
        float | None,
        typer.Option(help="Rate of the stress, as a multiple of capacity (2).", rich_help_panel=_ASKED),
    ] = None,
    compare_batching: Annotated[
        bool,
        typer.Option(
            "--compare-batching",
            help="Start two servers of a place, one that batches dynamically and one statically, and compare their goodput "
            "under --slo.",
            rich_help_panel=_ASKED,
        ),
    ] = False,
    serve_options: Annotated[
        str,
        typer.Option(
            "--serve",
            help='Options of narrowcast serve for both of them, as in "--max-batch 8 --delay 5".',
            metavar="OPTIONS",
            rich_help_panel=_ASKED,
        ),
    ] = "",
    batch: Annotated[
        str,
        typer.Option(
            help="Rows of a request, or a mix with weights as in 1:3,8:1.", metavar="ROWS", rich_help_panel=_SENT
        ),
    ] = "1",
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Shape of an input whose axes are open: [NAME=]1x3x224x224. May be given several times.",
            metavar="SHAPE",
            rich_help_panel=_SENT,
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="random, zeros, an .npz file with an array for each input, or the folder of an artifact for its reference "
            "inputs.",
            rich_help_panel=_SENT,
        ),
    ] = "random",
    encoding: Annotated[
        str, typer.Option(help="How REST tensors are written: binary or json.", rich_help_panel=_SENT)
    ] = "binary",
    seed: Annotated[int, typer.Option(min=0, help="Seed of arrivals and inputs.", rich_help_panel=_SENT)] = 0,
    timeout: Annotated[
        str, typer.Option(help="After which a request is given up.", metavar="TIME", rich_help_panel=_HOW)
    ] = "10s",
    connections: Annotated[
        int, typer.Option(min=1, help="Connections (gRPC: calls) that may be open together.", rich_help_panel=_HOW)
    ] = 512,
    processes: Annotated[int, typer.Option(min=1, help="Processes that send.", rich_help_panel=_HOW)] = 1,
    lateness: Annotated[
        str | None,
        typer.Option(
            help="A run is void if more than 1% of its requests are sent later than this: a tenth of the bound, or 5ms, "
            "unless given.",
            metavar="TIME",
            rich_help_panel=_HOW,
        ),
    ] = None,
    headers: Annotated[
        list[str] | None,
        typer.Option(
            "--header",
            help='Send it with every request: "Authorization: Bearer TOKEN"; @FILE for a file with one a line, which other '
            "users cannot see as they can see commands. What headers hold is never kept.",
            metavar="HEADER",
            rich_help_panel=_LET_IN,
        ),
    ] = None,
    cacert: Annotated[
        Path | None,
        typer.Option(
            help="Certificates that may vouch for the server; those of the system unless given.",
            metavar="FILE",
            rich_help_panel=_LET_IN,
        ),
    ] = None,
    cert: Annotated[
        Path | None,
        typer.Option(help="Certificate to show the server.", metavar="FILE", rich_help_panel=_LET_IN),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="Its private key, unless it is in the same file.", metavar="FILE", rich_help_panel=_LET_IN),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Do not check who the server is; the report says so.",
            rich_help_panel=_LET_IN,
        ),
    ] = False,
    records: Annotated[
        Path | None,
        typer.Option(
            help="Write what became of each request: .csv, .jsonl or .npz.", metavar="FILE", rich_help_panel=_SHOWN
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the report with all plots to this file.", metavar="FILE", rich_help_panel=_SHOWN),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files that are there.", rich_help_panel=_SHOWN)
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Load a server that speaks the Open Inference Protocol, and say how it fares.

    Requests are sent when they are due, whether earlier ones have been answered or not, and latency counts from then.

    Exit code 1 if the run is void, because the load generator could not keep its times or nothing was answered.

    For example: narrowcast load http://127.0.0.1:8000 --model NAME --rate 200 --scenario server --slo p99=50ms
    """
    try:
        from narrowcast.load.access import Access, read_access
        from narrowcast.load.asking import Wishes, check_sending, read_duration, settings_of
        from narrowcast.load.batching import compare_batching as compare
        from narrowcast.load.fleet import Options
        from narrowcast.load.inputs import read_batches
        from narrowcast.load.running import Load, Subject, run_load
        from narrowcast.load.session import Content
        from narrowcast.load.target import read_target
    except ImportError as error:
        raise RuntimeMissingError(
            f"load needs {error.name}, which is not installed", next_step="pip install 'narrowcast[serve]'"
        ) from error
    write_records = None if records is None else _writer(records)
    for file in (records, html):
        if file is not None:
            check_file(file, force)
    if encoding not in ("binary", "json"):
        raise UserError(f"encoding {encoding!r} is unknown", allowed="binary, json")
    access = read_access(headers or (), authorities=cacert, certificate=cert, key=key, insecure=insecure)
    let_in = "" if access == Access() else "--header, --cacert, --cert or --insecure"
    given = {"--scenario": scenario or "", "--version": version, "": let_in}
    _check_comparison(compare_batching, url, given, serve_options)
    scenario = "server" if compare_batching else scenario
    wishes = Wishes(scenario, rate, arrivals, concurrency, seconds, warmup, slo, overload, lateness, seed)
    content = Content(data, inputs or (), read_batches(batch), encoding)
    options = Options(processes, connections, read_duration(timeout))
    asked = Load(settings_of(wishes), content, options)
    check_sending(asked.settings, options)
    served = _serve_words(serve_options)
    target = None if compare_batching else read_target(url, access)
    with _watching(quiet=json) as watch:
        if target is None:
            result, kept = compare(Path(url), model, served, asked, watch)
        else:
            result, kept = run_load(Subject(target, model, version), asked, watch)
    files: dict[str, _File] = {}
    if html is not None:
        from narrowcast.report.load import render_load

        files["report"] = html, lambda: write_file(html, render_load(result))
    if records is not None and write_records is not None:
        files["records"] = records, lambda: write_records(records, kept)
    failure = _write(files)
    _show(result, {name: path for name, (path, _) in files.items()}, failure, json=json)
    if failure is not None and not json:
        raise failure
    if failure is not None:
        raise typer.Exit(_UNWRITTEN)
    if result.interrupted:
        raise typer.Exit(_INTERRUPTED)
    if result.run.void:
        raise typer.Exit(_VOID)


def _check_comparison(asked: bool, url: str, given: dict[str, str], serve_options: str) -> None:
    """Make sure that a comparison has servers to start, and that what is given fits it.

    Raises:
        UserError: An option contradicts it.
    """
    if not asked:
        if serve_options:
            raise UserError(
                "--serve says something about servers that are started", allowed="it with --compare-batching"
            )
        return
    if "://" in url:
        raise UserError(
            f"--compare-batching starts servers of its own and cannot use {url}",
            allowed="an artifact, or a folder of NAME/VERSION/artifact",
        )
    for name, value in given.items():
        if value and value != "server":
            words = f"{name} {value}".strip()
            raise UserError(f"--compare-batching and {words} contradict each other", next_step="leave one out")


def _serve_words(serve_options: str) -> list[str]:
    try:
        return shlex.split(serve_options)
    except ValueError as error:
        raise UserError(
            f"--serve {serve_options!r} cannot be read: {error}", allowed="options as a shell reads them"
        ) from error


def _write(files: dict[str, _File]) -> OutputError | None:
    """Write files and forget those that cannot be written, since a run that took its time is to be shown in any case."""
    failure: OutputError | None = None
    for name, (_, write) in list(files.items()):
        try:
            write()
        except OutputError as error:
            failure = error
            del files[name]
    return failure


def _show(result: LoadResult, written: dict[str, Path], failure: OutputError | None, *, json: bool) -> None:
    """Print what was found, and the files that were written."""
    if json:
        names = {name: str(written[name]) if name in written else None for name in ("report", "records")}
        error = {} if failure is None else {"error": {"type": type(failure).__name__, "message": str(failure)}}
        print_json(result.model_dump(mode="json") | names | error)
        return
    from narrowcast.report.load_terminal import render_load_terminal

    render_load_terminal(result, console())
    for name, path in written.items():
        console().print(f"{name}: {path}", markup=False, soft_wrap=True)


def _writer(path: Path) -> Callable[[Path, Records], None]:
    """Return what writes records in the format that a file's name asks for.

    Raises:
        UserError: It asks for none that there is.
    """
    from narrowcast.measure.load.records import as_csv, as_jsonl, as_npz

    writers: dict[str, Callable[[Path, Records], None]] = {
        ".csv": lambda file, kept: write_file(file, as_csv(kept)),
        ".jsonl": lambda file, kept: write_file(file, as_jsonl(kept)),
        ".npz": lambda file, kept: write_file(file, as_npz(kept)),
    }
    if path.suffix not in writers:
        raise UserError(f"records {path} have no format", allowed=f"a name that ends in {', '.join(writers)}")
    return writers[path.suffix]


@contextmanager
def _watching(*, quiet: bool) -> Generator[Watch]:
    """Yield what shows progress on stderr while a load runs; nothing is shown when quiet."""
    from narrowcast.load.session import Watch
    from narrowcast.report.load_live import LiveView

    with LiveView(errors_console(), quiet=quiet) as view:
        yield Watch(view.stage, view.tick)
