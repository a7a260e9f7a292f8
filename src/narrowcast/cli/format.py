"""``narrowcast format``: values, or codes, of one format under the microscope."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrowcast.cli.console import Debug, Json, console, print_json
from narrowcast.cli.numbers import brief, count, dyadic, json_number, plain, power_of_two, signed
from narrowcast.errors import FormatError
from narrowcast.formats.facts import Facts, facts
from narrowcast.formats.kinds import ElementFormat, Format
from narrowcast.formats.microscope import Event, Point, Specimen, Standing, drawn, look, look_at_code
from narrowcast.formats.order import code_at, places
from narrowcast.formats.rules import Rounding, Rules
from narrowcast.formats.table import element

__all__ = ["format_"]

_FIELD = {"sign": "bold red", "exponent": "bold green", "significand": "bold blue"} | {
    "integer": "bold blue",
    "fraction": "bold cyan",
    "index": "bold blue",
}
_CALM = {Event.EXACT: "green", Event.ROUNDED_UP: "yellow", Event.ROUNDED_DOWN: "yellow"}
_BAR = 41
_LISTED = 16


def format_(
    name: Annotated[
        str,
        typer.Argument(metavar="FORMAT", help="Element format, such as bf16, e4m3fn, int8 or nf4.", show_default=False),
    ],
    values: Annotated[
        list[str] | None,
        typer.Argument(help="Numbers: 0.1, -1e-8, 1/3, 2^-24, 0x1.8p-3, inf, nan, -0. Without any: the format itself."),
    ] = None,
    code: Annotated[bool, typer.Option("--code", help="Read VALUES as codes: 0x3dcd, 0b1011 or decimal.")] = False,
    rounding: Annotated[str | None, typer.Option(help=f"{', '.join(Rounding)}. Default: nearest_even.")] = None,
    overflow: Annotated[str | None, typer.Option(help="ieee, saturate, clamp, nan, or wrap (integers).")] = None,
    nan: Annotated[
        str | None, typer.Option(help="What NaN becomes in a format without it: error, zero or max.")
    ] = None,
    below: Annotated[
        str | None, typer.Option(help="What negative numbers become in an unsigned float: nan, magnitude or clamp.")
    ] = None,
    convention: Annotated[str | None, typer.Option(help="Choices of a system: onnx, torch, ml_dtypes or cuda.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Draw for stochastic rounding, as an array of VALUES does. Default: the likelier way."
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what becomes of numbers in a format: their bits, the stored value, the error and why.

    For example: narrowcast format bf16 0.1 65504 1e-8 -inf
    """
    format = element(name)
    rules = Rules.of(format, rounding, overflow, nan, below, convention)
    given = values or []
    for value in given:
        if value.startswith("--"):
            raise FormatError(f"unknown option {value}", next_step="run `narrowcast format --help` for those there are")
    if code:
        _check_reading(rounding=rounding, overflow=overflow, nan=nan, below=below, convention=convention, seed=seed)
        specimens = [look_at_code(value, format) for value in given]
    elif seed is None:
        specimens = [look(value, format, rules) for value in given]
    else:
        _check_drawing(rules, seed)
        codes = drawn(given, format, rules, seed)
        specimens = [look(value, format, rules, code) for value, code in zip(given, codes, strict=True)]
    if json:
        names = {"rounding", "overflow", "nan", "below"}
        print_json(
            {
                "format": asdict(facts(format)),
                "rules": {key: str(value) for key, value in asdict(rules).items() if key in names},
                "specimens": [_record(specimen) for specimen in specimens],
            }
        )
        return
    screen = console()
    _header(screen, format, rules if given and not code else None)
    if not given:
        _card(screen, format)
    for specimen in specimens:
        screen.print()
        _show(screen, specimen)


def _check_reading(**choices: str | int | None) -> None:
    for name, choice in choices.items():
        if choice is not None:
            raise FormatError(
                f"--{name} {choice} with --code: a code is read, nothing is rounded",
                allowed=f"--{name} with numbers",
                next_step="leave one of them out",
            )


def _check_drawing(rules: Rules, seed: int) -> None:
    if rules.rounding is not Rounding.STOCHASTIC:
        raise FormatError(
            f"--seed {seed} with rounding {rules.rounding}, which draws nothing",
            allowed="--seed with --rounding stochastic",
        )


# The format -----------------------------------------------------------------------------------------------------------


def _header(screen: Console, format: ElementFormat, rules: Rules | None) -> None:
    known = facts(format)
    line = Text.assemble((known.name, "bold"), "  ", (_made_of(known, format), ""))
    screen.print(plain(line, screen))
    line = f"largest {brief(known.largest)} · smallest {brief(known.smallest_positive)}"
    if known.smallest_normal is not None and known.smallest_normal != known.smallest_positive:
        line += f" · smallest normal {brief(known.smallest_normal)}"
    if rules is not None:
        line += f" · {rules.rounding} · {rules.overflow}"
    screen.print(plain(Text(line, style="bright_black"), screen))


def _made_of(known: Facts, format: ElementFormat) -> str:
    bits = f"{known.bits:g} bits"
    if not isinstance(format, Format):
        return f"{bits}: {known.layout}"
    sign = "sign 1, " if format.signed else "no sign, "
    return f"{bits}: {sign}exponent {format.exponent_bits} (bias {format.bias}), significand {format.mantissa_bits}"


def _card(screen: Console, format: ElementFormat) -> None:
    known = facts(format)
    rows = [
        (
            "values",
            f"{count(known.values or 0)} different finite ones, {brief(known.smallest)} to {brief(known.largest)}",
        )
    ]
    if known.eps is not None:
        rows.append(("eps", f"{power_of_two(known.eps)} = {brief(known.eps)}, the step after 1"))
    if known.decimal_digits is not None:
        rows.append(("digits", f"{known.decimal_digits:.1f} decimal"))
    if isinstance(format, Format):
        special = [word for word, has in (("infinity", known.infinity), ("NaN", known.nan)) if has]
        special += ["minus zero"] if format.has_negative_zero else []
        rows.append(("special", ", ".join(special) or "none: every code is a number"))
    if known.aliases:
        rows.append(("also", ", ".join(known.aliases)))
    if known.source:
        rows.append(("source", known.source))
    screen.print()
    screen.print(_grid([(label, Text(words)) for label, words in rows], screen))
    if known.values is not None and known.values <= _LISTED:
        screen.print()
        screen.print(_codes(format, screen))


def _codes(format: ElementFormat, screen: Console) -> Table:
    """Return every number of a small format with its bits."""
    table = Table(box=None, padding=(0, 4, 0, 0), header_style="bright_black", pad_edge=False)
    for heading in ("  code", "bits", "value"):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    for place in places(format):
        specimen = look_at_code(code_at(place, format), format)
        table.add_row(f"  {specimen.hexadecimal}", _bits(specimen), plain(brief(specimen.stored), screen))
    return table


# A specimen -----------------------------------------------------------------------------------------------------------


def _show(screen: Console, seen: Specimen) -> None:
    style = _CALM.get(seen.event, "red") if seen.event is not None else "green"
    result = (seen.exact if len(seen.exact) <= 32 else f"≈ {seen.stored:.9g}", f"bold {style}")
    title = Text.assemble((seen.given, "bold"), (" → ", "bright_black"), result, "   ", (seen.words, style))
    screen.print(plain(title, screen))
    rows = [("bits", Text.assemble(_bits(seen), "  = ", (seen.hexadecimal, "bold"))), ("", _meanings(seen))]
    if seen.fraction is not None and seen.standing is not Standing.ZERO:
        exactly = _exactly(seen)
        rows += [("exactly", exactly)] if exactly else []
    if seen.error:
        rows.append(("error", _error(seen)))
    if any(seen.neighbours):
        rows.append(("neighbours", _neighbours(seen)))
    bar = _bar(seen)
    if bar is not None:
        rows.append(("between", bar))
    screen.print(_grid(rows, screen))


def _grid(rows: list[tuple[str, Text]], screen: Console) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bright_black", min_width=12, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, words in rows:
        grid.add_row(f"  {label}", plain(words, screen))
    return grid


def _bits(seen: Specimen) -> Text:
    return Text(" ").join(Text(field.bits, style=_FIELD[field.name]) for field in seen.fields)


def _meanings(seen: Specimen) -> Text:
    parts = [
        Text.assemble((field.name, _FIELD[field.name].removeprefix("bold ")), f" {field.meaning}")
        for field in seen.fields
    ]
    return Text(" · ", style="bright_black").join(parts)


def _exactly(seen: Specimen) -> Text:
    assert seen.fraction is not None
    forms = [dyadic(seen.fraction)] if seen.fraction.denominator > 1 or abs(seen.fraction) >= 1 << 20 else []
    if isinstance(seen.format, Format):
        forms.append(_hexadecimal_float(seen.stored))
    if 32 < len(seen.exact) <= 60:
        forms.insert(0, seen.exact)
    return Text(" = ").join(Text(form) for form in forms)


def _hexadecimal_float(value: float) -> str:
    digits, _, exponent = value.hex().partition("p")
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits}p{exponent}"


def _error(seen: Specimen) -> Text:
    assert seen.error is not None
    assert seen.ulps is not None
    text = Text(f"{signed(seen.error)} · {signed(seen.ulps)} ulp")
    if seen.relative is not None:
        text.append(f" · {signed(100 * seen.relative)} %")
    return text


def _neighbours(seen: Specimen) -> Text:
    down, up = seen.neighbours

    def named(point: Point | None, where: str) -> str:
        return f"{where} {brief(point.value)}" if point else f"{where} none"

    return Text(f"{named(down, 'below')} · {named(up, 'above')}")


def _bar(seen: Specimen) -> Text | None:
    """Return the way from the number below to the one above: the value on it, the middle, and the end that was taken."""
    lower, upper = seen.around
    if lower is None or upper is None or lower == upper or seen.event is None:
        return None
    start, end = lower.value, upper.value
    share = (Fraction(seen.value) - Fraction(start)) / (Fraction(end) - Fraction(start))
    marks = ["─"] * _BAR
    marks[_BAR // 2] = "┼"
    place = min(max(round(share * (_BAR - 1)), 0), _BAR - 1)
    text = Text.assemble(f"{brief(start)} ", _end(seen, start))
    for position, mark in enumerate(marks):
        text.append("◆" if position == place else mark, style="bold" if position == place else "bright_black")
    return text.append_text(Text.assemble(_end(seen, end), f" {brief(end)}"))


def _end(seen: Specimen, value: float) -> tuple[str, str]:
    return ("●", "bold yellow") if seen.stored == value else ("○", "bright_black")


# JSON -----------------------------------------------------------------------------------------------------------------


def _record(seen: Specimen) -> dict[str, Any]:
    return {
        "given": seen.given,
        "value": json_number(seen.value),
        "code": seen.code,
        "hex": seen.hexadecimal,
        "bits": seen.bits,
        "fields": [asdict(field) for field in seen.fields],
        "stored": json_number(seen.stored),
        "exact": seen.exact,
        "fraction": None if seen.fraction is None else str(seen.fraction),
        "hex_float": seen.stored.hex(),
        "standing": seen.standing,
        "event": seen.event,
        "words": seen.words,
        "error": json_number(seen.error),
        "relative_error": json_number(seen.relative),
        "ulps": json_number(seen.ulps),
        "around": [_point(point) for point in seen.around],
        "neighbours": [_point(point) for point in seen.neighbours],
    }


def _point(point: Point | None) -> dict[str, Any] | None:
    return None if point is None else {"code": point.code, "value": json_number(point.value)}
