"""``narrowcast advise``: what to change about a model for a device, what it brings, and who says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrowcast.cli.console import Debug, Json, console, print_json
from narrowcast.cli.numbers import plain
from narrowcast.cli.tracing import tracing

if TYPE_CHECKING:
    from narrowcast.accounting.advice import Advice, Context

__all__ = ["advise"]

#: Names of operators shown per item; the JSON has all.
SHOWN_NAMES = 4
_EFFORT = {
    "exact": "outputs stay the same up to rounding",
    "accuracy": "no training, but measure the accuracy",
    "retrain": "another design: train again",
}
_WAITING = {"compute": "arithmetic", "memory": "memory", "overhead": "operators to start"}


def advise(
    model: Annotated[
        str,
        typer.Argument(
            help="timm:NAME, torchvision:NAME, py:MODULE:FUNCTION, bundled:NAME, hf:DIR or a path to an .onnx file.",
            metavar="MODEL",
            show_default=False,
        ),
    ],
    device: Annotated[
        str, typer.Option(help="Where it is to run; narrowcast devices lists what is known.", show_default=False)
    ],
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, bf16, int8-static ...; the module's own half precision, or the widest that the device multiplies "
            "in, unless given."
        ),
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="onnxruntime or torch; the usual one for the device unless given.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of an input: [NAME=]1x3x224x224[:DTYPE]. May be given several times."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a language model (128 unless given).")] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Decode: count one new token (or --tokens) after so many whose keys and values are cached."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples, where no shape is given (1).")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Show only so many items.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show also what brings less than 0.5 %.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what to change about a model for a device, ordered by what it saves there.

    Nothing runs: the model is counted, and each item's gain is what the estimated time loses if its operators change.

    For example: narrowcast advise timm:resnet50 --device t4
    """
    from narrowcast.accounting.advice import Context, default_policy
    from narrowcast.accounting.advice import advise as find
    from narrowcast.accounting.devices import device as device_of
    from narrowcast.accounting.policies import policy
    from narrowcast.accounting.profile import profile
    from narrowcast.accounting.sources import source

    target = device_of(device)
    given = policy(precision) if precision else None
    with tracing([model], debug=debug):
        counted = profile(source(model, inputs=inputs or [], tokens=tokens, batch=batch, context=context))
        looked = Context(counted, target, given or default_policy(target, counted.parameters.dtype), runtime)
        found = find(looked)
    shown = [item for item in found if everything or item.worth_showing][:top]
    if json:
        print_json(_as_json(looked, shown))
    else:
        _print(looked, shown, hidden=len(found) - len(shown), screen=console())


def _as_json(context: Context, shown: list[Advice]) -> dict[str, Any]:
    about = {"model": context.profile.model, "inputs": context.profile.inputs}
    return (
        about | context.estimate.model_dump(mode="json") | {"advice": [item.model_dump(mode="json") for item in shown]}
    )


def _print(context: Context, shown: list[Advice], *, hidden: int, screen: Console) -> None:
    for line, style in _heading(context):
        screen.print(plain(line, screen), style=style)
    for number, item in enumerate(shown, start=1):
        screen.print()
        screen.print(plain(Text.assemble((f"{number}. {item.title}", "bold"), (_gain(item), "green")), screen))
        facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        facts.add_column(style="bright_black", no_wrap=True, min_width=9)
        facts.add_column()
        for what, text in _facts(item):
            facts.add_row(f"   {what}", plain(text, screen))
        screen.print(facts)
    screen.print()
    for line in _closing(context, shown, hidden):
        screen.print(plain(line, screen), style="bright_black")


def _heading(context: Context) -> list[tuple[str, str]]:
    whole = context.estimate
    shapes = " ".join("x".join(map(str, shape)) for shape in context.profile.inputs)
    waits = sorted(
        ((share, _WAITING[bound]) for bound, share in whole.shares.items() if bound in _WAITING), reverse=True
    )
    return [
        (f"{context.profile.model} on {context.device.title}", "bold"),
        (f"{shapes} in {context.policy.name}, run by {whole.runtime}", ""),
        (
            f"estimated {_seconds(whole.seconds)} ({_seconds(whole.low)} to {_seconds(whole.high)}), waiting for "
            + ", ".join(f"{name} {share:.0%}" for share, name in waits if share >= 0.005),
            "",
        ),
    ]


def _gain(item: Advice) -> str:
    if item.gain is None:
        return "  needed" if item.required else ""
    gain = item.gain
    return f"  saves {gain.share:.1%} ({gain.low:.0%} to {gain.high:.0%}), {_seconds(gain.seconds)}"


def _facts(item: Advice) -> list[tuple[str, str]]:
    from narrowcast.accounting.advice.paths import folded

    rows = [("seen", item.seen)]
    if item.operators:
        names = folded(item.operators)
        more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        count = f"{len(item.operators)} places: " if len(item.operators) > 1 else ""
        rows.append(("where", count + ", ".join(names[:SHOWN_NAMES]) + more))
    return [
        *rows,
        ("do", item.how),
        ("effort", _EFFORT[item.effort]),
        ("but", item.limits),
        ("source", item.source),
    ]


def _closing(context: Context, shown: list[Advice], hidden: int) -> list[str]:
    lines: list[str] = []
    if not shown:
        lines.append("No advice: no rule finds anything here that would save 0.5 % of the estimated time.")
    elif len(shown) > 1:
        lines.append("Gains do not add up: several items concern the same operators.")
    if hidden:
        lines.append(f"{hidden} more not shown: narrowcast advise --all shows everything that was found.")
    lines += [f"{note[0].upper()}{note[1:]}." for note in context.estimate.notes]
    lines.append(f"Estimated from: {context.estimate.source}")
    return lines


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"
