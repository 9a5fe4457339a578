"""The floor of a plan, counted by hand and measured on a clock that the test turns."""

from __future__ import annotations

import pytest
import torch
from toys import random_schedule

from bac.decoder import PreNormDecoder
from bac.passes import optimise
from bac.plan import cost, lower
from bac.roofline import Roofline, measure_roofline, plan_floor_s, weight_bytes
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.diffusion_trunk import DiffusionTransformerTrunk

CONFIG = DiffusionTransformerConfig(action_dim=2, observation_dim=5, horizon=16, layers=2, heads=4, width=64)


def decoder() -> PreNormDecoder:
    return DiffusionTransformerTrunk(DiffusionTransformer(CONFIG)).decoder()


def test_an_update_reads_its_own_matrices() -> None:
    # Self-attention 4 d^2, cross-attention without keys and values 2 d^2, feed-forward 8 d^2.
    square = 64 * 64
    assert weight_bytes(decoder(), 4) == (16 * square, 8 * square, 32 * square) * 2
    assert weight_bytes(decoder(), 2) == (8 * square, 4 * square, 16 * square) * 2


def test_the_slower_of_products_and_reads_is_the_floor() -> None:
    machine = Roofline(flops=100.0, bandwidth=10.0)
    assert machine.floor_s(200, 10) == 2
    assert machine.floor_s(200, 30) == 3


def test_a_plan_reads_the_weights_of_its_updates_and_of_no_other() -> None:
    trunk = DiffusionTransformerTrunk(DiffusionTransformer(CONFIG))
    schedule = random_schedule(3, 9, trunk.blocks)
    plan, weights = optimise(lower(schedule)), weight_bytes(trunk.decoder(), 4)
    read = sum(int(count) * size for count, size in zip(schedule.mask.sum(axis=1), weights, strict=True))
    assert plan_floor_s(plan, trunk.cost, weights, Roofline(torch.inf, 1e9)) == pytest.approx(read / 1e9)
    flops = cost(plan, trunk.cost).planned
    assert plan_floor_s(plan, trunk.cost, weights, Roofline(1e9, torch.inf)) == pytest.approx(flops / 1e9)


def test_rates_are_of_the_best_run() -> None:
    # Ten runs of each are timed; a run is two readings apart, and one of each ten takes half as long.
    def readings():
        now = 0.0
        for _ in range(2):
            for run in range(10):
                yield now
                now += 0.25 if run == 4 else 0.5
                yield now

    stream = readings()
    machine = measure_roofline(4096, clock=lambda: next(stream))
    assert machine == Roofline(flops=2 * 1024**3 / 0.25, bandwidth=4096 / 0.25)
    assert next(stream, None) is None
