"""Run an ONNX graph stage by stage, with every tensor in reach: the reference that calibration and search look at.

Numbers from here guide decisions; they are never reported as results (those come from ``runtimes``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from narrowcast.models.graph import Graph

__all__ = ["Stage", "StagedExecutor", "session_of"]

Array = NDArray[Any]
Tensors = dict[str, Array]


def session_of(graph: Graph, *, optimise: bool = False) -> ort.InferenceSession:
    """Return an ONNX Runtime session on all cores, without graph rewriting unless asked for."""
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = os.cpu_count() or 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False  # a graph becomes dozens of sessions; each would keep its largest tensors
    options.enable_mem_pattern = False
    model = graph.to_model().SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Stage:
    """Consecutive nodes that run as one.

    Attributes:
        name: The name of its first node.
        nodes: The nodes, in topological order.
        inputs: Tensors made by earlier stages or fed by the caller.
        outputs: Tensors that later stages or the caller read.
    """

    name: str
    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class StagedExecutor:
    """Runs a graph in stages, from the start or from any stage on, and frees each tensor after its last use."""

    def __init__(self, graph: Graph, boundaries: Iterable[frozenset[str]] = (), expose: Iterable[str] = ()) -> None:
        """Cut a graph into stages.

        Args:
            graph: The graph; its nodes must be in topological order.
            boundaries: Sets of node names that must form a stage of their own (an operator and the activation that
                follows it). All other nodes become stages in between.
            expose: Tensors that must be outputs of the stage that makes them, even if no other stage reads them.
        """
        self.graph = graph
        self.stages = tuple(_cut(graph, list(boundaries), set(expose)))
        self.outputs = tuple(info.name for info in graph.outputs)
        self._sessions: dict[int, ort.InferenceSession] = {}
        last = {name: i for i, stage in enumerate(self.stages) for name in stage.outputs}
        last |= {name: i for i, stage in enumerate(self.stages) for name in stage.inputs}
        self._last_use = {name: i for name, i in last.items() if name not in self.outputs}

    def run_stage(self, index: int, tensors: Mapping[str, Array]) -> Tensors:
        """Return the outputs of one stage, given (at least) its inputs."""
        stage = self.stages[index]
        if index not in self._sessions:
            self._sessions[index] = session_of(self.graph.subgraph(list(stage.nodes), list(stage.outputs)))
        values = self._sessions[index].run(list(stage.outputs), {name: tensors[name] for name in stage.inputs})
        return dict(zip(stage.outputs, (np.asarray(value) for value in values), strict=True))

    def walk(self, feeds: Mapping[str, Array]) -> Iterator[tuple[int, Tensors]]:
        """Run all stages; after each, yield its index and every tensor that is still alive."""
        tensors = dict(feeds)
        for index in range(len(self.stages)):
            tensors |= self.run_stage(index, tensors)
            yield index, tensors
            self.free(index, tensors)

    def run_from(self, index: int, tensors: Mapping[str, Array]) -> Tensors:
        """Run the stages from an index on and return the graph outputs.

        Args:
            index: The first stage to run.
            tensors: Every tensor that the stages from there on read and do not make; not changed.
        """
        alive = dict(tensors)
        for later in range(index, len(self.stages)):
            alive |= self.run_stage(later, alive)
            self.free(later, alive)
        return {name: alive[name] for name in self.outputs}

    def free(self, index: int, tensors: Tensors) -> None:
        """Drop the tensors that nobody reads after a stage."""
        for name in [name for name in tensors if self._last_use.get(name, len(self.stages)) <= index]:
            del tensors[name]


def _cut(graph: Graph, boundaries: list[frozenset[str]], expose: set[str]) -> Iterator[Stage]:
    owner = {name: number for number, names in enumerate(boundaries) for name in names}
    position = {node.name: i for i, node in enumerate(graph.nodes)}
    nodes = sorted(
        graph.nodes,  # the members of a set follow its first member at once; everything else keeps its place
        key=lambda node: (
            min(position[name] for name in boundaries[owner[node.name]]) if node.name in owner else position[node.name],
            position[node.name],
        ),
    )
    runs: list[list[onnx.NodeProto]] = []
    previous: int | None = -1
    for node in nodes:
        current = owner.get(node.name)
        if runs and current == previous:
            runs[-1].append(node)
        else:
            runs.append([node])
        previous = current
    single = Graph([], graph.constants, [], [], graph.values, graph.opsets)
    wanted = graph.output_names() | expose
    readers: dict[str, set[int]] = {}
    reads = [[info.name for info in single.subgraph(run, []).inputs] for run in runs]
    for number, names in enumerate(reads):
        for name in names:
            readers.setdefault(name, set()).add(number)
    for number, run in enumerate(runs):
        made = [name for node in run for name in node.output if name]
        outputs = [name for name in made if name in wanted or readers.get(name, set()) - {number}]
        yield Stage(run[0].name, tuple(run), tuple(reads[number]), tuple(outputs))
