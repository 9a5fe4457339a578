"""Episodes with latency: exactly a rollout without it, reproducible with it, and the loop's rules in a world."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from studies.realtime import Row, point_key, trace_key
from studies.realtime_episodes import RealtimeEpisode, World, play_virtual, play_wallclock
from studies.realtime_play import MEASURED, drawn_from, given_trace, measured_for, measured_in_turn, summary

import bac
from bac.control import ActionLimits, LoopSettings, MonotonicClock, Predict, Request, Seam, repeat, ticks_for
from bac.errors import CorruptArtefact, InvalidInput, Unavailable
from bac.schedule import CacheSchedule
from configs.studies import BenchConfig
from envs.push_t import PushTEnv
from envs.rollout import rollout
from policies.diffusion_policy import DiffusionPolicy
from policies.normalizer import LimitsNormalizer
from policies.realtime import ChunkSource
from tests.composing import composed
from tests.policies.networks import small_checkpoint, small_image_checkpoint

SEEDS = [100000, 100001, 100002, 100003]


def study(*overrides: str) -> BenchConfig:
    return composed("bench", *overrides)


def row(digest: str = "d", action_steps: int = 8) -> Row:
    """Return all of a row that its names hang on."""
    return cast(Row, SimpleNamespace(digest=digest, policy=SimpleNamespace(action_steps=action_steps)))


@pytest.mark.parametrize(
    ("override", "points", "traces"),
    [
        ("task.seed=5", True, False),
        ("task.max_steps=9", True, False),
        ("task=can", True, False),
        ("realtime.episodes=3", True, False),
        ("threads=2", False, True),
        ("realtime.calls=300", False, True),
    ],
)
def test_what_is_kept_answers_no_other_question(override: str, points: bool, traces: bool) -> None:
    usual, other = study(), study(override)

    def differs(name: Callable[[BenchConfig], str]) -> bool:
        return name(usual) != name(other)

    assert differs(lambda config: point_key(config, row(), Seam.BLEND, 200.0, "timed")) is points
    for inpaint in (False, True):
        assert differs(lambda config, inpaint=inpaint: trace_key(config, row(), inpaint)) is traces
    assert point_key(usual, row(), Seam.BLEND, 200.0, "t") != point_key(usual, row("d", 4), Seam.BLEND, 200.0, "t")


@pytest.mark.parametrize("of", ["studies.realtime.torch.__version__", "studies.realtime.device_name"])
def test_what_was_timed_on_another_device_or_torch_is_timed_again(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trace_key(study(), row(), True)
    monkeypatch.setattr(of, "2.0" if of.endswith("__") else lambda _: "another")
    assert trace_key(study(), row(), True) != before


def test_what_is_kept_of_a_schedule_is_of_that_seam_and_latency_alone() -> None:
    asked = [(each, seam, at) for each in (row("d"), row("e")) for seam in Seam for at in (0.0, 200.0, MEASURED)]
    timed = [partial(trace_key, study(), inpaint=inpaint) for inpaint in (False, True)]
    # A measured point hangs on the latencies that were measured, another on none.
    names = {point_key(study(), *each, trace(each[0])) for each in asked for trace in timed}
    assert len(names) == 2 * len(Seam) * (2 + 2)
    assert len({trace(each) for each, _, _ in asked for trace in timed}) == 4


class Small(PushTEnv):
    """Push-T with the observations of the small policy of the tests."""

    def reset(self, **options: object):
        observation, info = super().reset(**options)
        return self.shrunk(observation), info

    def step(self, action: np.ndarray):
        observation, *rest = super().step(action)
        return self.shrunk(observation), *rest

    def shrunk(self, observation: dict) -> dict:
        return observation | {"keypoints": observation["keypoints"][:3]}


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    torch.manual_seed(0)
    made = DiffusionPolicy(small_checkpoint())
    # Normalised by the table, so that actions lie on it.
    scale = LimitsNormalizer(torch.full((2,), 2 / 512), torch.full((2,), -1.0))
    return DiffusionPolicy(replace(made.checkpoint, action_normalizer=scale))


def world(policy: DiffusionPolicy, max_steps: int = 30, **changes: object) -> World:
    settings = LoopSettings(**{"rate_hz": 10.0, "replan_ticks": policy.action_steps, "deadline_ticks": 0, **changes})
    return World(lambda: Small(max_steps=max_steps), ChunkSource([policy]), settings, max_steps, repeat)


def play(policy: DiffusionPolicy, latency_ms: float, parallel: int = 2, **changes: object) -> list[RealtimeEpisode]:
    return play_virtual(world(policy, **changes), SEEDS, lambda seed, number: latency_ms, parallel=parallel)


@pytest.mark.parametrize("parallel", [1, 3, 4])
def test_no_latency_and_replace_is_the_rollout_exactly(policy: DiffusionPolicy, parallel: int) -> None:
    expected = rollout(lambda: Small(max_steps=30), policy, SEEDS, parallel=parallel)
    for seam in (Seam.REPLACE, Seam.INPAINT):  # nothing is committed while nothing takes time
        played = play(policy, 0.0, parallel, seam=seam)
        assert [each.episode for each in played] == expected
    assert len({episode.rewards for episode in expected}) > 1
    assert all(each.report.counters.executed == 30 for each in played)


def test_episodes_that_end_early_hand_their_place_on_as_in_a_rollout(policy: DiffusionPolicy) -> None:
    class Short(Small):
        """Ends after as many steps as its seed says."""

        def reset(self, **options: object):
            self.max_steps = 3 + int(options["seed"]) % 7 * 3
            return super().reset(**options)

    seeds = list(range(100000, 100009))
    made = replace(world(policy), make_env=Short)
    played = play_virtual(made, seeds, lambda seed, number: 0.0, parallel=3)
    assert [each.episode for each in played] == rollout(Short, policy, seeds, parallel=3)


def test_latency_costs_waiting_and_drops_what_is_late(policy: DiffusionPolicy) -> None:
    # The chunk has 5 actions, asked for every 4 ticks: one tick late is what its tail bridges.
    for each in play(policy, 80.0, deadline_ticks=1):
        counters = each.report.counters
        assert (counters.waited, counters.executed, counters.held, counters.deadline_misses) == (1, 29, 0, 0)
        assert each.episode.steps == 29
        assert counters.late_actions == 7
        assert len(each.seam_jumps) == 7
        assert len(each.steps_within) == 21
    for each in play(policy, 180.0, deadline_ticks=1):
        counters = each.report.counters
        assert counters.waited == 2
        assert counters.held > 0
        assert counters.deadline_misses == counters.requests


def test_a_latency_trace_gives_the_same_episodes_however_many_at_a_time(policy: DiffusionPolicy) -> None:
    latency = drawn_from([10.0, 90.0, 170.0, 350.0])
    for seam in Seam:
        made = world(policy, seam=seam, deadline_ticks=1)
        one, two, four = (
            [replace(each, report=None) for each in play_virtual(made, SEEDS, latency, parallel=n)] for n in (1, 2, 4)
        )
        # float32 products of another batch size may round otherwise; episodes of the eager executor carry that on.
        for each, other in ((one, two), (two, four)):
            for a, b in zip(each, other, strict=True):
                np.testing.assert_allclose(a.episode.rewards, b.episode.rewards, atol=1e-3)
        again = [replace(each, report=None) for each in play_virtual(made, SEEDS, latency, parallel=2)]
        assert again == two
    assert {latency(seed, number) for seed in SEEDS for number in range(20)} == {10.0, 90.0, 170.0, 350.0}


def test_inpainting_executes_what_was_committed_and_goes_on_from_it(policy: DiffusionPolicy) -> None:
    source = ChunkSource([policy])
    seen = {key: np.full((2, 2, size), 200.0, np.float32) for key, size in (("keypoints", 3), ("agent_position", 2))}
    free = source.chunks(seen, [(0, 0), (1, 0)], [None, None])
    assert free.shape == (2, 5, 2)
    given = np.array([[10.0, 500.0], [20.0, 400.0]], np.float32)
    mixed = source.chunks(seen, [(0, 0), (1, 0)], [given, None])
    np.testing.assert_allclose(mixed[0, :2], given, atol=1e-3)  # through the normaliser and back
    assert np.abs(mixed[0, 2:] - free[0, 2:]).max() > 0
    np.testing.assert_allclose(mixed[1], free[1], atol=1e-3)
    assert np.array_equal(
        source.chunks(seen, [(0, 0), (1, 0)], [None, None])[:, :4], policy.predict(seen, [(0, 0), (1, 0)])
    )


def test_levels_are_policies(policy: DiffusionPolicy) -> None:
    mask = np.zeros((len(policy.trunk.blocks), policy.sampler.steps), dtype=bool)
    mask[:, ::5] = True
    cheap = bac.accelerate(policy, CacheSchedule(mask, policy.trunk.blocks, policy.provenance, "sparse"), "eager")
    source = ChunkSource([policy, cheap])
    seen = {key: np.full((1, 2, size), 200.0, np.float32) for key, size in (("keypoints", 3), ("agent_position", 2))}
    best, cheaper = (source.chunks(seen, [(0, 0)], [None], level) for level in (0, 1))
    assert np.array_equal(best[:, :4], policy.predict(seen, [(0, 0)]))
    assert np.array_equal(cheaper[:, :4], cheap.predict(seen, [(0, 0)]))
    assert not np.array_equal(best, cheaper)


def test_wall_clock_plays_on_while_the_policy_takes_two_periods_and_a_half(policy: DiffusionPolicy) -> None:
    period_s, ticks = 0.2, 12
    asked: list[int] = []
    threads: list[threading.Thread] = []

    class Slow(ChunkSource):
        def predictor(self, seed: int | None = None) -> Predict:
            predict = super().predictor(seed)

            def slow(request: Request) -> np.ndarray:
                asked.append(request.tick)
                threads.append(threading.current_thread())
                time.sleep(2.5 * period_s)
                return predict(request)

            return slow

    made = world(policy, max_steps=ticks, rate_hz=1 / period_s, deadline_ticks=1)
    began = time.monotonic()
    (played,) = play_wallclock(replace(made, source=Slow([policy])), SEEDS[:1], clock=MonotonicClock())
    elapsed_s = time.monotonic() - began
    counters = played.report.counters
    assert counters.executed > 0
    assert counters.waited > 0
    assert played.episode.steps == counters.executed + counters.held
    assert counters.ticks + counters.skipped == ticks
    # None is there a tick after it was asked for; of the last tick's own request nobody knows yet.
    assert len(asked) == counters.requests > 1
    assert counters.deadline_misses == sum(tick + 1 < ticks for tick in asked)
    assert elapsed_s >= (ticks - 1) * period_s
    assert not any(thread.is_alive() for thread in threads)


def test_a_policy_that_never_answers_ends_the_run_with_a_sentence(policy: DiffusionPolicy) -> None:
    released = threading.Event()

    class Hanging(ChunkSource):
        def predictor(self, seed: int | None = None) -> Predict:
            def hang(_: Request) -> np.ndarray:
                released.wait()
                raise InvalidInput("given up")

            return hang

    made = world(policy, max_steps=2, rate_hz=20.0, deadline_ticks=1)
    with pytest.raises(Unavailable, match=rf"^inference of episode {SEEDS[0]}: expected to finish its last"):
        play_wallclock(replace(made, source=Hanging([policy])), SEEDS[:1], leaving_s=0.05)
    released.set()


class Counting(ChunkSource):
    """Action i of chunk n is (100 n + i, 0)."""

    def chunks(self, observation: object, noise_keys: object, committed: object, level: int = 0) -> np.ndarray:
        numbers = np.array([number for _, number in noise_keys], np.float32)
        first = 100 * numbers[:, None] + np.arange(self.length, dtype=np.float32)
        return np.stack([first, np.zeros_like(first)], axis=-1)


def test_seam_jumps_are_of_two_chunks_and_steps_within_of_one(policy: DiffusionPolicy) -> None:
    made = replace(world(policy, deadline_ticks=1), source=Counting([policy]), max_ticks=11)
    (played,) = play_virtual(made, SEEDS[:1], lambda seed, number: 80.0)
    # Executed from tick 1 on: 0 1 2 3 | 101 102 103 104 | 201 202.
    assert played.seam_jumps == (98.0, 97.0)
    assert played.steps_within == (1.0,) * 7


def test_actions_outside_the_limits_move_nothing(policy: DiffusionPolicy) -> None:
    limits = ActionLimits(np.array([0.0, -1.0]), np.array([150.0, 1.0]))
    made = replace(world(policy, deadline_ticks=1), source=Counting([policy]), max_ticks=11, limits=limits)
    (played,) = play_virtual(made, SEEDS[:1], lambda seed, number: 80.0)
    counters = played.report.counters
    # Chunks 0 and 1, ticks 1 to 8; then every other is refused, and the robot holds.
    assert (counters.waited, counters.executed, counters.held, counters.accepted) == (1, 8, 2, 2)
    assert counters.refused > 0
    (told,) = summary([played])["last_refusal"].values()
    assert told.startswith("chunk: expected actions within [0.0, -1.0] and [150.0, 1.0], got action 0 [")


def test_latencies_of_inpainting_are_of_chunks_around_the_actions_that_are_committed(
    policy: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    chunks = ChunkSource.chunks

    def noted(source: ChunkSource, observation: object, keys: object, committed: list, level: int = 0) -> np.ndarray:
        called.extend(0 if actions is None else len(actions) for actions in committed)
        return chunks(source, observation, keys, committed, level)

    monkeypatch.setattr(ChunkSource, "chunks", noted)
    # Warmed for each number there can be, then timed: five calls more, untimed, and a hundred.
    assert [len(taken) for taken in measured_in_turn([(policy, 3), (policy, 0)], 100)] == [100, 100]
    # Both are called in turn, so that they meet the same minutes.
    assert called == [0, 1, 2, 0, *[3, 0] * 105]


def test_no_fewer_actions_are_committed_while_timing_than_by_the_loop_that_results(
    policy: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[list[int]] = []

    def measured(asked: list[tuple[DiffusionPolicy, int]], calls: int) -> list[list[float]]:
        timed.append([committed for _, committed in asked])
        return [[150.0 if committed < 2 else 250.0] * calls for _, committed in asked]

    monkeypatch.setattr("studies.realtime_play.measured_in_turn", measured)

    def settings_of(seam: Seam, deadline_ticks: int | None, p99_ms: float) -> LoopSettings:
        deadline = ticks_for(p99_ms, 10.0) if deadline_ticks is None else deadline_ticks
        return LoopSettings(10.0, 4, deadline, seam)

    for seam, deadline_ticks, expected in [
        (Seam.REPLACE, None, [0]),
        (Seam.BLEND, 2, [0]),
        (Seam.INPAINT, None, [0, 2, 3]),
        (Seam.INPAINT, 1, [1]),
        (Seam.INPAINT, 1000, [5]),  # a chunk of this policy has no more actions
    ]:
        timed.clear()
        told = measured_for({"one": (policy, partial(settings_of, seam, deadline_ticks))}, 100)
        assert timed == [[each] for each in expected]
        assert told == {"one": [250.0 if expected[-1] >= 2 else 150.0] * 100}
    timed.clear()
    both = {seam: (policy, partial(settings_of, seam, None)) for seam in (Seam.INPAINT, Seam.REPLACE)}
    assert {name: trace[0] for name, trace in measured_for(both, 100).items()} == {"inpaint": 250.0, "replace": 150.0}
    assert timed == [[0, 0], [2, 0], [3, 0]]


def test_summary_adds_up(policy: DiffusionPolicy) -> None:
    played = play(policy, 80.0, deadline_ticks=1)
    told = summary(played)
    assert told["counters"]["executed"] == 4 * 29
    ages = [each.report.action_age_ms for each in played]
    assert told["action_age_ms"] == {
        "count": 4 * 29,
        "mean": pytest.approx(np.mean([each["mean"] for each in ages])),
        "max": max(each["max"] for each in ages),
        "worst_episode_p99": max(each["p99"] for each in ages),
    }
    assert told["seam_jump"]["count"] == 4 * 7
    assert told["stopped"] == {}


@pytest.mark.parametrize("latency", [-1, float("inf"), "often", None, True])
def test_a_latency_that_is_none_refuses(latency: object) -> None:
    with pytest.raises(InvalidInput, match=r"^latency: expected measured, milliseconds, or the results.json of"):
        given_trace(latency, "cached")


@pytest.mark.parametrize(
    "text", ['{"control": []}', '{"control": {"cached": 3}}', '{"control": {"cached": {"trace_ms": ["a"]}}}']
)
def test_a_file_without_latencies_refuses(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"^latency: expected measured, milliseconds, or the results.json of"):
        given_trace(str(tmp_path / "results.json"), "cached")
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(CorruptArtefact, match=r"results\.json: expected a JSON document of results"):
        given_trace(str(tmp_path / "results.json"), "cached")


def test_latencies_of_an_image_policy_are_measured_without_demonstrations() -> None:
    (taken,) = measured_in_turn([(DiffusionPolicy(small_image_checkpoint()), 0)], 100)
    assert len(taken) == 100
    assert min(taken) > 0
