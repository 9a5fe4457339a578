"""Recording a scripted expert's demonstrations: one file of successes, begun again where a killed run stopped."""

from __future__ import annotations

import atexit
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from envs.demos.experts import CLOSE, OPEN, Expert, require_expert
from envs.demos.robomimic import RecordedEpisode, write_robomimic
from envs.errors import DemonstrationError
from envs.processes import spawned
from envs.robomimic import RobomimicEnv, env_args
from envs.robomimic_package import ROBOSUITE_VERSION
from envs.robomimic_tasks import IMAGE, robomimic_task
from envs.rotations import vector_from_matrix

_TAIL_STEPS = 5
"""Steps recorded after success, so that the last action chunk of an episode has something to learn from."""

_LONGEST_WAY_IN, _LONGEST_PUSH = 60, 10
"""Control steps before a disturbance, and of one."""


@dataclass(frozen=True)
class Recorder:
    """How episodes are recorded; equal recorders record the same episode for a seed.

    Attributes:
        task: lift, can or square.
        noise_m: standard deviation of the noise on the expert's moves, m, at least 0; fine moves have none.
        disturbed: share of episodes, in [0, 1], that begin after a disturbance: the hand on its way is pushed off for
            up to half a second, and what is recorded is how the expert goes on from there, not the push.
        images: record the task's camera images too.
        max_steps: control steps in which the expert must succeed, at least 1.
    """

    task: str
    noise_m: float = 0.004
    disturbed: float = 0.3
    images: bool = False
    max_steps: int = 400

    def __post_init__(self) -> None:
        require_expert(self.task)
        if self.noise_m < 0 or not 0 <= self.disturbed <= 1 or self.max_steps < 1:
            raise DemonstrationError(
                "recording: expected noise_m >= 0, disturbed in [0, 1] and max_steps >= 1, got "
                f"{self.noise_m}, {self.disturbed} and {self.max_steps}; change them."
            )

    @property
    def cameras(self) -> tuple[str, ...]:
        """The keys of the images that are recorded."""
        return robomimic_task(self.task).images if self.images else ()

    def environment(self) -> RobomimicEnv:
        """Return the environment to record in."""
        observation = (*robomimic_task(self.task).low_dim, *self.cameras)
        return RobomimicEnv(self.task, absolute=False, observation=observation)

    def record(self, env: RobomimicEnv, seed: int) -> RecordedEpisode | None:
        """Play one episode in ``environment()``; return None if the expert fails."""
        draw = np.random.default_rng(seed)
        _, info = env.reset(seed=seed)
        if draw.random() < self.disturbed:
            info = self._disturb(env, draw, info)
        # Begun as it will be replayed, from what is stored: a seed's reset leaves the controller in another state.
        start = {"state": info["state"], "model": env.model()}
        observation, info = env.reset(options=start)
        expert = Expert(self.task, env.simulation, draw, self.noise_m)
        rows: list[dict[str, Any]] = []
        left: int | None = None
        for _ in range(self.max_steps + _TAIL_STEPS):
            row = {"actions": expert.act(), "states": info["state"], **_named("obs", observation)}
            observation, reward, success, _, info = env.step(row["actions"])
            # Exactly what the controller went for, which deltas and poses do not tell (see ``RobomimicEnv.reset``).
            position, rotation = env.goals()
            row["actions_abs"] = np.array([*position[0], *vector_from_matrix(rotation[0]), row["actions"][-1]])
            rows.append(row | {"rewards": reward, "dones": int(success), **_named("next_obs", observation)})
            left = _TAIL_STEPS if left is None and success else left
            if left == 0 or (left is None and len(rows) == self.max_steps):
                break
            left = None if left is None else left - 1
        if left is None:
            return None
        arrays = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        return RecordedEpisode(arrays, start["model"], seed)

    def _disturb(self, env: RobomimicEnv, draw: np.random.Generator, info: dict[str, Any]) -> dict[str, Any]:
        """Let the expert begin, then push the open hand somewhere; return the info of the last step."""
        expert = Expert(self.task, env.simulation, draw, self.noise_m)
        for _ in range(draw.integers(_LONGEST_WAY_IN)):
            action = expert.act()
            if action[-1] == CLOSE:
                break
            *_, info = env.step(action)
        push = np.array([*draw.uniform(-1, 1, 3), 0, 0, draw.uniform(-1, 1), OPEN])
        for _ in range(draw.integers(1, _LONGEST_PUSH + 1)):
            *_, info = env.step(push)
        return info


@dataclass(frozen=True)
class _Parts:
    """What a run has so far: one file for each attempted seed in a folder beside the target, empty if it failed."""

    target: Path

    @cached_property
    def folder(self) -> Path:
        return self.target.with_name(f".recording-{self.target.name}")

    def begin(self, recorder: Recorder, first_seed: int) -> None:
        """Take up the folder of an earlier run, or make one.

        Raises:
            DemonstrationError: the target exists, or the earlier run was of other settings.
        """
        if self.target.exists():
            raise DemonstrationError(
                f"demonstrations: expected nothing at {self.target}, got a file; delete it or choose another output."
            )
        settings: dict[str, Any] = {**asdict(recorder), "first_seed": first_seed, "robosuite": ROBOSUITE_VERSION}
        note = self.folder / "settings.json"
        if note.exists() and json.loads(note.read_text()) != settings:
            raise DemonstrationError(
                f"demonstrations: expected the settings of the unfinished run in {note}, got {settings}; "
                "give the same again or delete that folder."
            )
        if not note.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial_note = note.with_suffix(".partial")
            partial_note.write_text(json.dumps(settings, indent=2))
            partial_note.replace(note)

    def path(self, seed: int) -> Path:
        return self.folder / f"{seed}.npz"

    def write(self, seed: int, episode: RecordedEpisode | None) -> None:
        partial_part = self.folder / f".partial-{seed}.npz"
        with partial_part.open("wb") as file:
            if episode is not None:
                np.savez_compressed(file, model=np.array(episode.model), **episode.arrays)  # type: ignore[arg-type]
        partial_part.replace(self.path(seed))

    def succeeded(self, seed: int) -> bool:
        return self.path(seed).stat().st_size > 0

    def read(self, seed: int) -> RecordedEpisode:
        with np.load(self.path(seed)) as arrays:
            return RecordedEpisode({key: arrays[key] for key in arrays if key != "model"}, str(arrays["model"]), seed)


def make_demonstrations(
    recorder: Recorder,
    path: Path | str,
    *,
    episodes: int,
    first_seed: int,
    processes: int = 1,
    on_attempt: Callable[[int, bool], None] | None = None,
) -> int:
    """Record until so many episodes succeeded and write them into one robomimic file; go on where a killed run stopped.

    The file is the same however often the run was killed and however many processes it had: the first ``episodes``
    seeds from ``first_seed`` on with which the expert succeeds.

    Args:
        recorder: how.
        path: the file; until it is whole, what was recorded lies in a hidden folder beside it.
        episodes: successes to keep, at least 1.
        first_seed: of the first attempt.
        processes: that record side by side, at least 1.
        on_attempt: called with (seed, success) for each attempt, those of an earlier run first.

    Returns:
        The number of attempts it took.

    Raises:
        DemonstrationError: an argument is out of its range, the file exists, or an unfinished run had other settings.
    """
    if episodes < 1 or processes < 1 or first_seed < 0:
        raise DemonstrationError(
            "recording: expected episodes and processes of at least 1 and a first seed of at least 0, got "
            f"{episodes}, {processes} and {first_seed}; change them."
        )
    parts = _Parts(Path(path))
    parts.begin(recorder, first_seed)
    kept: list[int] = []
    attempts = 0
    for seed, success in _attempts(recorder, parts, episodes, first_seed, processes):
        attempts += 1
        kept += [seed] * success
        if on_attempt is not None:
            on_attempt(seed, success)
        if len(kept) == episodes:
            break
    arguments = env_args(recorder.task, absolute=False, images=recorder.cameras)
    write_robomimic(path, (parts.read(seed) for seed in kept), arguments)
    shutil.rmtree(parts.folder)
    return attempts


def _attempts(
    recorder: Recorder, parts: _Parts, episodes: int, first_seed: int, processes: int
) -> Iterator[tuple[int, bool]]:
    """Yield (seed, success) in the order of seeds, without end."""
    seeds = count(first_seed)
    attempt = partial(_attempt, recorder, parts)
    missing = episodes
    with ExitStack() as stack:
        side_by_side: Callable[..., Iterator[bool]] = map
        if processes > 1:
            side_by_side = stack.enter_context(spawned(processes, attempt)).map
        while True:
            # As many as are missing: no attempt is wasted when all succeed.
            batch = [next(seeds) for _ in range(missing)]
            for seed, success in zip(batch, side_by_side(attempt, batch), strict=True):
                missing -= success
                yield seed, success


_ENVIRONMENT: dict[Recorder, RobomimicEnv] = {}
"""Of this process, which builds it once."""


def _attempt(recorder: Recorder, parts: _Parts, seed: int) -> bool:
    if not parts.path(seed).exists():
        if recorder not in _ENVIRONMENT:
            _ENVIRONMENT[recorder] = recorder.environment()
            # Registered after EGL's own end, so called before it: contexts freed later print an EGLError each.
            atexit.register(_ENVIRONMENT[recorder].close)
        parts.write(seed, recorder.record(_ENVIRONMENT[recorder], seed))
    return parts.succeeded(seed)


def _named(prefix: str, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return ``prefix/KEY`` as robomimic's files have it: images as bytes, height and width first."""
    return {
        f"{prefix}/{key}": np.rint(values.transpose(1, 2, 0) * 255).astype(np.uint8) if key.endswith(IMAGE) else values
        for key, values in observation.items()
    }
