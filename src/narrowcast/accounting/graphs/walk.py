"""One run of an ONNX graph, followed node by node: what each computes and moves, and what is alive beside it.

What is the same in every run (constants, shapes, and all that is computed from these alone) is folded and costs nothing,
with one exception: dequantising weights, which no runtime folds, since that would undo the compression. It counts as if
each operator ran alone, as everything here does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from narrowcast.accounting.counting import Work
from narrowcast.accounting.graphs.control import Numbers, captured, closed_graph, loop_of, scan_of
from narrowcast.accounting.graphs.files import File, Stored, attributes_in, graphs_in, read_graph, stored_of
from narrowcast.accounting.graphs.inputs import Given, bind
from narrowcast.accounting.graphs.masks import mask_of
from narrowcast.accounting.graphs.parameters import Registry
from narrowcast.accounting.graphs.paths import scope_of
from narrowcast.accounting.graphs.rules import Call, Entry, ShapeError, Tensor, attributes_of, entry_of
from narrowcast.accounting.graphs.shapes import constants_of, node_name, shapes_of
from narrowcast.accounting.graphs.values import Memory, Value
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator, Trace
from narrowcast.accounting.profile import Counted
from narrowcast.errors import ModelError

__all__ = ["count_graph"]


def count_graph(
    path: Path, given: Sequence[Given] = (), *, name: str = "", batch: int = 1, tokens: int | None = None
) -> Counted:
    """Return what one run of an ONNX file does, without its weights.

    Args:
        path: The file; what it keeps outside itself is not opened.
        given: Shapes of inputs; see :func:`narrowcast.accounting.graphs.inputs.bind`.
        name: How messages name the model.
        batch: Samples, for first axes that are dynamic.
        tokens: Tokens, for second axes of integer inputs that are dynamic.

    Raises:
        ModelError: The file cannot be read, shapes do not fit, or a shape stays open.
    """
    file = read_graph(path, name)
    inputs = bind(file, given, batch=batch, tokens=tokens)
    walk = _Walk(file)
    walk.main(inputs)
    return Counted(
        {name: tensor.shape for name, tensor in inputs.items()},
        walk.trace,
        walk.registry.parameters(),
        walk.registry.layers(),
    )


_PRODUCTS = (Kind.CONVOLUTION, Kind.DEPTHWISE, Kind.PRODUCT)
#: What stands between an integer product and its bias.
_BETWEEN = frozenset({"Cast", "Mul", "QuantizeLinear", "DequantizeLinear"})
#: What makes another form of the numbers of its first input.
_FORMS = frozenset({"Transpose", "Cast", "DequantizeLinear"})
#: What reads no more of its first input than it passes on.
_PARTIAL = frozenset({"Gather", "GatherElements", "GatherND", "GatherBlockQuantized", "Slice", "Compress"})


class _Walk:
    """Follows a graph; a subgraph is followed as a graph of its own, with the shapes that it is called with."""

    def __init__(self, file: File) -> None:
        self.name = file.name
        self.file = file
        self.registry = Registry(file.stored)
        self.memory = Memory(self.registry.stored_bytes)
        self.trace = Trace(static_bytes=self.registry.stored_bytes)

    def main(self, inputs: Mapping[str, Tensor]) -> None:
        """Follow the whole graph."""
        values = {name: _constant(stored) for name, stored in self.file.stored.items()}
        for name, tensor in inputs.items():
            values[name] = Value(tensor, name)
            self.memory.hold(name, tensor.nbytes)
        self.graph(self.file.model, values, "")
        self.trace.peak_bytes = self.memory.peak

    def graph(self, model: onnx.ModelProto, values: dict[str, Value], around: str) -> dict[str, Value]:
        """Follow a graph, and return its outputs, which stay alive.

        Args:
            model: The graph, its inputs with shapes.
            values: What it can read: its inputs, and the tensors around it; what it makes is added.
            around: The module that holds it.
        """
        graph = model.graph
        values |= {
            tensor.name: _constant(stored_of(tensor)) for tensor in graph.initializer if tensor.name not in values
        }
        constant = constants_of(graph, (name for name, value in values.items() if value.constant))
        shapes = shapes_of(model, constant, self.name)
        numbers = Numbers(model, shapes)
        dies = _deaths(graph)
        for place, node in enumerate(graph.node):
            scope = scope_of(node)
            self.registry.classes |= scope.classes
            path = scope.path or around
            self.registry.visit(path)
            if any(graphs_in(node)):
                self._control(node, model, values, shapes, path)
            elif all(name in constant for name in node.output if name):
                self._fold(node, values, shapes)
            else:
                self._node(node, values, shapes, numbers, path)
            for name in dies.get(place, ()):
                if name in values:
                    self.memory.release(values[name].storage)
        return {value.name: values[value.name] for value in graph.output if value.name in values}

    # Nodes ------------------------------------------------------------------------------------------------------------

    def _fold(self, node: onnx.NodeProto, values: dict[str, Value], shapes: Mapping[str, Tensor]) -> None:
        """Note what a node makes that is the same in every run."""
        entry = entry_of(node.domain, node.op_type)
        settings = entry.settings if entry else ()
        read = [values[name] for place, name in enumerate(node.input) if name in values and place not in settings]
        sources = frozenset[str]().union(*(value.sources for value in read))
        for name in node.output:
            if name in shapes:
                values[name] = Value(shapes[name], name, constant=True, sources=sources)

    def _node(
        self, node: onnx.NodeProto, values: dict[str, Value], shapes: Mapping[str, Tensor], numbers: Numbers, path: str
    ) -> None:
        """Count a node."""
        known = lambda name: numbers.of(name) if name in values and values[name].constant else None  # noqa: E731
        entry = entry_of(node.domain, node.op_type)
        read = [values.get(name) for name in node.input]
        if entry is not None:
            read = [
                None if place in entry.weights and self._is_zero(value) else value for place, value in enumerate(read)
            ]
        call = Call(
            node.op_type,
            attributes_in(node),
            tuple(value.tensor if value else None for value in read),
            tuple(shapes.get(name) for name in node.output),
        )
        try:
            work = self._work(call, entry, read)
            attributes = attributes_of(call) | mask_of(node, call, known) if entry else {}
        except (ShapeError, KeyError, IndexError, ZeroDivisionError) as error:
            raise ModelError(
                f"{self.name}: the inputs do not fit at {node_name(node)}: {error}",
                next_step="give inputs of the right shapes: --input NAME=1x3x224x224",
            ) from error
        if entry is None:
            self.trace.uncounted[f"{node.domain}.{node.op_type}".lstrip(".")] += 1
        else:
            self.registry.note(call, entry, [value.sources if value else frozenset() for value in read], path)
        kind = _kind(entry, attributes)
        for name, value in self._made(node, call, kind, work, read).items():
            values[name] = value
        self._record(call, entry, kind, attributes, work, read, path)

    def _is_zero(self, value: Value | None) -> bool:
        """Return whether a constant is zero, repeated: what exporters write for a bias that is not there."""
        return (
            value is not None
            and bool(value.sources)
            and all(name in self.file.stored and self.file.stored[name].is_zero for name in value.sources)
        )

    def _work(self, call: Call, entry: Entry | None, read: Sequence[Value | None]) -> Work | None:
        if entry is None:
            return None
        if call.operator == "Add" and _adds_bias(read):
            return Work(bias_adds=call.out.size)
        return entry.rule(call)

    def _made(
        self, node: onnx.NodeProto, call: Call, kind: Kind, work: Work | None, read: Sequence[Value | None]
    ) -> dict[str, Value]:
        """Return what a node makes, which is alive from now on."""
        first = read[0] if read else None
        forms = first.sources if first and (kind is Kind.VIEW or node.op_type in _FORMS) else frozenset[str]()
        product = _unbiased(node.op_type, kind, work, read)
        made: dict[str, Value] = {}
        for name, tensor in zip(node.output, call.outputs, strict=True):
            if not name or tensor is None:
                continue
            if kind is Kind.VIEW and first is not None:
                made[name] = replace(first, tensor=tensor, constant=False)
                self.memory.share(first.storage)
            else:
                made[name] = Value(tensor, name, sources=forms, writer=len(self.trace.operators), product=product)
                self.memory.hold(name, tensor.nbytes)
        return made

    def _record(
        self,
        call: Call,
        entry: Entry | None,
        kind: Kind,
        attributes: Mapping[str, Any],
        work: Work | None,
        read: Sequence[Value | None],
        path: str,
    ) -> None:
        settings = entry.settings if entry else ()
        operands = [value for place, value in enumerate(read) if value is not None and place not in settings]
        made = [tensor for tensor in call.outputs if tensor is not None]
        sources: dict[str, tuple[Value, int]] = {}
        for place, value in enumerate(read if kind is not Kind.VIEW else ()):
            if value is not None:
                whole = value.tensor.nbytes
                partly = place == 0 and call.operator in _PARTIAL and made
                sources[value.storage] = value, min(whole, made[0].nbytes) if partly else whole
        self.trace.operators.append(
            Operator(
                name=call.operator,
                path=path,
                phase="forward",
                inputs=tuple(value.tensor.shape for value in operands),
                outputs=tuple(tensor.shape for tensor in made),
                dtype=made[0].dtype if made else "",
                kind=kind,
                attributes=attributes,
                work=work,
                bytes_read=sum(size for _, size in sources.values()),
                weight_bytes=sum(size for value, size in sources.values() if value.constant or value.sources),
                bytes_written=sum(tensor.nbytes for tensor in made) if kind is not Kind.VIEW else 0,
                live_bytes=self.memory.total,
                producers=tuple(value.writer for value in operands),
            )
        )

    # Control flow -----------------------------------------------------------------------------------------------------

    def _control(
        self,
        node: onnx.NodeProto,
        model: onnx.ModelProto,
        values: dict[str, Value],
        shapes: Mapping[str, Tensor],
        path: str,
    ) -> None:
        """Count a node that runs subgraphs: the larger branch of an If, every pass of a Loop or Scan."""
        start = len(self.trace.operators)
        read = [values.get(name) for name in node.input]
        bodies = dict(graphs_in(node))
        if node.op_type == "If":
            attributes = self._if(bodies, model, values, path)
        elif node.op_type in ("Loop", "Scan"):
            attributes = self._passes(node, bodies["body"], model, values, path)
        else:
            self.trace.uncounted[node.op_type] += 1
            attributes = {}
        outputs = tuple(shapes.get(name) for name in node.output)
        for name, tensor in zip(node.output, outputs, strict=True):
            if name and tensor is not None:
                values[name] = Value(tensor, name, writer=len(self.trace.operators) - 1 if start else -1)
                self.memory.hold(name, tensor.nbytes)
        call = Call(node.op_type, {}, tuple(value.tensor if value else None for value in read), outputs)
        self._record(call, None, Kind.VIEW, attributes, Work(), read, path)

    def _if(
        self, bodies: Mapping[str, onnx.GraphProto], model: onnx.ModelProto, values: dict[str, Value], path: str
    ) -> dict[str, Any]:
        """Count both branches and keep the one with more MACs, or with more other operations if these are equal."""
        start, before = len(self.trace.operators), self.trace.uncounted
        found: dict[str, tuple[list[Operator], Counter[str]]] = {}
        for branch, body in bodies.items():
            self.trace.uncounted = Counter()
            self._body(body, model, {}, values, path)
            found[branch] = self.trace.operators[start:], self.trace.uncounted
            del self.trace.operators[start:]
        size = {branch: _size(operators) for branch, (operators, _) in found.items()}
        largest = max(size, key=lambda branch: size[branch])
        self.trace.operators += found[largest][0]
        self.trace.uncounted = before + found[largest][1]
        return {"counted": largest, "macs": {branch: macs for branch, (macs, _) in size.items()}}

    def _passes(
        self, node: onnx.NodeProto, body: onnx.GraphProto, model: onnx.ModelProto, values: dict[str, Value], path: str
    ) -> dict[str, Any]:
        """Count the body once, and repeat it as often as it runs."""
        start = len(self.trace.operators)
        tensors = {name: value.tensor for name, value in values.items()}
        form = loop_of(node, body, model, tensors) if node.op_type == "Loop" else scan_of(node, body, tensors)
        outputs = self._body(body, model, form.inputs, values, path)
        once = self.trace.operators[start:]
        if form.passes is None:
            self.trace.uncounted[f"{node_name(node)}: passes after the first, as many as the numbers say"] += 1
        elif any(
            given in form.inputs and made in outputs and form.inputs[given].shape != outputs[made].tensor.shape
            for given, made in form.states
        ):
            self.trace.uncounted[f"{node_name(node)}: what grows from pass to pass; each counts as the first"] += 1
        if form.passes == 0:
            del self.trace.operators[start:]
        for shift in range(len(once), len(once) * (form.passes or 1), len(once) or 1):
            self.trace.operators += (_moved(operator, start, shift) for operator in once)
        return {"passes": form.passes}

    def _body(
        self,
        body: onnx.GraphProto,
        model: onnx.ModelProto,
        inputs: Mapping[str, Tensor],
        values: dict[str, Value],
        path: str,
    ) -> dict[str, Value]:
        """Follow a subgraph, and return its outputs, which live on as those of its node."""
        around = {name: value.tensor for name, value in values.items()}
        closed = closed_graph(body, model, inputs, around)
        inner = values | {name: Value(tensor, name) for name, tensor in inputs.items()}
        outputs = self.graph(closed, inner, path)
        for value in outputs.values():
            self.memory.release(value.storage)
        return outputs


def _constant(stored: Stored) -> Value:
    return Value(stored.tensor, stored.name, constant=True, sources=frozenset({stored.name}))


def _kind(entry: Entry | None, attributes: Mapping[str, Any]) -> Kind:
    if entry is None:
        return Kind.ELEMENTWISE
    depthwise = entry.kind is Kind.CONVOLUTION and 1 < attributes["groups"] == attributes["inputs"]
    return Kind.DEPTHWISE if depthwise else entry.kind


def _deaths(graph: onnx.GraphProto) -> dict[int, list[str]]:
    """Return which tensors of a graph nobody reads after each of its nodes; its outputs live on."""
    last: dict[str, int] = {}
    for place, node in enumerate(graph.node):
        last |= dict.fromkeys(node.output, place)
        last |= {name: place for name in (*node.input, *captured(node)) if name in last}
    dies: dict[int, list[str]] = {}
    outputs = {value.name for value in graph.output}
    for name, place in last.items():
        if name and name not in outputs:
            dies.setdefault(place, []).append(name)
    return dies


# Biases ---------------------------------------------------------------------------------------------------------------


def _unbiased(operator: str, kind: Kind, work: Work | None, read: Sequence[Value | None]) -> Kind | None:
    """Return the kind of product with weights that a node's result is, if it still may get its bias."""
    if kind in _PRODUCTS:
        weighted = any(value is not None and value.sources for value in read)
        return kind if weighted and work is not None and not work.bias_adds else None
    first = read[0] if read else None
    return first.product if first is not None and operator in _BETWEEN else None


def _adds_bias(read: Sequence[Value | None]) -> bool:
    """Return whether a sum adds a bias to a product: a number for each output channel."""
    for product, bias in (read, reversed(read)):
        if product is None or bias is None or product.product is None or not bias.sources:
            continue
        axis = -1 if product.product is Kind.PRODUCT else 1
        after = len(product.tensor.shape[axis:]) - 1 if axis == 1 else 0
        wanted = (product.tensor.shape[axis], *[1] * after)
        shape = bias.tensor.shape
        if shape[-len(wanted) :] == wanted and bias.tensor.size == wanted[0]:
            return True
    return False


def _size(operators: Iterable[Operator]) -> tuple[int, int]:
    work = [operator.work for operator in operators if operator.work]
    return sum(each.macs for each in work), sum(each.other for each in work)


def _moved(operator: Operator, start: int, shift: int) -> Operator:
    """Return an operator of the first pass in a later one: what it reads from its own pass lies later too."""
    producers = tuple(place + shift if place >= start else place for place in operator.producers)
    return replace(operator, producers=producers)
