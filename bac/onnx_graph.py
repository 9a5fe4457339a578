"""A whole chunk as one ONNX graph: the plan unrolled, weights stored once, standard operators of opset 17.

Every tensor program that reads ONNX then runs the cached policy without this package: onnxruntime, TensorRT, OpenVINO.
Inputs are ``observation`` float32[B, To, Do], ``initial_noise`` float32[B, T, Da] and ``step_noise`` float32[K, B, T,
Da]; the output is ``chunk`` float32[B, T, Da]. The batch is free, everything else is fixed.

Inside, the stream is a matrix [B * T, d], so that every linear map is one Gemm on the network's own weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bac.decoder import Affine, DecoderTrunk, PreNormDecoder
from bac.errors import Unavailable, sentence
from bac.executors.base import require_together, require_width
from bac.plan import Add, Combine, CombineGroups, Compute, Fold, Plan
from bac.sampler_table import SamplerTable
from bac.trunk import ResidualTrunk

OPSET = 17
"""The first with LayerNormalization; TensorRT 8.6 and later read it."""

_IR_VERSION = 8
_INLINE = 4096
"""Constants of at most so many bytes always stay inside the graph; shapes must, for the checker to read them."""

_HIDDEN = -1e9
"""Added to the score of an unseen key; its weight is then exactly 0."""


@dataclass(frozen=True)
class Units:
    """An affine map per channel, ``value * scale + offset``; float32[channels] each."""

    scale: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True)
class OnnxGraph:
    """A graph whose large constants stand beside it.

    Attributes:
        model: the ``onnx.ModelProto``; it refers to the weights by name.
        weights: name -> float32 array, where it can be the network's own memory.
        chunk_shape: (T, Da).
    """

    model: Any
    weights: Mapping[str, np.ndarray]
    chunk_shape: tuple[int, int]

    def whole(self) -> Any:
        """Return an ``onnx.ModelProto`` with the weights inside, checked, to be stored."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for stored in model.graph.initializer:
            if stored.name in self.weights:
                stored.CopyFrom(onnx.numpy_helper.from_array(self.weights[stored.name], stored.name))
        onnx.checker.check_model(model)
        return model


def onnx_graph(
    plan: Plan,
    trunk: ResidualTrunk,
    sampler: SamplerTable,
    *,
    observation_units: Units | None = None,
    chunk_units: Units | None = None,
    metadata: Mapping[str, str] | None = None,
) -> OnnxGraph:
    """Return the graph of a plan.

    Args:
        plan: operations per step.
        trunk: the weights, of the plain form that ``bac.decoder`` describes.
        sampler: K steps, as many as the plan.
        observation_units: from task units to normalised ones; None takes normalised observations.
        chunk_units: from normalised units to the task's; None gives a normalised chunk.
        metadata: strings stored in the model.

    Raises:
        Mismatch: plan, trunk and sampler do not belong together.
        Unavailable: the package onnx is missing, or a trunk of another form.
    """
    require_together(plan, trunk, sampler)
    if not isinstance(trunk, DecoderTrunk):
        raise Unavailable(
            sentence(
                "ONNX graph",
                expected="a pre-norm decoder",
                got=type(trunk).__name__,
                mend="use executor=eager, which runs any trunk",
            )
        )
    try:
        from onnx import TensorProto, helper
    except ImportError as error:
        raise Unavailable(
            sentence("ONNX export", expected="the package onnx", got="none", mend="pip install 'onnx' 'onnxruntime'")
        ) from error

    decoder = trunk.decoder()
    require_width(plan, decoder.width)
    with torch.inference_mode():
        tables = torch.stack(list(trunk.step_tables(sampler.timesteps))).float().cpu()
    graph = _Graph()
    chunk = _Unrolled(graph, decoder, tables).chunk(plan, sampler, observation_units)
    graph.rename_last(graph.affine(chunk, chunk_units) if chunk_units else graph.node("Identity", chunk), "chunk")

    steps, horizon, channels = sampler.steps, decoder.horizon, decoder.action_dim
    observed = decoder.condition.positions.shape[0], decoder.condition.embed[0].shape[1]
    shapes = {
        "observation": ("batch", *observed),
        "initial_noise": ("batch", horizon, channels),
        "step_noise": (steps, "batch", horizon, channels),
    }
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("chunk", TensorProto.FLOAT, ("batch", horizon, channels))
    nodes = [helper.make_node(op, reads, writes, **attributes) for op, reads, writes, attributes in graph.nodes]
    weights = {name: values for name, values in graph.constants.items() if values.nbytes > _INLINE}
    stored = list(_stored(graph.constants, weights))
    known = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in graph.shapes.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "action_chunk", inputs, [output], stored, value_info=known),
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="bac",
        ir_version=_IR_VERSION,
    )
    helper.set_model_props(model, dict(metadata or {}))
    return OnnxGraph(model, weights, (horizon, channels))


def _stored(constants: Mapping[str, np.ndarray], beside: Mapping[str, np.ndarray]) -> Iterator[Any]:
    """Yield a TensorProto per constant, without values for those that stand beside the graph."""
    import onnx

    offset = 0
    for name, values in constants.items():
        if name not in beside:
            yield onnx.numpy_helper.from_array(values, name)
            continue
        place = {"location": "weights", "offset": offset, "length": values.nbytes}
        yield onnx.TensorProto(
            name=name,
            data_type=onnx.TensorProto.FLOAT,
            dims=values.shape,
            data_location=onnx.TensorProto.EXTERNAL,
            external_data=[onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in place.items()],
        )
        offset += values.nbytes


class _Graph:
    """Nodes in order, constants and some known shapes by name, before they become protobuf."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, tuple[str, ...], list[str], dict[str, Any]]] = []
        self.constants: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[str | int, ...]] = {}

    def node(self, op: str, *reads: str, **attributes: Any) -> str:
        """Append a node; return the name of its result."""
        return self.nodes_of(op, 1, *reads, **attributes)[0]

    def nodes_of(self, op: str, results: int, *reads: str, **attributes: Any) -> list[str]:
        """Append a node of several results; return their names."""
        writes = [f"v{len(self.nodes)}.{part}" for part in range(results)]
        self.nodes.append((op, reads, writes, attributes))
        return writes

    def constant(self, name: str, values: Tensor | np.ndarray | np.int64 | float | Sequence[int]) -> str:
        """Store a constant under its name, once; floats become float32, sequences of int int64."""
        if name not in self.constants:
            array = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
            array = array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array
            self.constants[name] = np.ascontiguousarray(array).reshape(array.shape)
        return name

    def linear(self, x: str, name: str, weights: Affine) -> str:
        """Apply (weight [out, in], bias [out]) to a matrix [rows, in]."""
        weight, bias = self.constant(f"{name}.weight", weights[0]), self.constant(f"{name}.bias", weights[1])
        return self.node("Gemm", x, weight, bias, transB=1)

    def norm(self, x: str, name: str, weights: Affine) -> str:
        """Apply a layer norm."""
        scale, shift = self.constant(f"{name}.scale", weights[0]), self.constant(f"{name}.shift", weights[1])
        return self.node("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5)

    def affine(self, x: str, units: Units) -> str:
        """Change units."""
        scaled = self.node("Mul", x, self.constant(f"{x}.scale", units.scale))
        return self.node("Add", scaled, self.constant(f"{x}.offset", units.offset))

    def shaped(self, x: str, free: str, *shape: int) -> str:
        """Reshape to [free, *shape]; ``free`` is named, for without names onnxruntime plans memory for a minute."""
        result = self.node("Reshape", x, self.constant(f"shape{list(shape)}", (-1, *shape)))
        self.shapes[result] = free, *shape
        return result

    def rename_last(self, result: str, name: str) -> None:
        """Give the last node's result another name."""
        op, reads, writes, attributes = self.nodes[-1]
        assert writes == [result]
        self.nodes[-1] = (op, reads, [name], attributes)


class _Unrolled:
    """Writes the plan's operations into a graph."""

    def __init__(self, graph: _Graph, decoder: PreNormDecoder, tables: Tensor) -> None:
        self._graph = graph
        self._decoder = decoder
        self._tables = tables
        self._head_width = decoder.width // decoder.heads

    def chunk(self, plan: Plan, sampler: SamplerTable, observation_units: Units | None) -> str:
        """Write everything; return the name of the normalised chunk."""
        graph, decoder = self._graph, self._decoder
        observation = graph.affine("observation", observation_units) if observation_units else "observation"
        memories = self._memories(observation)
        place = graph.constant("embed.positions", decoder.positions + decoder.embed[1])
        embed = graph.constant("embed.weight", decoder.embed[0].T)
        sample, original, slots = "initial_noise", "", dict[int, str]()
        for step, operations in enumerate(plan.steps):
            placed = graph.node("Add", graph.node("MatMul", sample, embed), place)
            stream = graph.shaped(placed, "rows", decoder.width)
            for op in operations:
                match op:
                    case Add(slot):
                        stream = graph.node("Add", stream, slots[slot])
                    case Fold(sources, into):
                        slots[into] = graph.node("Sum", *(slots[slot] for slot in sources))
                    case Combine(sources, weights):
                        named = [graph.constant(f"weight{weight!r}", weight) for weight in weights]
                        stream = graph.node("Sum", stream, *self._weighted(sources, named, slots))
                    case CombineGroups(block, sources, rows):
                        named = [
                            graph.constant(f"{plan.blocks[block]}.weight{row!r}", values)
                            for row, values in zip(rows, plan.channel_weights(op), strict=True)
                        ]
                        stream = graph.node("Sum", stream, *self._weighted(sources, named, slots))
                    case Compute(block, slot):
                        feature = self._branch(block, step, stream, memories)
                        stream = graph.node("Add", stream, feature)
                        if slot is not None:
                            slots[slot] = feature
            estimate = graph.linear(graph.norm(stream, "norm", decoder.norm), "head", decoder.head)
            estimate = graph.shaped(estimate, "batch", decoder.horizon, decoder.action_dim)
            sample, original = self._update(sampler, step, sample, estimate, original)
        return sample

    def _weighted(self, sources: tuple[int, ...], weights: list[str], slots: dict[int, str]) -> list[str]:
        return [self._graph.node("Mul", slots[source], weight) for source, weight in zip(sources, weights, strict=True)]

    def _memories(self, observation: str) -> list[tuple[str, str]]:
        """Return per layer keys [B, H, d/H, S] and values [B, H, S, d/H]; the time token's place holds zeros."""
        graph, encoder = self._graph, self._decoder.condition
        tokens, width = self._decoder.condition_tokens, self._decoder.width
        seen = graph.node("MatMul", observation, graph.constant("observe.weight", encoder.embed[0].T))
        seen = graph.node("Add", seen, graph.constant("observe.positions", encoder.positions + encoder.embed[1]))
        hidden = graph.linear(graph.shaped(seen, "memory_rows", width), "condition.hidden", encoder.hidden)
        mish = graph.node("Mul", hidden, graph.node("Tanh", graph.node("Softplus", hidden)))
        memory = graph.linear(mish, "condition.out", encoder.out)
        room = graph.constant("room_for_time", [0, 1, 0, 0, 0, 0])
        result = []
        for number, weights in enumerate(encoder.key_value):
            observed = graph.shaped(graph.linear(memory, f"L{number}.memory", weights), "batch", tokens - 1, 2 * width)
            keys, values = graph.nodes_of("Split", 2, graph.node("Pad", observed, room), axis=-1)
            result.append((self._heads(keys, tokens, (0, 2, 3, 1)), self._heads(values, tokens, (0, 2, 1, 3))))
        return result

    def _branch(self, block: int, step: int, stream: str, memories: list[tuple[str, str]]) -> str:
        graph, (number, kind) = self._graph, divmod(block, 3)
        layer, name = self._decoder.layers[number], f"L{number}"
        if kind == 2:
            hidden = graph.linear(graph.norm(stream, f"{name}.norm3", layer.norm3), f"{name}.hidden", layer.hidden)
            return graph.linear(self._gelu(hidden), f"{name}.out", layer.out)
        horizon = self._decoder.horizon
        if kind == 0:
            normed = graph.norm(stream, f"{name}.norm1", layer.norm1)
            q, k, v = graph.nodes_of("Split", 3, graph.linear(normed, f"{name}.self_in", layer.self_in), axis=-1)
            keys, values = self._heads(k, horizon, (0, 2, 3, 1)), self._heads(v, horizon, (0, 2, 1, 3))
            mixed = self._attend(q, keys, values, "self_mask", self._decoder.self_visible, horizon)
            return graph.linear(mixed, f"{name}.self_out", layer.self_out)
        q = graph.linear(graph.norm(stream, f"{name}.norm2", layer.norm2), f"{name}.cross_in", layer.cross_in)
        keys, values = (
            graph.node("Add", observed, now)
            for observed, now in zip(memories[number], self._time(step, number), strict=True)
        )
        tokens = self._decoder.condition_tokens
        mixed = self._attend(q, keys, values, "cross_mask", self._decoder.cross_visible, tokens)
        return graph.linear(mixed, f"{name}.cross_out", layer.cross_out)

    def _time(self, step: int, number: int) -> tuple[str, str]:
        """Return the time token's keys [1, H, d/H, S] and values [1, H, S, d/H], zeros in the observations' places."""
        rows = torch.zeros(self._decoder.condition_tokens, 2 * self._decoder.width)
        rows[0] = self._tables[step, number]
        keys, values = (
            part.view(-1, self._decoder.heads, self._head_width).transpose(0, 1)[None] for part in rows.chunk(2, dim=1)
        )
        name = f"step{step}.L{number}"
        keys = keys.transpose(2, 3)
        return self._graph.constant(f"{name}.time_keys", keys), self._graph.constant(f"{name}.time_values", values)

    def _attend(self, q: str, keys: str, values: str, mask: str, visible: tuple[int, ...], tokens: int) -> str:
        """Return what the queries [B * T, d] see, [B * T, d]."""
        graph, horizon = self._graph, self._decoder.horizon
        scores = graph.node("MatMul", self._heads(q, horizon, (0, 2, 1, 3)), keys)
        scores = graph.node("Mul", scores, graph.constant("score_scale", self._head_width**-0.5))
        hidden = np.where(np.arange(tokens) < np.array(visible)[:, None], 0.0, _HIDDEN)
        weights = graph.node("Softmax", graph.node("Add", scores, graph.constant(mask, hidden)), axis=-1)
        mixed = graph.node("Transpose", graph.node("MatMul", weights, values), perm=(0, 2, 1, 3))
        return graph.shaped(mixed, "rows", self._decoder.width)

    def _heads(self, x: str, tokens: int, order: tuple[int, ...]) -> str:
        heads = self._graph.shaped(x, "batch", tokens, self._decoder.heads, self._head_width)
        return self._graph.node("Transpose", heads, perm=order)

    def _gelu(self, x: str) -> str:
        graph = self._graph
        erf = graph.node("Erf", graph.node("Mul", x, graph.constant("root_half", 0.5**0.5)))
        twice = graph.node("Mul", x, graph.node("Add", erf, graph.constant("one", 1.0)))
        return graph.node("Mul", twice, graph.constant("half", 0.5))

    def _update(self, sampler: SamplerTable, step: int, sample: str, estimate: str, previous: str) -> tuple[str, str]:
        """Write step ``step`` of the sampler, without the terms whose coefficient is 0; return sample and x0."""
        graph = self._graph
        names = ("recover_sample", "recover_estimate", "to_original", "to_sample", "to_estimate", "to_previous")
        factor = {name: float(getattr(sampler, name)[step]) for name in (*names, "to_noise")}

        def weighted(terms: dict[str, str]) -> list[str]:
            return [
                graph.node("Mul", value, graph.constant(f"step{step}.{name}", factor[name]))
                for name, value in terms.items()
                if factor[name]
            ]

        recovered = graph.node("Sum", *weighted({"recover_sample": sample, "recover_estimate": estimate}))
        bounds = graph.constant("lowest", -sampler.clip), graph.constant("highest", sampler.clip)
        original = graph.node("Clip", recovered, *bounds)
        terms = {"to_original": original, "to_sample": sample, "to_estimate": estimate, "to_previous": previous}
        if factor["to_noise"]:
            terms["to_noise"] = graph.node(
                "Gather", "step_noise", graph.constant(f"step{step}", np.int64(step)), axis=0
            )
        return graph.node("Sum", *weighted(terms)), original
