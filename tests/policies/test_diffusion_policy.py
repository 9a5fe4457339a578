import threading

import numpy as np
import pytest
import torch

import bac
from bac.errors import InvalidInput
from bac.schedule import CacheSchedule
from policies.base import PolicySpec
from policies.diffusion_policy import DiffusionPolicy
from tests.policies.networks import observation, small_checkpoint, small_policy

KEYS = [(7, 0), (8, 3), (9, 1)]


def _cached(policy: DiffusionPolicy, seed: int = 0) -> DiffusionPolicy:
    mask = np.random.default_rng(seed).random((len(policy.trunk.blocks), policy.sampler.steps)) < 0.3
    mask[:, 0] = True
    return bac.accelerate(policy, CacheSchedule(mask, policy.trunk.blocks, policy.provenance, "random"))


def test_chunk_has_the_executed_actions_in_task_units() -> None:
    policy = small_policy()
    chunk = policy.predict(observation(3), KEYS)
    assert chunk.shape == (3, 4, 2)
    assert chunk.dtype == np.float32
    # The last step's clean chunk is clipped to [-1, 1], the demonstrations' limits.
    data = policy.checkpoint.action_normalizer.unnormalize(torch.tensor([[-1.0, -1.0], [1.0, 1.0]])).numpy()
    assert (chunk >= data[0] - 1e-2).all()
    assert (chunk <= data[1] + 1e-2).all()


def test_executed_actions_start_at_the_newest_observation() -> None:
    policy = small_policy()
    assert policy.spec.executed == slice(1, 5)
    whole = policy.denoiser(policy.observe(observation(3)), policy.draw_noise(3, KEYS))
    executed = policy.checkpoint.action_normalizer.unnormalize(whole[:, 1:5]).numpy()
    np.testing.assert_array_equal(policy.predict(observation(3), KEYS), executed)


def test_observation_without_batch_gives_a_chunk_without_batch() -> None:
    policy = small_policy()
    batched = observation(1)
    single = {key: values[0] for key, values in batched.items()}
    np.testing.assert_array_equal(policy.predict(single, KEYS[:1]), policy.predict(batched, KEYS[:1])[0])


def test_keys_decide_the_noise_whatever_the_batch() -> None:
    policy = small_policy()
    together, alone = policy.draw_noise(3, KEYS), policy.draw_noise(1, KEYS[1:2])
    assert torch.equal(together.initial[1], alone.initial[0])
    assert torch.equal(together.steps[:, 1], alone.steps[:, 0])
    assert not torch.equal(together.initial[0], together.initial[1])


def test_noise_is_unit_normal_and_fresh_without_keys() -> None:
    policy = small_policy()
    noise = policy.draw_noise(500)
    everything = torch.cat([noise.initial.flatten(), noise.steps.flatten()])
    # 66,000 draws: mean and deviation are known to 0.004 and 0.003 (one sigma).
    assert abs(everything.mean()) < 0.02
    assert abs(everything.std() - 1) < 0.02
    assert not torch.equal(noise.initial, policy.draw_noise(500).initial)


def test_calls_do_not_leak_into_each_other() -> None:
    policy = _cached(small_policy())
    first, second = observation(3, seed=1), observation(3, seed=2)
    alone = [policy.predict(each, KEYS) for each in (first, second)]
    swapped = [policy.predict(each, KEYS) for each in (second, first)]
    np.testing.assert_array_equal(alone[0], swapped[1])
    np.testing.assert_array_equal(alone[1], swapped[0])


def test_threads_do_not_disturb_each_other() -> None:
    policy = _cached(small_policy())
    observations = [observation(3, seed=seed) for seed in range(4)]
    expected = [policy.predict(each, KEYS) for each in observations]
    results: list[np.ndarray | None] = [None] * 4

    def work(number: int) -> None:
        for _ in range(3):
            results[number] = policy.predict(observations[number], KEYS)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def _without(key: str) -> dict[str, np.ndarray]:
    return {name: values for name, values in observation(2).items() if name != key}


def _changed(**change: np.ndarray) -> dict[str, np.ndarray]:
    return observation(2) | change


NAN = np.full((2, 2, 2), np.nan, np.float32)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (_without("keypoints"), r"observation keys: expected \['agent_position', 'keypoints'\]"),
        (_changed(extra=NAN), "extra"),
        (_changed(agent_position=np.zeros((2, 3, 2), np.float32)), r"float32\[2, 3, 2\]"),
        (_changed(agent_position=np.zeros((2, 2, 3), np.float32)), r"float32\[2, 2, 3\]"),
        (_changed(agent_position=np.zeros((2, 2), np.float32)), "one batch size"),
        (_changed(agent_position=np.zeros((2, 2, 2), np.int64)), r"int64\[2, 2, 2\]"),
        (_changed(agent_position=np.full((2, 2, 2), "x")), "got <U1"),
        (_changed(agent_position=NAN), "with NaN or infinite"),
    ],
)
def test_bad_observation_refuses_in_one_sentence(bad: dict[str, np.ndarray], told: str) -> None:
    with pytest.raises(InvalidInput, match=told) as caught:
        small_policy().predict(bad, KEYS[:2])
    assert "\n" not in str(caught.value)


def test_wrong_number_of_noise_keys_refuses() -> None:
    with pytest.raises(InvalidInput, match="noise keys: expected 2"):
        small_policy().predict(observation(2), KEYS)


def test_specification_must_fit_itself() -> None:
    spec = small_checkpoint().spec
    with pytest.raises(InvalidInput, match="observation keys: expected 5 channels"):
        PolicySpec(spec.task, {"keypoints": 4}, spec.action_steps, spec.network, spec.process)
    with pytest.raises(InvalidInput, match="action_steps: expected 1 to 5"):
        PolicySpec(spec.task, spec.observation, 6, spec.network, spec.process)
