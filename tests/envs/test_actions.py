"""Conversions of actions: each pair is one another's inverse, also at the half turn that a hand pointing down is."""

import numpy as np
import pytest

from envs.actions import (
    absolute_episode,
    absolute_from_delta,
    controller_from_policy,
    delta_from_absolute,
    policy_from_controller,
)
from envs.rotations import matrix_from_six, matrix_from_vector, six_from_matrix, vector_from_matrix

TOLERANCE = 1e-6
QUARTER_ABOUT_Z = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])


def vectors(count: int = 200) -> np.ndarray:
    """Return float64[count + 4, 3]: rotations of every angle up to pi, and the ones where formulas break."""
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(count, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    spread = axes * rng.uniform(0, np.pi, (count, 1))
    edges = [[0, 0, 0], [1e-9, 0, 0], [np.pi - 1e-7, 0, 0], [0, np.pi / np.sqrt(2), np.pi / np.sqrt(2)]]
    return np.concatenate([spread, edges])


def test_known_rotations() -> None:
    np.testing.assert_allclose(matrix_from_vector(np.array([0, 0, np.pi / 2])), QUARTER_ABOUT_Z, atol=1e-15)
    np.testing.assert_allclose(vector_from_matrix(QUARTER_ABOUT_Z), [0, 0, np.pi / 2], atol=1e-15)
    # The rows, not the columns: that is what the weights of the published policies mean.
    np.testing.assert_allclose(six_from_matrix(QUARTER_ABOUT_Z), [0, -1, 0, 1, 0, 0])
    np.testing.assert_allclose(matrix_from_six(np.array([0, -2.0, 0, 3, 5, 0])), QUARTER_ABOUT_Z, atol=1e-15)


def test_rotation_round_trips() -> None:
    matrices = matrix_from_vector(vectors())
    np.testing.assert_allclose(
        matrices @ np.swapaxes(matrices, -1, -2), np.broadcast_to(np.eye(3), matrices.shape), atol=1e-12
    )
    np.testing.assert_allclose(matrix_from_vector(vector_from_matrix(matrices)), matrices, atol=1e-9)
    np.testing.assert_allclose(matrix_from_six(six_from_matrix(matrices)), matrices, atol=1e-12)
    np.testing.assert_allclose(vector_from_matrix(matrices)[:-1], vectors()[:-1], atol=TOLERANCE)


@pytest.mark.parametrize("arms", [1, 2])
def test_policy_and_controller_actions_are_inverse(arms: int) -> None:
    rng = np.random.default_rng(1)
    turns = vectors(count=196).reshape(100, 2, 3)[:, :arms]
    controller = np.concatenate([rng.normal(size=(100, arms, 3)), turns, rng.choice([-1, 1], (100, arms, 1))], axis=-1)
    controller = controller.reshape(10, 10, arms * 7)
    policy = policy_from_controller(controller)
    assert policy.shape == (10, 10, arms * 10)
    again = controller_from_policy(policy.astype(np.float32))
    expected, got = controller.reshape(-1, arms, 7), again.reshape(-1, arms, 7)
    # As float32, as policies give them; compared as rotations, for a half turn has two vectors.
    np.testing.assert_allclose(got[..., [0, 1, 2, 6]], expected[..., [0, 1, 2, 6]], atol=TOLERANCE)
    np.testing.assert_allclose(
        matrix_from_vector(got[..., 3:6]), matrix_from_vector(expected[..., 3:6]), atol=TOLERANCE
    )


@pytest.mark.parametrize("arms", [1, 2])
def test_delta_and_absolute_actions_are_inverse(arms: int) -> None:
    rng = np.random.default_rng(2)
    delta = rng.uniform(-1, 1, (50, arms * 7))
    positions, rotations = rng.normal(size=(50, arms, 3)), matrix_from_vector(rng.normal(size=(50, arms, 3)))
    absolute = absolute_from_delta(delta, positions, rotations)
    np.testing.assert_allclose(delta_from_absolute(absolute, positions, rotations), delta, atol=TOLERANCE)


@pytest.mark.parametrize("arms", [1, 2])
def test_delta_comes_back_from_a_policys_action(arms: int) -> None:
    rng = np.random.default_rng(3)
    delta = rng.uniform(-1, 1, (200, arms * 7))
    positions, rotations = rng.normal(size=(200, arms, 3)), matrix_from_vector(rng.normal(size=(200, arms, 3)))
    policy = policy_from_controller(absolute_from_delta(delta, positions, rotations))
    assert (policy.shape, policy.dtype) == ((200, arms * 10), np.float64)
    again = delta_from_absolute(controller_from_policy(policy), positions, rotations)
    np.testing.assert_allclose(again, delta, atol=TOLERANCE)


def test_delta_means_five_centimetres_and_half_a_radian_in_the_world() -> None:
    absolute = absolute_from_delta(np.array([1, 0, -3, 0, 0, 1, -1.0]), np.ones((1, 3)), QUARTER_ABOUT_Z[None])
    np.testing.assert_allclose(absolute, [1.05, 1, 0.95, 0, 0, np.pi / 2 + 0.5, -1], atol=1e-12)


def test_rotation_goal_stays_where_a_delta_turns_nothing() -> None:
    delta = np.zeros((4, 7))
    delta[1, 5] = 1
    # The hand has not got there yet, and sags by a little: the goal is what counts.
    hands = matrix_from_vector(np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0.3], [0, 0, 0.4]]))[:, None]
    turned = absolute_episode(delta, np.zeros((4, 1, 3)), hands)[:, 5]
    np.testing.assert_allclose(turned, [0, 0.5, 0.5, 0.5], atol=1e-12)
