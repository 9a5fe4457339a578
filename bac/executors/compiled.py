"""Compiled executor: the whole chunk is one call into C++ that was compiled for this processor and network size.

The plan becomes a list of integers, the weights become panels that each product reads once from front to back
(``decoder.cpp``). No Python, no allocation and no decision between the first noise and the last step. The rows of a
batch are shared out among torch's threads; one row runs on one thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bac.choices import Choice
from bac.decoder import DecoderLayer, DecoderTrunk, PreNormDecoder
from bac.errors import Unavailable, sentence
from bac.executors.base import ChunkNoise, require_together, require_width
from bac.executors.committed import Committed, CommittedPaths
from bac.executors.toolchain import build_library
from bac.plan import Add, Combine, CombineGroups, Compute, Fold, Operation, Plan
from bac.sampler_table import SamplerTable
from bac.trunk import ResidualTrunk

_SOURCE = Path(__file__).parent / "decoder.cpp"
_COMPUTE, _ADD, _FOLD, _COMBINE, _COMBINE_CHANNELS = range(5)
_LANES = 16
"""Floats in the widest vector of any processor that decoder.cpp knows."""


class WeightType(Choice):
    """How weights are stored; activations and sums are float32 always."""

    FP32 = "fp32"
    BF16 = "bf16"


def compile_for(trunk: ResidualTrunk, weights: WeightType) -> tuple[ctypes.CDLL, PreNormDecoder]:
    """Return the library for networks of this trunk's sizes, and the trunk laid open.

    Raises:
        Unavailable: no compiler, a trunk of another form, or one on another device.
    """
    if not isinstance(trunk, DecoderTrunk) or trunk.device.type != "cpu":
        raise Unavailable(
            sentence(
                "executor compiled",
                expected="a pre-norm decoder on the CPU",
                got=f"{type(trunk).__name__} on {trunk.device}",
                mend="use executor=eager",
            )
        )
    decoder = trunk.decoder()
    if decoder.width % (_LANES * decoder.heads):
        raise Unavailable(
            sentence(
                "executor compiled",
                expected=f"attention heads of a multiple of {_LANES} channels",
                got=f"{decoder.width} channels in {decoder.heads} heads",
                mend="use executor=eager",
            )
        )
    sizes = {
        "BAC_WIDTH": decoder.width,
        "BAC_HEADS": decoder.heads,
        "BAC_LAYERS": len(decoder.layers),
        "BAC_TOKENS": decoder.horizon,
        "BAC_MEMORY": decoder.condition_tokens,
        "BAC_ACTIONS": decoder.action_dim,
    }
    library = build_library(_SOURCE, sizes | ({"BAC_BF16": 1} if weights is WeightType.BF16 else {}))
    library.bac_panel.restype = ctypes.c_int32
    library.bac_workspace.restype = ctypes.c_int64
    library.bac_workspace.argtypes = [ctypes.c_int32, ctypes.c_int32]
    library.bac_chunk.restype = None
    library.bac_chunk.argtypes = [ctypes.c_void_p]
    return library, decoder


class CompiledExecutor:
    """Runs a plan on the CPU. Safe to call from several threads at once: all state of a call is local to it.

    Args:
        plan: operations per step.
        trunk: the weights, of the plain form that ``bac.decoder`` describes; packed here, so later changes to the
            network are not seen.
        sampler: K steps, as many as the plan.
        weights: how weights are stored.

    Raises:
        Mismatch: plan, trunk and sampler do not belong together.
        Unavailable: no compiler, a trunk of another form, or one on another device.
    """

    def __init__(
        self, plan: Plan, trunk: ResidualTrunk, sampler: SamplerTable, weights: WeightType = WeightType.FP32
    ) -> None:
        require_together(plan, trunk, sampler)
        self._library, decoder = compile_for(trunk, weights)
        self._trunk = trunk
        self._sampler = sampler
        self._paths = CommittedPaths(sampler, trunk.device)
        self._width = decoder.width
        self._shape = (decoder.horizon, decoder.action_dim)
        with torch.inference_mode():
            self._matrices = _matrices(decoder, self._library.bac_panel(), weights)
            self._vectors = torch.cat([each.flatten() for layer in decoder.layers for each in _vectors(layer)]).float()
            self._ends = torch.cat([each.flatten() for each in _ends(decoder)]).float()
            self._tables = torch.stack(list(trunk.step_tables(sampler.timesteps))).float()
        self._visible = torch.tensor([decoder.self_visible, decoder.cross_visible], dtype=torch.int32)
        self._coefficients = torch.from_numpy(_coefficients(sampler))
        self._take(plan)

    def with_plan(self, plan: Plan) -> CompiledExecutor:
        """Return an executor of another plan on the same packed weights.

        Raises:
            Mismatch: the plan does not belong to trunk and sampler.
        """
        require_together(plan, self._trunk, self._sampler)
        other = copy(self)
        other._take(plan)
        return other

    def _take(self, plan: Plan) -> None:
        require_width(plan, self._width)
        self.plan = plan
        self._operations, self._channel_weights = _encoded(plan)

    @torch.inference_mode()
    def __call__(self, observation: Tensor, noise: ChunkNoise, committed: Committed | None = None) -> Tensor:
        """Return the normalised action chunk float32[B, T, Da] for normalised observations float32[B, To, Do]."""
        batch = observation.shape[0]
        noise.require(batch, self._sampler.steps)
        noise.require_float32(*self._shape)
        if committed is not None:
            committed.require(noise)
        condition = torch.stack(list(self._trunk.condition(observation))).float()
        path = None if committed is None or not committed.count else self._paths(committed, noise)
        first = 0 if committed is None else committed.first
        # Rows are independent: each thread takes its share. One row is one thread's.
        threads = min(torch.get_num_threads(), batch)
        if threads == 1:
            return self._run(condition, noise.initial, noise.steps, path, first)
        shares = [slice(batch * n // threads, batch * (n + 1) // threads) for n in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            chunks = pool.map(
                lambda rows: self._run(
                    condition[:, rows],
                    noise.initial[rows],
                    noise.steps[:, rows],
                    None if path is None else path[:, rows],
                    first,
                ),
                shares,
            )
            return torch.cat(list(chunks))

    def _run(self, condition: Tensor, initial: Tensor, steps: Tensor, path: Tensor | None, first: int) -> Tensor:
        condition, fresh = condition.contiguous(), steps.contiguous()
        committed = fresh[:0] if path is None else path.contiguous()
        sample = initial.clone(memory_format=torch.contiguous_format)
        workspace = torch.empty(self._library.bac_workspace(len(initial), self.plan.slots))
        call = _Call(
            matrices=self._matrices.data_ptr(),
            vectors=self._vectors.data_ptr(),
            ends=self._ends.data_ptr(),
            self_visible=self._visible[0].data_ptr(),
            cross_visible=self._visible[1].data_ptr(),
            tables=self._tables.data_ptr(),
            coefficients=self._coefficients.data_ptr(),
            operations=self._operations.data_ptr(),
            channel_weights=self._channel_weights.data_ptr(),
            condition=condition.data_ptr(),
            fresh=fresh.data_ptr(),
            committed=committed.data_ptr(),
            sample=sample.data_ptr(),
            workspace=workspace.data_ptr(),
            clip=self._sampler.clip,
            steps=self._sampler.steps,
            batch=len(initial),
            slots=self.plan.slots,
            committed_first=first,
            committed_count=0 if path is None else path.shape[2],
        )
        # ctypes lets go of the interpreter lock meanwhile.
        self._library.bac_chunk(ctypes.byref(call))
        return sample


class _Call(ctypes.Structure):
    """``struct Call`` of decoder.cpp, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "matrices",
                "vectors",
                "ends",
                "self_visible",
                "cross_visible",
                "tables",
                "coefficients",
                "operations",
                "channel_weights",
                "condition",
                "fresh",
                "committed",
                "sample",
                "workspace",
            )
        ),
        ("clip", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("steps", "batch", "slots", "committed_first", "committed_count")),
    )


def _matrices(decoder: PreNormDecoder, panel: int, weights: WeightType) -> Tensor:
    """Return all matrices end to end in the order of ``struct Layer``, packed one by one to keep the peak low."""
    matrices = [
        weight
        for layer in decoder.layers
        for weight, _ in (layer.self_in, layer.self_out, layer.cross_in, layer.cross_out, layer.hidden, layer.out)
    ]
    stored = torch.float32 if weights is WeightType.FP32 else torch.bfloat16
    result = torch.empty(sum(weight.numel() for weight in matrices), dtype=stored)
    start = 0
    for weight in matrices:
        result[start : start + weight.numel()] = _packed(weight.to(stored), panel).flatten()
        start += weight.numel()
    return result


def _packed(weight: Tensor, panel: int) -> Tensor:
    """Return a matrix [out, in] as [out / panel, in, panel]; in bf16 as [out / panel, in / 2, panel, 2]."""
    panels = weight.reshape(-1, panel, weight.shape[1])
    if weight.dtype == torch.float32:
        return panels.transpose(1, 2)
    return panels.reshape(len(panels), panel, -1, 2).transpose(1, 2)


def _vectors(layer: DecoderLayer) -> Iterator[Tensor]:
    """Yield norms and biases in the order of ``struct Layer``."""
    yield from (*layer.norm1, layer.self_in[1], layer.self_out[1])
    yield from (*layer.norm2, layer.cross_in[1], layer.cross_out[1])
    yield from (*layer.norm3, layer.hidden[1], layer.out[1])


def _ends(decoder: PreNormDecoder) -> Iterator[Tensor]:
    """Yield what stands before and after the layers, in the order of ``struct Ends``."""
    weight, bias = decoder.embed
    yield from (weight.T, decoder.positions + bias, *decoder.norm, *decoder.head)


def _coefficients(sampler: SamplerTable) -> np.ndarray:
    columns = (
        sampler.recover_sample,
        sampler.recover_estimate,
        sampler.to_original,
        sampler.to_sample,
        sampler.to_estimate,
        sampler.to_noise,
        sampler.to_previous,
    )
    return np.ascontiguousarray(np.stack(columns, axis=1), dtype=np.float32)


def _encoded(plan: Plan) -> tuple[Tensor, Tensor]:
    """Return what decoder.cpp reads.

    Returns:
        int32[words], per step the number of operations, then each one; float32[rows, d], weights per channel, each row
        once however often operations name it.
    """
    words: list[int] = []
    rows: dict[bytes, int] = {}
    for operations in plan.steps:
        words.append(len(operations))
        for op in operations:
            words.extend(_words(op, plan, rows))
    weights = np.frombuffer(b"".join(rows), np.float32).copy()
    return torch.tensor(words, dtype=torch.int32), torch.from_numpy(weights)


def _words(op: Operation, plan: Plan, rows: dict[bytes, int]) -> tuple[int, ...]:
    """Return an operation as integers; weights per channel go to ``rows``, values -> their number."""
    match op:
        case Compute(block, slot):
            return (_COMPUTE, block, -1 if slot is None else slot)
        case Add(slot):
            return (_ADD, slot)
        case Fold(slots, into):
            return (_FOLD, into, len(slots), *slots)
        case Combine(slots, weights):
            return (_COMBINE, len(slots), *slots, *np.array(weights, np.float32).view(np.int32).tolist())
        case CombineGroups(_, slots, _):
            values = plan.channel_weights(op).astype(np.float32)
            return (
                _COMBINE_CHANNELS,
                len(slots),
                *slots,
                *(rows.setdefault(row.tobytes(), len(rows)) for row in values),
            )
