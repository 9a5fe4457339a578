"""Chunks for a control loop: all actions from the newest observation on, around what is committed.

::

    step               t-1    t   t+1  ...  t+7  t+8 ... t+14       To = 2, T = 16
    executed by predict       a1   a2  ...   a8
    chunk of a loop           a1   a2  ...   a8   a9 ...  a15        float[T - To + 1, Da]; the tail bridges delays
    committed                 c1   c2                                n = 2: they will be executed while this is denoised
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from bac.control.inference import Predict, Request
from bac.errors import InvalidInput, sentence
from bac.executors import Committed, CrossChunkExecutor
from policies.diffusion_policy import DiffusionPolicy


class ChunkSource:
    """Whole chunks from one or more policies of the same task.

    Args:
        levels: the most accurate first; a loop degrades to the others.

    Raises:
        InvalidInput: chunks of one of them go on from the chunk before.
    """

    def __init__(self, levels: Sequence[DiffusionPolicy]) -> None:
        self._levels = tuple(levels)
        for policy in self._levels:
            require_standing_alone(policy)
        network = self._levels[0].spec.network
        self._first = network.observation_steps - 1
        self.observation_steps = network.observation_steps
        self.length = network.horizon - self._first

    def chunks(
        self,
        observation: Mapping[str, np.ndarray],
        noise_keys: Sequence[tuple[int, int]] | None,
        committed: Sequence[np.ndarray | None],
        level: int = 0,
    ) -> np.ndarray:
        """Return float32[B, T - To + 1, Da], task units; the first action is due when the newest observation was made.

        Args:
            observation: key -> float[B, To, channels], task units, oldest first.
            noise_keys: per row (episode seed, chunk number), as ``DiffusionPolicy.predict`` takes them.
            committed: per row float[n, Da], task units, n <= T - To + 1, or None.
            level: which policy, from 0.

        Raises:
            InvalidInput: something does not fit, or there are not so many levels.
        """
        policy = self._policy(level)
        observed = policy.observe(observation)
        noise = policy.draw_noise(len(observed), noise_keys)
        groups: dict[int, list[int]] = defaultdict(list)
        for row, actions in enumerate(committed):
            groups[0 if actions is None else len(actions)].append(row)
        if set(groups) == {0}:
            chunk = policy.denoiser(observed, noise)
        else:
            chunk = torch.empty_like(noise.initial)
            for count, rows in groups.items():
                given = self._committed(policy, [committed[row] for row in rows]) if count else None
                chunk[rows] = policy.denoiser(observed[rows], noise.rows(rows), given)
        unnormalized = policy.checkpoint.action_normalizer.unnormalize(chunk[:, self._first :])
        return unnormalized.float().cpu().numpy()

    def predictor(self, seed: int | None = None) -> Predict:
        """Return what answers the requests of a loop, observation values key -> float[To, channels], task units.

        Args:
            seed: of the noise, which request n takes under the key (seed, n); None draws fresh noise.
        """

        def predict(request: Request) -> np.ndarray:
            batch = {key: values[None] for key, values in request.observation.values.items()}
            keys = None if seed is None else [(seed, request.number)]
            return self.chunks(batch, keys, [request.committed], request.level)[0]

        return predict

    def _policy(self, level: int) -> DiffusionPolicy:
        if not 0 <= level < len(self._levels):
            raise InvalidInput(
                sentence(
                    "level",
                    expected=f"one of the {len(self._levels)} policies given, from 0",
                    got=level,
                    mend="let Degradation.levels be their number",
                )
            )
        return self._levels[level]

    def _committed(self, policy: DiffusionPolicy, actions: Sequence[np.ndarray | None]) -> Committed:
        stacked = torch.from_numpy(np.stack([np.asarray(each, np.float32) for each in actions if each is not None]))
        return Committed(policy.checkpoint.action_normalizer.normalize(stacked.to(policy.trunk.device)), self._first)


def require_standing_alone(policy: DiffusionPolicy) -> None:
    """Refuse a policy whose chunks go on from the chunk before: in a loop more ticks, or fewer, lie between the two.

    Raises:
        InvalidInput: its schedule recalls.
    """
    if isinstance(policy.denoiser, CrossChunkExecutor):
        raise goes_on("cross_chunk")


def goes_on(cache: str) -> InvalidInput:
    """Return the refusal of a cache that a control loop cannot play."""
    return InvalidInput(
        sentence(
            "cache of a control loop",
            expected="one whose chunks stand alone",
            got=f"{cache}, which goes on from the chunk before and needs a world that waits",
            mend="use another cache, or no control loop",
        )
    )
