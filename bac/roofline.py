"""The least time a plan can take: its products at the measured rate, its weights at the measured bandwidth.

The roofline bound (Williams, Waterman and Patterson 2009) with both of its lines measured here and now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bac.decoder import PreNormDecoder
from bac.plan import Compute, Plan, cost
from bac.trunk import TrunkCost

_MATRIX = 1024
_REPEATS = 10


@dataclass(frozen=True)
class Roofline:
    """What a machine can do at best, with the threads torch has.

    Attributes:
        flops: float32 multiply-adds of a large matrix product, FLOPs per second (a multiply-add is 2).
        bandwidth: bytes per second, read again and again from an array as large as the weights, so from whichever
            cache holds them.
    """

    flops: float
    bandwidth: float

    def floor_s(self, plan_flops: float, plan_bytes: float) -> float:
        """Return the seconds below which no executor can get, products and reads overlapping perfectly."""
        return max(plan_flops / self.flops, plan_bytes / self.bandwidth)


def measure_roofline(weight_bytes: int, clock: Callable[[], float] = time.perf_counter) -> Roofline:
    """Time a matrix product of the library and a scalar product of an array with itself; the best of several runs.

    Args:
        weight_bytes: size of the array.
        clock: seconds, monotonic.
    """
    matrix, array = torch.ones(_MATRIX, _MATRIX), torch.ones(max(weight_bytes // 4, 1))
    return Roofline(
        flops=2 * _MATRIX**3 / _best(lambda: matrix @ matrix, clock),
        bandwidth=array.nbytes / _best(lambda: array @ array, clock),
    )


def weight_bytes(decoder: PreNormDecoder, bytes_per_weight: int) -> tuple[int, ...]:
    """Return per block the bytes of the matrices that an update reads (biases and norms are not counted)."""
    sizes = [
        sum(weight.numel() for weight, _ in pair)
        for layer in decoder.layers
        for pair in ((layer.self_in, layer.self_out), (layer.cross_in, layer.cross_out), (layer.hidden, layer.out))
    ]
    return tuple(bytes_per_weight * size for size in sizes)


def plan_floor_s(plan: Plan, trunk: TrunkCost, weights: tuple[int, ...], roofline: Roofline) -> float:
    """Return the floor of one call at batch 1, seconds.

    Args:
        plan: operations per step.
        trunk: FLOPs of the parts.
        weights: bytes per block, of ``weight_bytes``; every update reads its block's anew.
        roofline: of this machine.
    """
    read = sum(weights[op.block] for op in plan.operations() if isinstance(op, Compute))
    return roofline.floor_s(cost(plan, trunk).planned, read)


def _best(work: Callable[[], object], clock: Callable[[], float]) -> float:
    work()
    taken = []
    for _ in range(_REPEATS):
        began = clock()
        work()
        taken.append(clock() - began)
    return min(taken)
