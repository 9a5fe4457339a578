"""Actions of robomimic's arms: deltas, poses for the controller and poses for a policy, all ways with their inverses.

::

    delta 7         <-- absolute_from_delta / delta_from_absolute, at a hand pose -->  controller 7
    controller 7    <-- policy_from_controller / controller_from_policy ----------->   policy 10

    delta       position change / 0.05 m, rotation vector / 0.5 rad, both in [-1, 1], gripper in [-1, 1] (1 closes)
    controller  position of the hand, m; its rotation vector, rad; gripper       (robomimic's ``actions_abs``)
    policy      position of the hand, m; its rotation as six numbers; gripper    (what diffusion_policy learns)

Several arms stand side by side in the last axis. A hand's pose is that of its grip site in the world, as the controller
sees it; the observation ``robot0_eef_quat`` is of another frame.
"""

from __future__ import annotations

import numpy as np

from envs.rotations import matrix_from_six, matrix_from_vector, six_from_matrix, vector_from_matrix

DELTA_SIZE = 7
"""Channels of an arm's delta action, and of its pose for the controller."""

POLICY_SIZE = 10
"""Channels of an arm's absolute action as a policy gives it."""

LARGEST_STEP_M, LARGEST_TURN_RAD = 0.05, 0.5
"""What a delta of 1 means, per axis: the output limits of the controller in every published robomimic data set."""


def policy_from_controller(actions: np.ndarray) -> np.ndarray:
    """Return float64[..., arms * 10] for controller poses float[..., arms * 7]."""
    arms = _by_arm(actions, DELTA_SIZE)
    six = six_from_matrix(matrix_from_vector(arms[..., 3:6]))
    return _side_by_side(np.concatenate([arms[..., :3], six, arms[..., 6:]], axis=-1))


def controller_from_policy(actions: np.ndarray) -> np.ndarray:
    """Return float64[..., arms * 7] for policy poses float[..., arms * 10]; undoes ``policy_from_controller``."""
    arms = _by_arm(actions, POLICY_SIZE)
    vectors = vector_from_matrix(matrix_from_six(arms[..., 3:9]))
    return _side_by_side(np.concatenate([arms[..., :3], vectors, arms[..., 9:]], axis=-1))


def absolute_from_delta(deltas: np.ndarray, positions: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Return the controller poses that deltas mean for hands at given poses.

    Args:
        deltas: float[..., arms * 7]; beyond [-1, 1] they are clipped, as the controller does.
        positions: float[..., arms, 3], m.
        rotations: float[..., arms, 3, 3].

    Returns:
        float64[..., arms * 7].
    """
    arms = _by_arm(deltas, DELTA_SIZE)
    moved = positions + np.clip(arms[..., :3], -1, 1) * LARGEST_STEP_M
    turned = matrix_from_vector(np.clip(arms[..., 3:6], -1, 1) * LARGEST_TURN_RAD) @ rotations
    return _side_by_side(np.concatenate([moved, vector_from_matrix(turned), arms[..., 6:]], axis=-1))


def delta_from_absolute(absolute: np.ndarray, positions: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Return the deltas, float64[..., arms * 7], that take hands to controller poses; undoes ``absolute_from_delta``.

    A pose out of one step's reach gives deltas beyond [-1, 1].
    """
    arms = _by_arm(absolute, DELTA_SIZE)
    step = (arms[..., :3] - positions) / LARGEST_STEP_M
    turn = vector_from_matrix(matrix_from_vector(arms[..., 3:6]) @ np.swapaxes(rotations, -1, -2)) / LARGEST_TURN_RAD
    return _side_by_side(np.concatenate([step, turn, arms[..., 6:]], axis=-1))


def absolute_episode(deltas: np.ndarray, positions: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Return the controller poses, float64[T, arms * 7], that a whole episode of deltas went through.

    As ``absolute_from_delta`` with T in front, and with the controller's memory: where a delta turns nothing, the
    rotation goal stays what it was, at first the hand's own.
    """
    absolute = _by_arm(absolute_from_delta(deltas, positions, rotations), DELTA_SIZE)
    still = (_by_arm(deltas, DELTA_SIZE)[..., 3:6] == 0).all(axis=-1)
    for step, arm in zip(*np.nonzero(still), strict=True):
        if step:
            absolute[step, arm, 3:6] = absolute[step - 1, arm, 3:6]
    return _side_by_side(absolute)


def _by_arm(actions: np.ndarray, size: int) -> np.ndarray:
    """Return float64[..., arms, size]."""
    actions = np.asarray(actions, dtype=np.float64)
    return actions.reshape(*actions.shape[:-1], -1, size)


def _side_by_side(arms: np.ndarray) -> np.ndarray:
    return arms.reshape(*arms.shape[:-2], -1)
