"""``narrowcast profile``: what a model costs, before anything runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from narrowcast.accounting.policies import POLICIES, Policy, own_policy, policy
from narrowcast.cli.console import Debug, Json, console, print_json
from narrowcast.cli.files import check_file, write_file
from narrowcast.cli.tracing import tracing
from narrowcast.errors import ModelError, UserError

if TYPE_CHECKING:
    from narrowcast.accounting.devices import Device
    from narrowcast.accounting.kv_cache import KVCache
    from narrowcast.accounting.memory import MemoryOptions
    from narrowcast.report.profile_costs import Costs

__all__ = ["profile"]

_MODELS = "timm:NAME, torchvision:NAME, py:MODULE:FUNCTION, bundled:NAME, hf:DIR or a path to an .onnx file."
_COUNTED = "What is counted"
_FORMATS = "Formats and device"
_TRAINING = "Training"
_SHOWN = "What is shown"


class Mode(StrEnum):
    """What is counted."""

    INFER = "infer"
    TRAIN = "train"


@dataclass(frozen=True)
class _Asked:
    """What is asked of each model."""

    inputs: list[str]
    tokens: int | None
    batch: int | None
    train: bool
    policy: Policy | None  # what the model is in unless given
    device: Device | None
    largest: bool
    training: MemoryOptions


def profile(
    model: Annotated[str, typer.Argument(help=_MODELS, metavar="MODEL", show_default=False)],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Shape of an input: [NAME=]1x3x224x224[:DTYPE]. May be given several times.",
            metavar="SHAPE",
            rich_help_panel=_COUNTED,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a language model, on both sides of an encoder-decoder (128 unless given).",
            rich_help_panel=_COUNTED,
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples, where no shape is given (1).", rich_help_panel=_COUNTED)
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="One inference, or a training step.", rich_help_panel=_COUNTED)
    ] = Mode.INFER,
    compare: Annotated[
        str | None,
        typer.Option(help="Another model, shown side by side.", metavar="MODEL", rich_help_panel=_COUNTED),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help=f"Number formats: {', '.join(POLICIES)}. int8, int4 and nf4 are formats for weights alone, int8-static (W8A8) "
            "for activations too. Unless given: fp32, or what the module itself is in.",
            metavar="NAME",
            rich_help_panel=_FORMATS,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Estimate the time on a device of the catalogue (`narrowcast devices`), or on this machine once it is "
            "measured: auto.",
            metavar="NAME",
            rich_help_panel=_FORMATS,
        ),
    ] = None,
    largest_batch: Annotated[
        bool,
        typer.Option(
            "--largest-batch", help="Find the most samples that the device's memory holds.", rich_help_panel=_FORMATS
        ),
    ] = False,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="sgd, momentum, adam, adamw (unless given), adam8bit or adafactor.",
            metavar="NAME",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(min=1, help="Backward passes for each step of the optimizer.", rich_help_panel=_TRAINING),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Modules that are computed again in backward: `blocks` (all that repeat), or a pattern of names.",
            metavar="PATTERN",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices that training is spread over.", rich_help_panel=_TRAINING)
    ] = None,
    sharding: Annotated[
        str | None,
        typer.Option(
            help="What is divided among them: nothing (replicated), or by zero1, zero2 or zero3.",
            metavar="NAME",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    depth: Annotated[int, typer.Option(min=0, help="Levels of modules to show.", rich_help_panel=_SHOWN)] = 3,
    operators: Annotated[
        bool, typer.Option("--operators", help="Show the most expensive operators.", rich_help_panel=_SHOWN)
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Operators to show.", rich_help_panel=_SHOWN)] = 20,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the report with all plots to this file.", metavar="FILE", rich_help_panel=_SHOWN),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a report that is there.", rich_help_panel=_SHOWN)
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Count what a model costs without weights and without running it: parameters, MACs, bytes, memory, and time.

    For example: narrowcast profile timm:resnet50 --device h100-sxm --precision bf16 --html resnet50.html
    """
    if html is not None:
        check_file(html, force)
    training = _training(
        mode,
        optimizer=optimizer,
        accumulate=accumulate,
        checkpoint=True if checkpoint == "blocks" else checkpoint,
        devices=devices,
        sharding=sharding,
    )
    asked = _Asked(
        inputs=inputs or [],
        tokens=tokens,
        batch=batch,
        train=mode is Mode.TRAIN,
        policy=None if precision is None else policy(precision),
        device=_device(device, largest_batch),
        largest=largest_batch,
        training=training,
    )
    models = [model, *([compare] if compare else [])]
    with tracing(models, debug=debug):
        found = [_costs(name, asked) for name in models]
        if html is not None:
            from narrowcast.report.profile import render_profile

            write_file(html, render_profile(found))
    if json:
        print_json(_record(found) | {"report": None if html is None else str(html)})
        return
    _print(found, depth, top if operators else 0)
    if html is not None:
        console().print(f"report: {html}", markup=False, soft_wrap=True)


def _training(mode: Mode, **given: Any) -> MemoryOptions:
    """Return the options of training that were given, and make sure that each has something to say.

    Raises:
        UserError: Somebody asks for what inference does not have, or says how to divide among devices and not how many.
    """
    said = {name: value for name, value in given.items() if value is not None}
    if mode is Mode.INFER and said:
        meant = ", ".join(f"--{name}" for name in said)
        raise UserError(f"{meant}: an inference has none of it", next_step="count training: --mode train")
    if "sharding" in said and "devices" not in said:
        raise UserError(f"--sharding {said['sharding']} over one device", next_step="say how many: --devices 8")
    return cast("MemoryOptions", said)


def _device(name: str | None, largest: bool) -> Device | None:
    """Return the device of that name; one whose memory is known, where the largest batch is asked for.

    Raises:
        UserError: The largest batch is asked for, and nothing says of how much memory.
    """
    from narrowcast.accounting.devices import device

    found = None if name is None else device(name)
    if largest and (found is None or found.memory.bytes is None):
        raise UserError("--largest-batch without a device whose memory is known", next_step="name one: --device NAME")
    return found


def _costs(model: str, asked: _Asked) -> Costs:
    from narrowcast.accounting.profile import profile as count
    from narrowcast.accounting.roofline import estimate
    from narrowcast.accounting.sources import Source, source
    from narrowcast.report.profile_costs import Costs

    origin = source(model, inputs=asked.inputs, tokens=asked.tokens, batch=asked.batch)
    found = count(origin, train=asked.train)
    formats = asked.policy or own_policy(found.parameters.dtype)
    times = None if asked.device is None else estimate(found.operators, asked.device, formats)
    held = largest = None
    if isinstance(origin, Source):
        from narrowcast.accounting.capacity import largest_batch
        from narrowcast.accounting.memory import memory

        options = _options(asked, formats)
        held = memory(origin, **options)
        if asked.largest and asked.device is not None and asked.device.memory.bytes is not None:
            largest = largest_batch(lambda batch: _of_batch(model, asked, batch), asked.device.memory.bytes, **options)
    elif asked.largest:
        raise ModelError(f"the memory of {model} cannot be followed", allowed="a PyTorch module with --largest-batch")
    config = origin.config if isinstance(origin, Source) else None
    kept = _cache(config, formats) if found.attention.masked else None  # nothing is kept where all tokens see all
    return Costs(found, formats, asked.device, times, held, kept, largest)


def _options(asked: _Asked, formats: Policy) -> MemoryOptions:
    """Return what memory depends on."""
    device = asked.device
    found: MemoryOptions = {
        **asked.training,
        "policy": formats.name,
        "mode": "train" if asked.train else "infer",
        "device": "cuda" if device is not None and device.kind == "gpu" else "cpu",
    }
    if device is not None and device.capability is not None:
        found["capability"] = device.capability
    return found


def _of_batch(model: str, asked: _Asked, batch: int) -> Any:
    """Return the model with inputs of so many samples: the first axis of each."""
    from narrowcast.accounting.sources import source

    inputs = [re.sub(r"(?:^|(?<==))\d+", str(batch), text, count=1) for text in asked.inputs]
    return source(model, inputs=inputs, tokens=asked.tokens, batch=None if inputs else batch)


def _cache(config: Any, policy: Policy) -> KVCache | None:
    """Return what a language model keeps of past tokens; None if there is no configuration to read it from."""
    from narrowcast.accounting.kv_cache import kv_cache

    if config is None:
        return None
    try:
        return kv_cache(config, format=policy.activations)
    except ModelError:  # no attention that the configuration describes
        return None


def _record(found: list[Costs]) -> dict[str, Any]:
    """Return one model's costs, or two models' with their differences."""
    from narrowcast.report.profile_costs import differences

    if len(found) == 1:
        return found[0].as_json()
    first, second = found
    return {"models": [first.as_json(), second.as_json()], "differences": differences(first, second)}


def _print(found: list[Costs], depth: int, operators: int) -> None:
    from narrowcast.report.profile_terminal import render_comparison_terminal, render_profile_terminal

    screen = console()
    if len(found) == 2:
        render_comparison_terminal(found[0], found[1], screen)
        return
    render_profile_terminal(found[0], screen, depth=depth, operators=operators)
