import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

from envs.errors import EnvError
from envs.push_t import PushTEnv
from envs.rollout import rollout
from envs.stage import Episode


class Counter(gymnasium.Env[dict[str, Any], np.ndarray]):
    """Adds up its actions; seed s is done after s steps, seeds over 5 by success; frames show seed and step."""

    made = 0
    closed = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.observation_space = Dict({"sum": Box(-np.inf, np.inf, (1,)), "seed": Box(0, np.inf, (2,))})
        self.action_space = Box(-np.inf, np.inf, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        assert seed is not None
        self.seed, self.step_number, self.sum = seed, 0, np.zeros(1, np.float32)
        return self.observe(), {}

    def observe(self) -> dict[str, Any]:
        return {"sum": self.sum.copy(), "seed": np.full(2, self.seed, np.float32)}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        assert self.step_number < self.seed, "stepped after its end"
        self.step_number += 1
        self.sum += action
        over = self.step_number == self.seed
        return self.observe(), float(self.sum[0]), over and self.seed > 5, over, {}

    def render(self) -> Any:
        return np.full((1, 1, 3), 10 * self.seed + self.step_number, np.uint8)

    def close(self) -> None:
        type(self).closed += 1


class Scripted:
    """Acts 1 in the first two steps of a chunk, -1 in the third, and writes down what it was asked."""

    observation_steps = 2

    def __init__(self) -> None:
        self.keys: list[list[tuple[int, int]]] = []
        self.sums: list[list[list[float]]] = []

    def predict(self, observation: Mapping[str, np.ndarray], noise_keys: Sequence[tuple[int, int]]) -> np.ndarray:
        batch = len(noise_keys)
        assert {key: values.shape for key, values in observation.items()} == {
            "sum": (batch, 2, 1),
            "seed": (batch, 2, 2),
        }
        assert all(values.dtype == np.float32 for values in observation.values())
        assert observation["seed"][:, 0, 0].tolist() == [seed for seed, _ in noise_keys]
        self.keys.append(list(noise_keys))
        self.sums.append(observation["sum"][..., 0].tolist())
        return np.tile(np.array([[1], [1], [-1]], np.float32), (batch, 1, 1))


class Noisy:
    """Pushes a Push-T block about, by noise that depends on the key and a gain that depends on what it sees."""

    observation_steps = 2

    def predict(self, observation: Mapping[str, np.ndarray], noise_keys: Sequence[tuple[int, int]]) -> np.ndarray:
        noise = np.stack([np.random.default_rng(key).normal(0, 40, (8, 2)) for key in noise_keys])
        block = observation["keypoints"].reshape(len(noise_keys), 2, 9, 2).mean(axis=(1, 2))
        return (block[:, None] + noise).astype(np.float32)


class Fixed:
    observation_steps = 1

    def __init__(self, actions: Any) -> None:
        self.actions = np.asarray(actions, np.float32)

    def predict(self, observation: Mapping[str, np.ndarray], noise_keys: Sequence[tuple[int, int]]) -> np.ndarray:
        return self.actions


def test_episodes_come_in_the_order_of_the_seeds_with_their_rewards() -> None:
    episodes = rollout(Counter, Scripted(), [7, 2, 4], parallel=2)
    assert episodes == [
        Episode(7, 3.0, True, (1, 2, 1, 2, 3, 2, 3)),
        Episode(2, 2.0, False, (1, 2)),
        Episode(4, 2.0, False, (1, 2, 1, 2)),
    ]
    assert [episode.steps for episode in episodes] == [7, 2, 4]


def test_free_slots_take_the_next_seed_and_one_prediction_serves_all() -> None:
    predictor, ended = Scripted(), []
    rollout(Counter, predictor, [7, 2, 4, 5, 1], parallel=2, on_episode=lambda episode: ended.append(episode.seed))
    assert predictor.keys == [
        [(7, 0), (2, 0)],
        [(7, 1), (4, 0)],
        [(7, 2), (4, 1)],
        [(5, 0), (1, 0)],
        [(5, 1)],
    ]
    assert ended == [2, 7, 4, 1, 5]


def test_history_starts_with_the_first_observation_repeated_and_slides() -> None:
    predictor = Scripted()
    rollout(Counter, predictor, [7])
    assert predictor.sums == [[[0, 0]], [[2, 1]], [[3, 2]]]


class Sparing(Counter):
    """Shows its sum only where it is looked at, and counts both kinds of steps."""

    drawn = undrawn = 0

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        type(self).drawn += 1
        return super().step(action)

    def step_undrawn(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        type(self).undrawn += 1
        seen, *rest = super().step(action)
        return {"seed": seen["seed"]}, *rest  # type: ignore[return-value]


def test_only_the_observations_of_a_history_are_drawn() -> None:
    plain, sparing = Scripted(), Scripted()
    episodes = rollout(Sparing, sparing, [6, 7], parallel=2)
    assert episodes == rollout(Counter, plain, [6, 7], parallel=2)
    assert sparing.sums == plain.sums
    # Chunks of 3, of which a history of 2 shows the last two: of 7 steps the 1st, 4th and 7th are not drawn.
    assert (Sparing.undrawn, Sparing.drawn) == (2 + 3, 4 + 4)


def test_history_of_an_episode_does_not_leak_into_the_next() -> None:
    predictor = Scripted()
    rollout(Counter, predictor, [3, 3], parallel=1)
    assert predictor.sums == [[[0, 0]], [[0, 0]]]


def test_environments_are_made_once_and_closed() -> None:
    Counter.made = Counter.closed = 0
    rollout(Counter, Scripted(), [1, 2, 3, 4, 5], parallel=2)
    assert (Counter.made, Counter.closed) == (2, 2)
    assert rollout(Counter, Scripted(), []) == []
    assert Counter.made == 2


def test_environments_are_closed_when_the_predictor_fails() -> None:
    Counter.made = Counter.closed = 0
    with pytest.raises(EnvError):
        rollout(Counter, Fixed([[[np.nan]]]), [4])
    assert (Counter.made, Counter.closed) == (1, 1)


def test_frames_are_kept_where_asked() -> None:
    episodes = rollout(Counter, Scripted(), [2, 4, 3], parallel=2, record={4, 3})
    shown = [[int(frame[0, 0, 0]) for frame in episode.frames] for episode in episodes]
    assert shown == [[], [40, 41, 42, 43, 44], [30, 31, 32, 33]]


def test_push_t_results_do_not_depend_on_the_batch() -> None:
    seeds = [100000, 100001, 100002, 100003, 100004]
    together, pairs, alone = (
        rollout(lambda: PushTEnv(max_steps=30), Noisy(), seeds, parallel=parallel) for parallel in (5, 2, 1)
    )
    assert together == pairs == alone
    assert any(len(set(episode.rewards)) > 1 for episode in together)
    assert [episode.steps for episode in together] == [30] * 5


def test_push_t_results_do_not_depend_on_the_processes() -> None:
    seeds = [100000, 100001, 100002, 100003, 100004]
    here, elsewhere = (
        rollout(partial(PushTEnv, max_steps=30), Noisy(), seeds, parallel=3, processes=processes, record={100001})
        for processes in (1, 2)
    )
    assert here == elsewhere
    assert [np.array_equal(ours.frames, theirs.frames) for ours, theirs in zip(here, elsewhere, strict=True)] == [
        True
    ] * 5
    assert [len(episode.frames) for episode in elsewhere] == [0, 31, 0, 0, 0]


def test_slots_are_dealt_out_and_refilled_in_several_processes_as_in_one() -> None:
    predictors = Scripted(), Scripted()
    one, three = (
        rollout(Counter, predictor, [7, 2, 4, 5, 1, 3, 6], parallel=4, processes=processes)
        for predictor, processes in zip(predictors, (1, 3), strict=True)
    )
    assert one == three
    assert predictors[0].keys == predictors[1].keys


class Deadly(Counter):
    """Takes its process with it at the second step."""

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        if self.step_number == 1:
            os._exit(3)
        return super().step(action)


def test_a_process_that_ends_refuses() -> None:
    told = r"^rollout: expected its environment processes to live, got one that ended \([^{}]+\); play with processes=1"
    with pytest.raises(EnvError, match=told):
        rollout(Deadly, Scripted(), [4, 5], processes=2)


class Unbuildable(Counter):
    def __init__(self) -> None:
        raise EnvError("there is no table")


def test_what_another_process_cannot_build_refuses_as_it_is() -> None:
    with pytest.raises(EnvError, match=r"^there is no table$"):
        rollout(Unbuildable, Scripted(), [4, 5], processes=2)


class Broken(Counter):
    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        raise EnvError("the table is upside down")


def test_a_refusal_in_another_process_arrives_as_it_is() -> None:
    with pytest.raises(EnvError, match=r"^the table is upside down$"):
        rollout(Broken, Scripted(), [4, 5], processes=2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_actions_that_are_not_finite_refuse_and_name_the_seed(bad: float) -> None:
    with pytest.raises(
        EnvError, match=r"^rollout: expected finite actions, got NaN or infinity for seeds \[2\]; .*\.$"
    ):
        rollout(Counter, Fixed([[[0], [0]], [[0], [bad]]]), [1, 2])


@pytest.mark.parametrize("shape", [(2, 1), (1, 3, 1), (2, 0, 1), (2, 3, 2), (2, 3, 1, 1)])
def test_misshapen_actions_refuse(shape: tuple[int, ...]) -> None:
    with pytest.raises(EnvError, match=r"^rollout: expected actions \[2, at least 1, \(1,\)\], got"):
        rollout(Counter, Fixed(np.zeros(shape)), [1, 2])


def test_recording_without_rgb_frames_refuses() -> None:
    class Blind(Counter):
        def render(self) -> Any:
            return None

    with pytest.raises(EnvError, match=r"^rollout, episode 3: expected render\(\) to give an array, got NoneType"):
        rollout(Blind, Scripted(), [3], record=[3])


def test_nothing_in_parallel_refuses() -> None:
    with pytest.raises(EnvError, match=r"^rollout: expected parallel, processes and .* of at least 1, got 0, 1 and 2"):
        rollout(Counter, Scripted(), [1], parallel=0)
    with pytest.raises(EnvError, match=r"got 50, 0 and 2"):
        rollout(Counter, Scripted(), [1], processes=0)
