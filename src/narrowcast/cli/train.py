"""``narrowcast train``: a network from a config, in mixed precision, with checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from narrowcast.cli.console import Debug, Json, console, errors_console, print_json
from narrowcast.errors import ConfigError

if TYPE_CHECKING:
    from narrowcast.training.assembly import Assembled
    from narrowcast.training.loss_scale import Scale
    from narrowcast.training.objectives import Result
    from narrowcast.training.outcome import RunResult
    from narrowcast.training.tune import Tuned

__all__ = ["train"]


def train(
    config: Annotated[Path, typer.Argument(help="Config of the run: a YAML file.", metavar="CONFIG")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; runs/NAME unless given, after the config's name.", metavar="DIR"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precision in place of the config's: fp32, tf32, bf16-mixed, fp16-mixed, bf16-true or fp8-mixed.",
            metavar="NAME",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A value in place of the config's. May be given several times.", metavar="KEY=VALUE"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder, if there is one.")
    ] = False,
    tune: Annotated[
        int | None,
        typer.Option(min=1, help="Search the config's tune.space until so many trials are done.", metavar="N"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is in the folder.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a network in mixed precision, and write a folder that every other command takes as a model.

    On several devices: torchrun --nproc-per-node N -m narrowcast train CONFIG

    Ctrl-C writes a checkpoint and ends with exit code 130; --resume goes on from it.
    """
    from narrowcast.training.reading import read_config

    overrides = [*(set_ or []), *([f"precision.name={precision}"] if precision is not None else [])]
    settings = read_config(config, overrides)
    folder = out or Path("runs") / config.stem
    shown = _Shown(quiet=json or not _leads())
    try:
        if tune is None:
            from narrowcast.training.run import fit

            with shown:
                result = fit(settings, folder, resume=resume, force=force, progress=shown)
        else:
            from narrowcast.training.tune import tune as search

            if settings.tune is None:
                raise ConfigError(
                    f"--tune with {config}, which has no section tune",
                    allowed="tune.space: values by key",
                    next_step="add for example tune: {space: {optimizer.lr: {low: 1e-4, high: 1e-1, log: true}}}",
                )
            with shown:
                found = search(settings, folder, trials=tune, resume=resume, force=force, progress=shown)
            if _leads():
                _tell_tuned(found, folder, json)
            return
    except KeyboardInterrupt:
        if _leads():
            errors_console().print(
                "interrupted; the same command with --resume goes on from the last checkpoint, which is of this moment "
                "if training had begun",
                style="yellow",
            )
        raise typer.Exit(130) from None
    if not _leads():
        return
    if json:
        print_json(result.model_dump_json(indent=1))
    else:
        _tell(result, folder)


def _leads() -> bool:
    """Return whether this is the only process, or the first of those that train together."""
    import os

    return os.environ.get("RANK", "0") == "0"


class _Shown:
    """A run on the terminal: what it is, a moving line, and a line for each validation."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = errors_console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=None, numbers="")
        self._headed = False

    def __enter__(self) -> None:
        """Begin with nothing: the line appears when training starts."""

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def started(self, run: Assembled, out: Path, step: int) -> None:
        if not self._quiet:
            lines = [] if self._headed else _described(run)  # a search says it once, for all its trials
            for name, text in [*lines, ("folder", f"{out}, going on after step {step}" if step else str(out))]:
                console().print(f"{name + ':':<10} {text}", markup=False, soft_wrap=True)
            self._headed = True
        self._bar.update(self._task, total=run.windows, completed=step)
        self._bar.start()

    def stepped(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def logged(self, step: int, line: dict[str, Any]) -> None:
        parts = [f"loss {line['loss']:.4f}"]
        if line["scale"] != 1:
            parts.append(f"scale {line['scale']:g}")
        if line["skipped"]:
            parts.append(f"{line['skipped']} skipped")
        if line["samples_per_s"]:
            parts.append(f"{line['samples_per_s']:,.0f} samples/s")
        self._bar.update(self._task, numbers=", ".join(parts))

    def validated(self, step: int, result: Result) -> None:
        if self._console.is_terminal:
            self.note(f"step {step}: validation {_score(result)}")

    def note(self, text: str) -> None:
        if not self._quiet:
            self._bar.console.print(f"  {text}", markup=False, soft_wrap=True)


def _described(run: Assembled) -> list[tuple[str, str]]:
    """Return what a run is, as lines."""
    config, parts = run.config, run.parts
    shares = [f"{parts.train.size:,} samples to train on"]
    if parts.validation is not None:
        shares.append(f"{parts.validation.size:,} to validate on")
    shares.append(f"{parts.report.size:,} to report on")
    sources = dict.fromkeys(part.source for part in parts if part is not None)
    length = f"{config.epochs} epochs" if config.epochs is not None else f"{config.steps} steps"
    batch = f"batches of {config.batch}" + (f", {config.accumulate} to a step" if config.accumulate > 1 else "")
    lines = [
        ("network", f"{run.architecture.name}, {run.parameters:,} parameters"),
        ("data", f"{', '.join(sources)}: {', '.join(shares)}"),
        ("precision", f"{run.policy.name} on {run.ranks.device.type}, {_scaling(run.policy.scale)}"),
        ("training", f"{length} ({run.windows:,} steps), {batch}, {config.optimizer.name}, seed {config.seed}"),
    ]
    if config.distill is not None:
        lines.append(("teacher", config.distill.teacher))
    return lines


def _scaling(scale: Scale) -> str:
    """Return how losses are scaled, in words."""
    first = scale.start().value
    if not scale.guards:
        return "no loss scaling"
    return f"loss scale {first:g}, " + (
        "static" if scale.after(scale.start(), finite=False).value == first else "dynamic"
    )


def _score(result: Result) -> str:
    interval = "" if result.low is None else f" (95 % interval {result.low:.4f} to {result.high:.4f})"
    return f"{result.metric} {result.value:.4f}{interval}"


def _tell(result: RunResult, folder: Path) -> None:
    """Print what became of a run, where it lies, and what can be done with it next."""
    screen = console()
    report = result.parts["report"]
    skipped = f", {result.skipped} left out" if result.skipped else ""
    data = report.source
    seed = f" --seed {result.split_seed}" if result.split_seed else ""
    lines = [
        f"trained:   {result.steps:,} steps in {result.seconds:.0f} s{skipped}",
        f"report:    {_score(result.report)} on {result.report.samples:,} samples of {data} that were not trained on",
        *(f"doctor:    {sentence}" for sentence in result.doctor or ()),
        f"model:     {folder} (model.safetensors, result.json, log.jsonl)",
        f"next:      narrowcast optimize {folder} --data {data} --max-drop 0.5pt --out {folder}-int8{seed}",
    ]
    screen.print("\n".join(lines), markup=False, soft_wrap=True)


def _tell_tuned(found: Tuned, folder: Path, json: bool) -> None:
    if json:
        print_json(found.model_dump_json(indent=1))
        return
    screen = console()
    table = Table("trial", found.metric, *found.keys, "state")
    for trial in found.trials:
        value = "" if trial.value is None else f"{trial.value:.4f}"
        settings = (_short(trial.settings.get(key, "")) for key in found.keys)
        table.add_row(str(trial.number) + (" *" if trial.number == found.best else ""), value, *settings, trial.state)
    screen.print(table)
    screen.print(
        f"best:      trial {found.best} (*), written to {folder / 'best.yaml'}\n"
        f"next:      narrowcast train {folder / 'best.yaml'}",
        markup=False,
        soft_wrap=True,
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
