"""What the pages on number formats show of the package, computed by it: tables, bit layouts, number lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from typer.testing import CliRunner

import narrowcast.formats as nf
from narrowcast.cli.app import app
from narrowcast.errors import FormatError
from narrowcast.formats.fields import fields_of
from narrowcast.formats.rules import CONVENTIONS, NanInput, Rounding, Rules
from narrowcast.formats.table import BLOCKS, ELEMENTS, element
from narrowcast.report.number_line import number_line

__all__ = ["SYSTEMS", "TELLING", "write"]

FAMILIES = {
    "floating-point": ["fp64", "fp32", "tf32", "bf16", "fp16"],
    "eight-bits": [
        "e5m2",
        "e5m2fnuz",
        "e4m3fn",
        "e4m3fnuz",
        "e4m3b11fnuz",
        "e4m3",
        "e3m4",
        "e3m2",
        "e2m3",
        "e2m1",
        "e8m0",
    ],
    "integers": ["int16", "uint16", "int8", "uint8", "int4", "uint4", "int3", "uint3", "int2", "uint2"],
    "codebooks": ["nf4", "nf3", "nf2"],
    "blocks": list(BLOCKS),
}
PICTURES = {"number-line": ("e2m1", "nf4", "int4"), "eight-bit-line": ("e4m3fn", "e5m2", "int8")}
SYSTEMS = ("onnx", "torch", "ml_dtypes", "cuda")
# Inputs on which the systems differ, or which people expect them to differ on.
TELLING: dict[str, tuple[float, ...]] = {
    "e4m3fn": (448, 464, 465, math.inf, math.nan),
    "e5m2": (57344, 61440, math.inf, math.nan),
    "e4m3fnuz": (240, 300, math.inf, math.nan),
    "e5m2fnuz": (57344, 61440, math.inf, math.nan),
    "e8m0": (1.5, 2.5, 3, 0, -3, math.inf),
    "e2m1": (5, 7, math.inf, math.nan),
    "int4": (1.5, 2.5, 8, -9, math.inf, math.nan),
}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_NONE = "–"


def write(folder: Path) -> None:
    """Write everything that the pages include; a file that says the same already keeps its date."""
    texts = {f"{family}.inc": formats_table(names) for family, names in FAMILIES.items()}
    texts |= {f"{family}-layout.svg": layout(names) for family, names in FAMILIES.items()}
    texts["all.inc"] = formats_table(())
    texts["rules.inc"] = rules_table()
    texts |= {f"conventions-{name}.inc": convention_table(name, values) for name, values in TELLING.items()}
    texts["special-codes.inc"] = special_codes()
    texts["four-bit-codes.inc"] = four_bit_codes()
    texts["rounding.inc"] = rounding_table()
    texts["scale-rules.inc"] = scale_rules()
    for picture, names in PICTURES.items():
        drawn = number_line([element(name) for name in names], axis="scaled")
        # The theme shows one of two pictures; each is fixed to its surroundings, whatever the system prefers.
        texts[f"{picture}-light.svg"] = drawn.replace("(prefers-color-scheme: dark)", "not all")
        texts[f"{picture}-dark.svg"] = drawn.replace("(prefers-color-scheme: dark)", "all")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        file = folder / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


# Tables ---------------------------------------------------------------------------------------------------------------


def formats_table(names: Sequence[str]) -> str:
    """Return what ``narrowcast formats --as markdown`` prints."""
    printed = CliRunner().invoke(app, ["formats", "--as", "markdown", *names], catch_exceptions=False)
    assert printed.exit_code == 0, printed.output
    return printed.output


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    ruler = ["---"] * left + ["---:"] * (len(headings) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ruler, *rows)) + "\n"


def convention_table(name: str, values: Sequence[float]) -> str:
    """Return what each system's convention makes of each number; what differs from the default is bold."""
    rows: list[list[str]] = []
    for value in values:
        usual = _cast(value, name, None)
        cells = [_cast(value, name, system) for system in SYSTEMS]
        rows.append(
            [_number(value), usual, *(cell if cell in (usual, _NONE) else f"**{cell}**" for cell in cells)],
        )
    return _table([f"`{name}`", "default", *SYSTEMS], rows, left=0)


def _cast(value: float, name: str, system: str | None) -> str:
    if system is not None and name not in CONVENTIONS[system]:
        return _NONE
    try:
        return _number(float(nf.cast(value, name, convention=system)))
    except FormatError:
        return "error"


def rules_table() -> str:
    """Return the choices behind each convention, formats of the same choices together."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in ELEMENTS:
        cells = tuple(_rules(name, system) for system in (None, *SYSTEMS))
        if any(cell != _NONE for cell in cells[1:]):
            found.setdefault(cells, []).append(f"`{name}`")
    rows = [(", ".join(names), *cells) for cells, names in found.items()]
    return _table(["formats", "default", *SYSTEMS], rows, left=6)


def _rules(name: str, system: str | None) -> str:
    if system is not None and name not in CONVENTIONS[system]:
        return _NONE
    format = element(name)
    rules = Rules.of(format, convention=system)
    floating = isinstance(format, nf.Format)
    words = [] if rules.rounding is Rounding.NEAREST_EVEN else [rules.rounding]
    words.append(rules.overflow)
    if not (floating and format.has_nan):
        words.append("NaN refused" if rules.nan is NanInput.ERROR else f"NaN {rules.nan}")
    if floating and not format.signed:
        words.append(f"below {rules.below}")
    return ", ".join(words).replace("_", " ")


def special_codes() -> str:
    """Return the codes of zeros, infinities, NaN and the ends of the range of each float of up to 8 bits."""
    headings = ["format", "zeros", "smallest", "smallest normal", "largest", "infinities", "NaN"]
    rows: list[list[str]] = []
    for name in FAMILIES["eight-bits"]:
        format = element(name)
        assert isinstance(format, nf.Format)
        by_kind: dict[str, list[int]] = {"zero": [], "inf": [], "nan": []}
        for code, value in enumerate(nf.decode(range(format.last_code + 1), format).tolist()):
            kind = "zero" if value == 0 else "inf" if math.isinf(value) else "nan" if math.isnan(value) else ""
            by_kind.get(kind, []).append(code)
        ends = [format.smallest_subnormal, format.smallest_normal, format.max]
        codes = [[int(nf.encode(value, format))] for value in ends]
        groups = [by_kind["zero"], *codes, by_kind["inf"], by_kind["nan"]]
        rows.append([f"`{name}`", *(_codes(group, format.bits) for group in groups)])
    return _table(headings, rows, left=7)


def _codes(codes: Sequence[int], bits: int) -> str:
    if not codes:
        return _NONE
    if len(codes) > 2:
        runs = [code for code in codes if code - 1 not in codes or code + 1 not in codes]
        pairs = zip(runs[::2], runs[1::2], strict=True)
        return ", ".join(f"{_hex(first, bits)}–{_hex(last, bits)}" for first, last in pairs)
    return ", ".join(_hex(code, bits) for code in codes)


def _hex(code: int, bits: int) -> str:
    return f"{code:0{-(-bits // 4)}X}"


def four_bit_codes() -> str:
    """Return the values of the 16 codes of each 4-bit format."""
    names = ("e2m1", "int4", "uint4", "nf4")
    columns = [nf.decode(range(16), name).tolist() for name in names]
    rows = [[f"`{code:04b}`", *(_number(column[code], 4) for column in columns)] for code in range(16)]
    return _table(["code", *(f"`{name}`" for name in names)], rows)


def rounding_table() -> str:
    """Return what each deterministic rounding makes of numbers between those of E4M3FN."""
    values = (1.02, 1.0625, 1.1875, -1.02, -1.0625)
    modes = [mode for mode in Rounding if mode is not Rounding.STOCHASTIC]
    rows = [[f"`{mode}`", *(_number(float(nf.cast(v, "e4m3fn", rounding=mode))) for v in values)] for mode in modes]
    return _table(["rounding", *(_number(value) for value in values)], rows)


def scale_rules() -> str:
    """Return the shared scale, and what becomes of the block's largest number, under each rule of MXFP4."""
    headings = ["largest in the block", *(f"`{rule}`" for rule in ("floor", "ceil", "even", "round_up"))]
    rows: list[list[str]] = []
    for largest in (0.7, 0.8, 0.9, 1.0):
        cells: list[str] = []
        for rule in ("floor", "ceil", "even", "round_up"):
            q = nf.quantize([largest] + [0.0] * 31, "mxfp4", scale_rule=rule)
            scale = float(q.scales[0])
            cells.append(f"{_power(scale)}: {largest / scale:.3g} → {_number(float(q.dequantize()[0]) / scale)}")
        rows.append([_number(largest), *cells])
    return _table(headings, rows, left=0)


def _number(value: float, digits: int = 6) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "−∞" if value < 0 else "∞"
    if value and not 1e-6 <= abs(value) < 1e6 and math.frexp(abs(value))[0] == 0.5:
        return _power(value)
    return f"{value:.{digits}g}".replace("-", "−")


def _power(value: float) -> str:
    sign = "−" if value < 0 else ""
    return f"{sign}2{str(math.frexp(abs(value))[1] - 1).translate(_RAISED)}"


# Pictures -------------------------------------------------------------------------------------------------------------

_WIDTH, _LEFT, _ROOM = 760, 108, 560
_ROW, _BOX, _HEAD = 46, 26, 34
_KINDS = ("sign", "exponent", "significand", "integer", "fraction", "index")


def layout(names: Sequence[str]) -> str:
    """Return a picture of the fields of formats' codes, the most significant bit on the left, as inline SVG."""
    if names[0] in BLOCKS:
        return _blocks([BLOCKS[name] for name in names])
    formats = [element(name) for name in names]
    unit = min(40.0, _ROOM / max(format.bits for format in formats))
    kinds = [kind for kind in _KINDS if any(kind == field.name for f in formats for field in fields_of(0, f))]
    parts, told = _legend(kinds), []
    for row, format in enumerate(formats):
        top = _HEAD + _ROW * row
        parts.append(_name(format.name, top))
        x = float(_LEFT)
        words = [f"{format.name}:"]
        for field in fields_of(0, format):
            width = unit * len(field.bits)
            parts += _box(field.name, x, top, width, len(field.bits), unit)
            words.append(f"{field.name} {len(field.bits)}")
            x += width
        parts.append(f'<text x="{x + 12:.6g}" y="{top + 18}">{escape(_remark(format))}</text>')
        told.append(" ".join(words))
    return _svg(parts, _HEAD + _ROW * len(formats), "Bits of " + ", ".join(told))


def _remark(format: nf.ElementFormat) -> str:
    match format:
        case nf.Format():
            return f"bias {format.bias}"
        case nf.Integer():
            return f"{_number(format.min)} to {_number(format.max)}"
        case nf.Codebook():
            return f"position in a table of {len(format.values)}"


def _box(kind: str, x: float, top: float, width: float, bits: int, unit: float) -> list[str]:
    ticks = "".join(f"M{x + unit * bit:.6g} {top + _BOX - 5}v5" for bit in range(1, bits))
    drawn = [f'<rect class="{kind}" x="{x:.6g}" y="{top}" width="{width:.6g}" height="{_BOX}"/>']
    if ticks:
        drawn.append(f'<path class="{kind}" d="{ticks}"/>')
    return [*drawn, f'<text class="in" x="{x + width / 2:.6g}" y="{top + 17}">{bits}</text>']


def _blocks(blocks: Sequence[nf.BlockFormat]) -> str:
    unit = _ROOM / max(block.scale.bits + block.block * block.element.bits + 4 for block in blocks)
    kinds = [k for k in _KINDS if any(k == f.name for b in blocks for f in fields_of(0, b.element))]
    parts, told = _legend([*kinds, "scale"]), []
    row_height = _ROW + 12
    for row, block in enumerate(blocks):
        top, x = _HEAD + row_height * row, float(_LEFT)
        parts.append(_name(block.name, top))
        width = unit * block.scale.bits
        parts.append(f'<rect class="scale" x="{x:.6g}" y="{top}" width="{width:.6g}" height="{_BOX}"/>')
        x += width + 4 * unit
        fields = [(field.name, unit * len(field.bits)) for field in fields_of(0, block.element)]
        for kind, share in fields:  # one path per field: all the elements' boxes of that kind
            step, boxes = unit * block.element.bits, []
            offset = sum(s for k, s in fields[: [k for k, _ in fields].index(kind)])
            for place in range(block.block):
                boxes.append(f"M{x + step * place + offset:.6g} {top}h{share:.6g}v{_BOX}h-{share:.6g}z")
            parts.append(f'<path class="{kind} filled" d="{"".join(boxes)}"/>')
        edges = "".join(
            f"M{x + unit * block.element.bits * place:.6g} {top}v{_BOX}" for place in range(block.block + 1)
        )
        parts.append(f'<path class="edge" d="{edges}"/>')
        words = (
            f"{block.scale.name.upper()} scale, {block.block} elements of {block.element.bits} bits: "
            f"{block.bits_per_element:g} bits per element"
        )
        if block.tensor_scale:
            x += unit * (block.element.bits * block.block + 12)
            parts.append(f'<rect class="scale apart" x="{x:.6g}" y="{top}" width="{unit * 32:.6g}" height="{_BOX}"/>')
            words += ", and one FP32 scale for the tensor (dashed)"
        parts.append(f'<text x="{_LEFT}" y="{top + _BOX + 16}">{escape(words)}</text>')
        told.append(f"{block.name}: {words}")
    return _svg(parts, _HEAD + row_height * len(blocks), "Blocks: " + "; ".join(told))


def _legend(kinds: Sequence[str]) -> list[str]:
    drawn: list[str] = []
    for place, kind in enumerate(kinds):
        x = _LEFT + 104 * place
        drawn.append(f'<rect class="{kind}" x="{x}" y="6" width="12" height="12"/>')
        drawn.append(f'<text x="{x + 18}" y="16">{kind}</text>')
    return drawn


def _name(name: str, top: float) -> str:
    return f'<text class="name" x="0" y="{top + 18}">{escape(name)}</text>'


def _svg(parts: Sequence[str], height: float, words: str) -> str:
    head = f'<svg class="bits" viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(words)}">'
    return "\n".join([head, *parts, "</svg>", ""])
