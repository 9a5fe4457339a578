"""The 206 human demonstrations of Push-T that diffusion_policy was published with, and how our copy is made.

``python -m envs.demos.push_t SOURCE [TARGET]`` takes the low-dim arrays out of the published store (31 MB with images).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from envs.demos.replay import Demonstrations, read_demonstrations, write_demonstrations
from envs.errors import DemonstrationError

PUSH_T_DEMOS = Path(__file__).parent / "data" / "push_t.zarr.zip"
"""The store that comes with this package."""

_ATTRIBUTES = {
    "source": "https://github.com/real-stanford/diffusion_policy, pusht_cchi_v7_replay without its images",
    "licence": "MIT",
    "citation": "Chi et al., Diffusion Policy: Visuomotor Policy Learning via Action Diffusion, RSS 2023",
}
_SHAPES = {"keypoint": (9, 2), "state": (5,), "action": (2,)}
_IMAGES = {"img": (96, 96, 3)}


@dataclass(frozen=True)
class PushTDemonstrations:
    """Demonstrations in the keys and units of ``envs.push_t.PushTEnv``, at 10 Hz.

    Attributes:
        observations: ``keypoints`` float32[N, 18] and ``agent_position`` float32[N, 2], world pixels; if asked for,
            ``image`` uint8[N, 96, 96, 3].
        actions: float32[N, 2], where the agent shall go, pixels; executed right after the observation of its row.
        states: float32[N, 5], agent x, y, block x, y in pixels, block angle in radians in [0, 2 pi).
        episode_ends: int64[E], the index one past each episode's last frame.
    """

    observations: Mapping[str, np.ndarray]
    actions: np.ndarray
    states: np.ndarray
    episode_ends: np.ndarray


def read_push_t(path: Path | str = PUSH_T_DEMOS, *, images: bool = False) -> PushTDemonstrations:
    """Read our store or the published one (zip or folder).

    Args:
        path: the store.
        images: read the images too, which only the published store has; its floats take 2.8 GB while they are read.

    Raises:
        DemonstrationError: the store cannot be read or holds another task.
    """
    expected = _SHAPES | (_IMAGES if images else {})
    demonstrations = read_demonstrations(path, tuple(expected))
    arrays = demonstrations.arrays
    shapes = {name: arrays[name].shape[1:] for name in expected}
    if shapes != expected:
        raise DemonstrationError(
            f"demonstrations {path}: expected Push-T frames {expected}, got {shapes}; give the store of this task."
        )
    frames = {name: arrays[name].astype(np.float32) for name in _SHAPES}
    observations = {"keypoints": frames["keypoint"].reshape(-1, 18), "agent_position": frames["state"][:, :2]}
    if images:
        observations["image"] = arrays["img"].astype(np.uint8)
    return PushTDemonstrations(
        MappingProxyType(observations), frames["action"], frames["state"], demonstrations.episode_ends
    )


def copy_low_dim(source: Path | str, target: Path | str = PUSH_T_DEMOS) -> None:
    """Write ``target`` from the published store at ``source``: all but the images, with origin and licence.

    Raises:
        DemonstrationError: ``source`` cannot be read.
    """
    published = read_demonstrations(source, (*_SHAPES, "n_contacts"))
    attributes = MappingProxyType(_ATTRIBUTES)
    write_demonstrations(Demonstrations(published.arrays, published.episode_ends, attributes), target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``copy_low_dim`` from the command line."""
    parser = argparse.ArgumentParser(prog="python -m envs.demos.push_t", description=copy_low_dim.__doc__)
    parser.add_argument("source", type=Path, help="the published pusht_cchi_v7_replay.zarr, folder or zip")
    parser.add_argument("target", type=Path, nargs="?", default=PUSH_T_DEMOS, help="the store to write")
    options = parser.parse_args(arguments)
    try:
        copy_low_dim(options.source, options.target)
    except DemonstrationError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
