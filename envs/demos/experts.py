"""Scripted experts for Lift, Can and Square: they see the simulation, and act as a person at the controls would.

A script is a generator that yields where the hand shall go in the next control step, and looks at the world between two
yields. It reads as the task is told: above the cube, down, close, up. A script that lost what it held ends, and every
script that ends begins again, so it recovers from what noise, a disturbance or its own grip did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from envs.actions import LARGEST_STEP_M, LARGEST_TURN_RAD
from envs.errors import EnvError
from envs.rotations import matrix_from_vector, vector_from_matrix

OPEN, CLOSE = -1.0, 1.0

# The hand's frame when it points straight down at yaw 0.
_DOWN = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])

# Turning faster than this, of the controller's 0.5 rad, swings what the hand holds.
_TURN_RAD = 0.4 * LARGEST_TURN_RAD

_ANY_TURN = np.inf


@dataclass(frozen=True)
class Move:
    """What a script wants in one control step.

    Attributes:
        position: float[3], where the hand shall go, m.
        yaw: of the hand, which points down, rad.
        gripper: ``OPEN`` or ``CLOSE``.
        speed: largest way in this step, m, up to 0.05.
        precise: noise would spoil it.
    """

    position: np.ndarray
    yaw: float
    gripper: float
    speed: float = LARGEST_STEP_M
    precise: bool = False


class Hand:
    """The hand of the only arm, read from the simulation: the controller must not be asked, for asking changes it."""

    def __init__(self, simulation: Any) -> None:
        self._data = simulation.sim.data
        self._site = simulation.robots[0].eef_site_id

    @property
    def position(self) -> np.ndarray:
        """float64[3], m."""
        return np.array(self._data.site_xpos[self._site])

    @property
    def rotation(self) -> np.ndarray:
        """float64[3, 3]."""
        return np.array(self._data.site_xmat[self._site]).reshape(3, 3)

    @property
    def yaw(self) -> float:
        """How far the hand is turned about the vertical, rad in [-pi, pi]."""
        return _yaw(self.rotation @ _DOWN.T)

    def nearest(self, yaw: float, period: float) -> float:
        """Return the yaw that means the same grasp as ``yaw``, every ``period``, and is the shortest turn away."""
        return self.yaw + _wrapped(yaw - self.yaw, period)

    def turn_to(self, yaw: float) -> np.ndarray:
        """Return the rotation vector, rad, from here to pointing down at ``yaw``."""
        return vector_from_matrix(matrix_from_vector(np.array([0, 0, yaw])) @ _DOWN @ self.rotation.T)


_Script = Callable[[Any, Hand, np.random.Generator], Iterator[Move]]


class Expert:
    """A script at work in one simulation."""

    def __init__(self, task: str, simulation: Any, draw: np.random.Generator, noise_m: float = 0.0) -> None:
        """Begin the script of ``task`` from the present state of the simulation.

        Args:
            task: lift, can or square.
            simulation: ``RobomimicEnv.simulation``.
            draw: of waypoints and noise.
            noise_m: standard deviation of the noise on moves that bear it, m.

        Raises:
            EnvError: the task has no script.
        """
        self._hand, self._draw, self._noise_m = Hand(simulation), draw, noise_m
        script = _script(task)
        self._moves = (move for _ in count() for move in script(simulation, self._hand, draw))
        self.move: Move | None = None

    def act(self) -> np.ndarray:
        """Return the next delta action, float64[7] in [-1, 1]."""
        self.move = move = next(self._moves)
        way = move.position - self._hand.position
        if not move.precise:
            way = way + self._draw.normal(0, self._noise_m, 3)
        step = _shortened(way, move.speed) / LARGEST_STEP_M
        turn = _shortened(self._hand.turn_to(move.yaw), _TURN_RAD) / LARGEST_TURN_RAD
        return np.concatenate([step, turn, [move.gripper]])


def require_expert(task: str) -> None:
    """Refuse a task without a script.

    Raises:
        EnvError: always then.
    """
    _script(task)


def _script(task: str) -> _Script:
    if task not in _SCRIPTS:
        raise EnvError(
            f"scripted expert: expected one of {sorted(_SCRIPTS)}, got {task!r}; "
            "record that task by hand or use its published demonstrations."
        )
    return _SCRIPTS[task]


def _lift(simulation: Any, hand: Hand, draw: np.random.Generator) -> Iterator[Move]:
    cube = _Body(simulation, simulation.cube_body_id)
    above, depth = _up(draw.uniform(0.08, 0.12)), _up(draw.uniform(-0.004, 0.004))
    yaw = hand.nearest(cube.yaw, np.pi / 2)
    yield from _reach(hand, lambda: Move(cube.position + above, yaw, OPEN), 0.012, 0.1, 80)
    yield from _reach(hand, lambda: Move(cube.position + depth, yaw, OPEN, 0.03, precise=True), 0.008, _ANY_TURN, 60)
    yield from _stay(hand, yaw, CLOSE, 9)
    goal = hand.position + _up(0.15)
    while _holds(hand, cube.position, 0.03):
        yield Move(goal, yaw, CLOSE, 0.04)


def _can(simulation: Any, hand: Hand, draw: np.random.Generator) -> Iterator[Move]:
    index = simulation.object_to_id["can"]
    can = _Body(simulation, simulation.obj_body_id[simulation.objects[index].name])
    target = simulation.target_bin_placements[index] + [*draw.uniform(-0.02, 0.02, 2), 0]
    # A can is the same from every side: the hand keeps the yaw it has.
    above, depth, yaw = _up(draw.uniform(0.12, 0.15)), _up(draw.uniform(-0.005, 0.015)), hand.yaw
    yield from _reach(hand, lambda: Move(can.position + above, yaw, OPEN), 0.02, _ANY_TURN, 100)
    yield from _reach(hand, lambda: Move(can.position + depth, yaw, OPEN, 0.03, precise=True), 0.009, _ANY_TURN, 30)
    yield from _stay(hand, yaw, CLOSE, 10)

    def carry(waypoint: np.ndarray, near_m: float, speed: float = LARGEST_STEP_M) -> Iterator[Move]:
        before = [hand.position + 1] * 6
        for move in _reach(hand, lambda: Move(waypoint, yaw, CLOSE, speed), near_m, _ANY_TURN, 100):
            # The bin is at the end of the arm's reach, where it may stop some centimetres short.
            stalled = np.linalg.norm(hand.position - before[-6]) < 0.005
            if stalled or not _holds(hand, can.position, 0.06):
                return
            before.append(hand.position)
            yield move

    high = hand.position + _up(0.22)
    yield from carry(high, 0.03)
    yield from carry(np.array([*target[:2], high[2]]), 0.04)
    yield from carry(target + _up(0.10), 0.045, 0.03)
    yield from _stay(hand, yaw, OPEN, 7)
    yield from _rise(hand)


def _square(simulation: Any, hand: Hand, draw: np.random.Generator) -> Iterator[Move]:
    nut = next(nut for nut in simulation.nuts if "Square" in nut.name)
    body, peg = _Body(simulation, simulation.obj_body_id[nut.name]), _Body(simulation, simulation.peg1_body_id)
    handle_site = simulation.sim.model.site_name2id(nut.important_sites["handle"])

    def handle() -> np.ndarray:
        return np.array(simulation.sim.data.site_xpos[handle_site])

    def across() -> float:
        # The fingers close across the handle, which points away from the nut's centre.
        x, y, _ = handle() - body.position
        return hand.nearest(np.arctan2(y, x), np.pi)

    def held() -> bool:
        return _holds(hand, handle(), 0.03)

    above = _up(draw.uniform(0.07, 0.10))
    yield from _reach(hand, lambda: Move(handle() + above, across(), OPEN), 0.02, 0.15, 120)
    # Slower than a chunk is long: who learns from it must look at the handle again on the way down.
    yield from _reach(hand, lambda: Move(handle() + above, across(), OPEN, 0.02, precise=True), 0.005, 0.04, 60)
    yaw = across()
    yield from _reach(hand, lambda: Move(handle() - _up(0.002), yaw, OPEN, 0.01, precise=True), 0.005, 0.04, 60)
    yield from _stay(hand, yaw, CLOSE, 11)
    high = hand.position + _up(draw.uniform(0.17, 0.19))
    for move in _reach(hand, lambda: Move(high, yaw, CLOSE, 0.04), 0.02, _ANY_TURN, 60):
        if not held():
            return
        yield move
    yield from _thread(_Threading(hand, body, peg, high[2], float(simulation.table_offset[2]), held))
    yield from _stay(hand, hand.yaw, OPEN, 7)
    yield from _rise(hand)


@dataclass(frozen=True)
class _Threading:
    """Who takes part when the nut goes onto the peg; heights in m."""

    hand: Hand
    nut: _Body
    peg: _Body
    height: float
    table: float
    held: Callable[[], bool]


def _thread(scene: _Threading) -> Iterator[Move]:
    """Bring the held nut over the peg and lower it, by the nut's own error: it hangs askew in the hand."""
    hand, nut, peg = scene.hand, scene.nut, scene.peg
    # The nut fits in four ways: the one with the least turn, but with the handle towards +x the arm cannot reach.
    turns = [_wrapped(peg.yaw + quarter * np.pi / 2 - nut.yaw, 2 * np.pi) for quarter in range(4)]
    wanted = nut.yaw + min(turns, key=lambda turn: abs(hand.yaw + turn) + 2.0 * (np.cos(nut.yaw + turn) > 0.5))
    # What a proportional law leaves over in place (m) and yaw (rad), bounded so that it cannot run away.
    place, turn = np.zeros(2), 0.0
    lowering, waited, before = False, 0, hand.position + 1
    while scene.held():
        off, skew = (peg.position - nut.position)[:2], _wrapped(wanted - nut.yaw, 2 * np.pi)
        far = float(np.linalg.norm(off))
        place = np.clip(place + 0.03 * off, -0.006, 0.006) if far < 0.012 else place
        turn = float(np.clip(turn + 0.05 * skew, -0.1, 0.1)) if abs(skew) < 0.1 else turn
        low = nut.position[2] < scene.table + 0.11
        if lowering:
            if nut.position[2] < scene.table + 0.085 or waited > 100:
                return
            z = hand.position[2] - (0.025 if low or (far < 0.004 and abs(skew) < 0.04) else 0)
            if not low and waited > 30:
                lowering, waited, place = False, 0, np.zeros(2)
        else:
            z = scene.height + 0.01
            still = np.linalg.norm(hand.position - before) < 0.00075
            aligned = far < 0.003 and abs(skew) < 0.03 and abs(hand.position[2] - z) < 0.03
            if (aligned and still) or waited > 120:
                lowering, waited = True, 0
        before = hand.position
        waited += 1
        xy = hand.position[:2] + off * (0.7 if far < 0.06 else 1.0) + place
        slow = 0.025 if lowering else 0.02 if far < 0.08 else LARGEST_STEP_M
        yield Move(np.array([*xy, z]), hand.yaw + skew + turn, CLOSE, slow, precise=far < 0.08)


_SCRIPTS: dict[str, _Script] = {"lift": _lift, "can": _can, "square": _square}


@dataclass(frozen=True)
class _Body:
    """A body of the simulation, where it is now."""

    simulation: Any
    index: int

    @property
    def position(self) -> np.ndarray:
        return np.array(self.simulation.sim.data.body_xpos[self.index])

    @property
    def yaw(self) -> float:
        return _yaw(np.array(self.simulation.sim.data.body_xmat[self.index]).reshape(3, 3))


def _reach(hand: Hand, aim: Callable[[], Move], near_m: float, near_rad: float, at_most: int) -> Iterator[Move]:
    """Go where ``aim`` says, which is asked anew each step, until there or ``at_most`` steps are over."""
    for _ in range(at_most):
        move = aim()
        yield move
        turn = np.linalg.norm(hand.turn_to(move.yaw))
        if np.linalg.norm(move.position - hand.position) < near_m and turn < near_rad:
            return


def _stay(hand: Hand, yaw: float, gripper: float, steps: int) -> Iterator[Move]:
    """Stay where the hand is while the fingers move."""
    here = hand.position
    for _ in range(steps):
        yield Move(here, yaw, gripper, precise=True)


def _rise(hand: Hand) -> Iterator[Move]:
    """Leave what was let go."""
    goal, yaw = hand.position + _up(0.15), hand.yaw
    yield from _reach(hand, lambda: Move(goal, yaw, OPEN), 0.02, _ANY_TURN, 30)


def _holds(hand: Hand, thing: np.ndarray, grip_m: float) -> bool:
    """Return whether a thing is where it would be if the hand had not lost it."""
    return bool(np.linalg.norm(thing - hand.position) < grip_m)


def _up(height: float) -> np.ndarray:
    return np.array([0, 0, height])


def _yaw(rotation: np.ndarray) -> float:
    """Return where a frame's x axis points, rad in [-pi, pi]."""
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def _wrapped(angle: float, period: float) -> float:
    return float((angle + period / 2) % period - period / 2)


def _shortened(vector: np.ndarray, longest: float) -> np.ndarray:
    return vector * min(1.0, longest / max(float(np.linalg.norm(vector)), 1e-12))
