"""Episodes with latency: exactly a rollout without it, reproducible with it, and the loop's rules in a world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from studies.realtime import point_key, trace_key
from studies.realtime_episodes import RealtimeEpisode, World, play_virtual, play_wallclock
from studies.realtime_play import MEASURED, drawn_from, latency_trace, measured_ms, summary

import bac
from bac.control import LoopSettings, Seam, repeat
from bac.errors import CorruptArtefact, InvalidInput
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


@pytest.mark.parametrize(
    ("override", "points", "traces"),
    [
        ("task.seed=5", True, False),
        ("task.max_steps=9", True, False),
        ("realtime.episodes=3", True, False),
        ("threads=2", False, True),
        ("device=cuda", False, True),
        ("realtime.calls=300", False, True),
    ],
)
def test_what_is_kept_answers_no_other_question(override: str, points: bool, traces: bool) -> None:
    usual, other = study(), study(override)

    def differs(name: Callable[[BenchConfig], str]) -> bool:
        return name(usual) != name(other)

    assert differs(lambda config: point_key(config, "d", Seam.BLEND, 200.0)) is points
    assert differs(lambda config: trace_key(config, "d")) is traces
    # A measured point hangs on its latencies as well.
    assert differs(lambda config: point_key(config, "d", Seam.BLEND, MEASURED))


def test_what_is_kept_of_a_schedule_is_of_that_seam_and_latency_alone() -> None:
    asked = [(digest, seam, at) for digest in ("d", "e") for seam in Seam for at in (0.0, 200.0, MEASURED)]
    names = {point_key(study(), *each) for each in asked} | {trace_key(study(), digest) for digest in ("d", "e")}
    assert len(names) == len(asked) + 2


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


def test_wall_clock_counts_every_tick(policy: DiffusionPolicy) -> None:
    # At 1 kHz an environment's step may well be overslept: skipped ticks are counted, and nothing is done twice.
    made = world(policy, max_steps=12, rate_hz=1000.0, deadline_ticks=5)
    (played,) = play_wallclock(replace(made, max_ticks=40), SEEDS[:1])
    counters = played.report.counters
    assert counters.ticks == counters.executed + counters.held + counters.waited
    assert played.episode.steps == counters.executed + counters.held


def test_summary_adds_up(policy: DiffusionPolicy) -> None:
    played = play(policy, 80.0, deadline_ticks=1)
    told = summary(played)
    assert told["counters"]["executed"] == 4 * 29
    assert told["action_age_ms"]["count"] == 4 * 29
    assert told["seam_jump"]["count"] == 4 * 7
    assert told["stopped"] == {}


@pytest.mark.parametrize("latency", [-1, float("inf"), "often", None, True])
def test_a_latency_that_is_none_refuses(policy: DiffusionPolicy, latency: object) -> None:
    with pytest.raises(InvalidInput, match=r"^latency: expected measured, milliseconds, or the results.json of"):
        latency_trace(latency, "cached", policy, 100)


@pytest.mark.parametrize(
    "text", ['{"control": []}', '{"control": {"cached": 3}}', '{"control": {"cached": {"trace_ms": ["a"]}}}']
)
def test_a_file_without_latencies_refuses(policy: DiffusionPolicy, text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"^latency: expected measured, milliseconds, or the results.json of"):
        latency_trace(str(tmp_path / "results.json"), "cached", policy, 100)
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(CorruptArtefact, match=r"results\.json: expected a JSON document of results"):
        latency_trace(str(tmp_path / "results.json"), "cached", policy, 100)


def test_latencies_of_an_image_policy_are_measured_without_demonstrations() -> None:
    taken = measured_ms(DiffusionPolicy(small_image_checkpoint()), 100)
    assert len(taken) == 100
    assert min(taken) > 0
