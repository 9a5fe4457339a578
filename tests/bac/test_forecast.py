"""Predictions: by hand, against the online algorithm, through plans, files and hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import factorial

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import (
    BLOCKS,
    PROVENANCE,
    drive,
    random_forecast,
    random_inputs,
    random_profile,
    random_schedule,
    sampler_step,
    small_network,
    with_groups,
)

import bac
from bac.errors import InvalidInput
from bac.executors import EagerExecutor
from bac.methods import AdamsBashforth, LastStep, Method, TaylorSeer, Uniform
from bac.methods.forecast import differences, forecast_of
from bac.passes import EXACT, fold_reused_runs, optimise
from bac.plan import Combine, Fold, Plan, lower, simulate, verify
from bac.schedule import CacheSchedule
from policies.diffusion_trunk import DiffusionTransformerTrunk, diffusion_transformer_sites
from policies.samplers import DiffusionProcess, ddim

STEPS = 12
SAMPLER = ddim(DiffusionProcess(train_steps=STEPS), STEPS)
PROFILE = random_profile(seed=0, steps=STEPS)
SEEN = np.array([6, 4, 1])
# A float32 network; the weights of a prediction cancel, so that rounding shows a little more than in its features.
TOLERANCE = 1e-5


def with_random_forecast(seed: int) -> CacheSchedule:
    schedule = random_schedule(seed, STEPS)
    return replace(schedule, forecast=random_forecast(schedule.mask, seed))


def test_differences_by_hand() -> None:
    zeroth, first, second = differences(SEEN, 2)
    assert zeroth.tolist() == [1, 0, 0]
    # (F6 - F4) / 2, and the change of slope from (F4 - F1) / 3 over the latest gap of 2.
    assert first.tolist() == [0.5, -0.5, 0]
    assert second == pytest.approx([0.25, -0.25 - 1 / 6, 1 / 6])


def test_taylor_weights_by_hand() -> None:
    weights = TaylorSeer(order=2)._weights(SEEN, 8)
    assert weights == pytest.approx([1 + 2 * 0.5 + 2 * 0.25, -2 * 0.5 - 2 * (0.25 + 1 / 6), 2 / 6])


@pytest.mark.parametrize(
    ("slopes", "weights"),
    [
        (1, [2, -1, 0]),
        # Slopes (F6 - F4) / 2 and (F4 - F1) / 3, weighted 3/2 and -1/2, two steps ahead.
        (2, [1 + 3 / 2, -3 / 2 - 1 / 3, 1 / 3]),
    ],
)
def test_adams_bashforth_weights_by_hand(slopes: int, weights: list[float]) -> None:
    padded = np.zeros(3)
    padded[: slopes + 1] = AdamsBashforth(slopes=slopes)._weights(SEEN[: slopes + 1], 8)
    assert padded == pytest.approx(weights)


@pytest.mark.parametrize(
    "method", [TaylorSeer(4, order=1), TaylorSeer(4, order=3), AdamsBashforth(4, 1), AdamsBashforth(4, 3)]
)
def test_a_linear_feature_is_predicted_exactly(method: TaylorSeer | AdamsBashforth) -> None:
    schedule = method.schedule(PROFILE)
    predicted = 0
    for step in np.flatnonzero(~schedule.mask[0]):
        terms = schedule.terms(0, int(step))
        if len(np.flatnonzero(schedule.mask[0, :step])) > 1:
            assert sum(weight * (3 + 0.5 * source) for source, weight in terms) == pytest.approx(3 + 0.5 * step)
            predicted += 1
    assert predicted > 3


def test_order_zero_is_reuse() -> None:
    held = Uniform(4).schedule(PROFILE)
    taylor = TaylorSeer(4, order=0, first_steps=1).schedule(PROFILE)
    assert np.array_equal(taylor.mask, held.mask)
    assert lower(taylor) == lower(held)


def test_first_steps_all_update() -> None:
    mask = TaylorSeer(2, first_steps=4, last_step=LastStep.FREE).schedule(PROFILE).mask
    assert np.flatnonzero(mask[3]).tolist() == [0, 1, 2, 3, 6]


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_in_a_plan_is_the_online_algorithm(order: int) -> None:
    schedule = TaylorSeer(4, order, first_steps=2).schedule(PROFILE)
    trunk, (observation, noise) = DiffusionTransformerTrunk(small_network()), random_inputs(1, batch=2, steps=STEPS)
    condition, sample = trunk.condition(observation), noise.initial
    factors: list[list[Tensor]] = [[] for _ in BLOCKS]
    latest = [0] * len(BLOCKS)
    for step, table in enumerate(trunk.step_tables(SAMPLER.timesteps)):
        stream = trunk.embed(sample)
        for block in range(len(BLOCKS)):
            if schedule.mask[block, step]:
                fresh = [trunk.branch(block, stream, table, condition)]
                for old in factors[block][:order]:
                    fresh.append((fresh[-1] - old) / (step - latest[block]))
                factors[block], latest[block] = fresh, step
                feature = fresh[0]
            else:
                ahead = step - latest[block]
                feature = sum(each * ahead**i / factorial(i) for i, each in enumerate(factors[block]))  # type: ignore[assignment]
            stream = stream + feature
        sample = sampler_step(SAMPLER, step, sample, trunk.head(stream), noise.steps[step])
    chunk = EagerExecutor(optimise(lower(schedule)), trunk, SAMPLER)(observation, noise)
    torch.testing.assert_close(chunk, sample, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(20))
def test_plans_do_what_the_schedule_says(seed: int) -> None:
    schedule = with_random_forecast(seed)
    plain, packed = lower(schedule), optimise(lower(schedule))
    assert any(isinstance(op, Combine) for op in plain.operations())
    for plan in (plain, packed):
        verify(plan, schedule)
        assert Plan.parse(str(plan), BLOCKS) == plan
    assert packed.slots <= plain.slots
    for step, stream in enumerate(simulate(plain)):
        for block, source in stream:
            terms = schedule.terms(block, step)
            assert source == (terms[0][0] if terms in {((terms[0][0], 1.0),)} else terms)


def test_verify_refuses_another_weight() -> None:
    schedule = with_random_forecast(0)
    assert schedule.forecast is not None
    other = replace(schedule, forecast=schedule.forecast * 1.5)
    with pytest.raises(InvalidInput, match="plan at step"):
        verify(lower(other), schedule)


FOLDED = """
000: L0.sa>0 L0.ca>1 L0.ffn>2
001: 6=0+1+2 +6
002: L0.sa>3 L0.ca>4 L0.ffn>5
003: 7=3+4+5 +7*1.5+6*-0.5
004: +7*2.0+6*-1.0
005: +7*2.5+6*-1.5
""".strip()


def test_predictions_of_equal_weights_fold() -> None:
    mask = np.tile([True, False, True, False, False, False], (3, 1))
    line = forecast_of(mask, 2, AdamsBashforth()._weights)
    schedule = CacheSchedule(mask, BLOCKS[:3], PROVENANCE, "toy", {}, line)
    folded = fold_reused_runs(lower(schedule))
    assert str(folded) == FOLDED
    verify(folded, schedule)
    assert Plan.parse(FOLDED, BLOCKS[:3]) == folded


@pytest.mark.parametrize("method", [TaylorSeer(4, order=2), AdamsBashforth(4, 2)])
def test_one_prediction_per_step_where_all_blocks_share(method: TaylorSeer | AdamsBashforth) -> None:
    schedule = method.schedule(PROFILE)
    folded = fold_reused_runs(lower(schedule))
    for step, operations in enumerate(folded.steps):
        assert sum(not isinstance(op, Fold) for op in operations) == (len(BLOCKS) if schedule.mask[0, step] else 1)
    # Every update of all blocks is summed at most once.
    assert sum(isinstance(op, Fold) for op in folded.operations()) <= schedule.mask[0].sum()


def test_predictions_of_other_weights_do_not_fold() -> None:
    mask = np.tile([True, True, False, False], (3, 1))
    schedule = CacheSchedule(mask, BLOCKS[:3], PROVENANCE, "toy", {}, forecast_of(mask, 2, AdamsBashforth()._weights))
    assert schedule.forecast is not None
    mixed = schedule.forecast.copy()
    mixed[2, 2] *= 2
    folded = fold_reused_runs(lower(replace(schedule, forecast=mixed)))
    assert str(folded).splitlines()[2:] == [
        "002: 6=3+4 7=0+1 +6*2.0+7*-1.0 +5*4.0+2*-2.0",
        "003: 8=3+4+5 9=0+1+2 +8*3.0+9*-2.0",
    ]
    verify(folded, replace(schedule, forecast=mixed))


@pytest.mark.parametrize(
    ("line", "tampered"),
    [
        ("003: 7=3+4+5 +7*1.5+6*-0.5", "003: 7=3+4 +7*1.5+6*-0.5"),
        ("003: 7=3+4+5 +7*1.5+6*-0.5", "003: 7=4+3+5 +7*1.5+6*-0.5"),
        ("004: +7*2.0+6*-1.0", "004: +7*2.0+3*-1.0"),
    ],
)
def test_refuses_a_prediction_from_features_of_other_blocks(line: str, tampered: str) -> None:
    assert line in FOLDED
    with pytest.raises(InvalidInput, match="expected a prediction from computed features of the same blocks"):
        simulate(Plan.parse(FOLDED.replace(line, tampered), BLOCKS[:3]))


@pytest.mark.parametrize("method", [TaylorSeer(4, order=2), AdamsBashforth(4, 1)])
def test_folded_predictions_are_the_unfolded_ones(method: TaylorSeer | AdamsBashforth) -> None:
    schedule = method.schedule(PROFILE)
    trunk, call = DiffusionTransformerTrunk(small_network()), random_inputs(2, batch=2, steps=STEPS)
    plain, folded = (
        EagerExecutor(optimise(lower(schedule), passes), trunk, SAMPLER)(*call)
        for passes in (EXACT, (fold_reused_runs, *EXACT))
    )
    torch.testing.assert_close(folded, plain, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "make", [with_random_forecast, lambda seed: with_groups(random_schedule(seed, STEPS), 16, seed)]
)
def test_hooks_predict_as_plans_do(make: Callable[[int], CacheSchedule], seed: int) -> None:
    schedule, network = make(seed), small_network()
    observation, noise = random_inputs(seed, batch=2, steps=STEPS)
    planned = EagerExecutor(optimise(lower(schedule)), DiffusionTransformerTrunk(network), SAMPLER)(observation, noise)
    with bac.attach(diffusion_transformer_sites(network), schedule, SAMPLER.timesteps), torch.inference_mode():
        hooked = drive(network, SAMPLER, observation, noise)
    torch.testing.assert_close(hooked, planned, rtol=0, atol=TOLERANCE)


def test_file_keeps_the_forecast_and_the_digest_knows_it() -> None:
    schedule = with_random_forecast(1)
    assert schedule.forecast is not None
    read = CacheSchedule.from_json(json.loads(json.dumps(schedule.to_json())))
    assert read.forecast is not None
    assert np.array_equal(read.forecast, schedule.forecast)
    digests = {
        schedule.digest,
        replace(schedule, forecast=None).digest,
        replace(schedule, forecast=-schedule.forecast).digest,
    }
    assert len(digests) == 3
    assert read.digest in digests


def nan(forecast: np.ndarray) -> np.ndarray:
    forecast[0, 3, 0] = np.nan
    return forecast


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (nan, "expected finite float"),
        (lambda forecast: forecast[:, :5], "expected finite float"),
        (np.ones_like, "expected weights on computed features alone"),
    ],
)
def test_refuses_a_forecast_that_cannot_be(damage: Callable[[np.ndarray], np.ndarray], told: str) -> None:
    schedule = with_random_forecast(2)
    assert schedule.forecast is not None
    with pytest.raises(InvalidInput, match=told):
        replace(schedule, forecast=damage(schedule.forecast.copy()))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: TaylorSeer(order=5), r"cache\.order: expected 0 to 4, got 5"),
        (lambda: TaylorSeer(order=-1), r"cache\.order: expected 0 to 4, got -1"),
        (lambda: TaylorSeer(first_steps=0), r"cache\.first_steps: expected at least 1, got 0"),
        (lambda: AdamsBashforth(slopes=5), r"cache\.slopes: expected 1 to 4, got 5"),
        (lambda: AdamsBashforth(slopes=0), r"cache\.slopes: expected 1 to 4, got 0"),
    ],
)
def test_refuses_orders_without_a_formula_before_any_work(make: Callable[[], object], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        make()


def test_refuses_more_first_steps_than_steps() -> None:
    with pytest.raises(InvalidInput, match=r"cache\.first_steps: expected 1 to 12, got 13"):
        TaylorSeer(4, first_steps=13).schedule(PROFILE)


def test_a_schedule_that_never_predicts_survives_its_file() -> None:
    schedule = TaylorSeer(STEPS, order=2).schedule(PROFILE)
    read = CacheSchedule.from_json(json.loads(json.dumps(schedule.to_json())))
    assert read.digest == schedule.digest
    assert optimise(lower(read)) == optimise(lower(schedule))


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (TaylorSeer(2, order=3, first_steps=1), r"cache\.order: expected at most 1, .* got 3; raise cache\.updates"),
        (TaylorSeer(2, order=4), r"cache\.order: expected at most 3, .* got 4"),
        (AdamsBashforth(3, slopes=3), r"cache\.slopes: expected at most 2, .* got 3"),
    ],
)
def test_an_order_above_the_history_refuses(method: Method, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        method.schedule(random_profile(seed=0, steps=20))
