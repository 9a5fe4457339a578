"""Record a scripted expert: ``python scripts/make_demos.py task=can episodes=200``. Run again after a kill to go on."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from configs.entry import script
from configs.schema import MakeDemosConfig


def main(config: MakeDemosConfig, folder: Path) -> None:
    """Record until ``config.episodes`` attempts succeeded; write one robomimic file into ``folder``."""
    # Not above: without robomimic's packages this is a refusal, which only ``script`` turns into its sentence.
    from envs.demos.recording import Recorder, make_demonstrations

    images = config.images or bool(config.task.images)
    path = folder / ("image.hdf5" if images else "low_dim.hdf5")
    # Delayed, so that a refusal stands alone.
    with tqdm(total=config.episodes, desc=f"record {config.task.name}", unit="episode", delay=1) as bar:
        failed = 0

        def note(seed: int, success: bool) -> None:
            nonlocal failed
            failed += not success
            bar.update(success)
            bar.set_postfix(seed=seed, failed=failed)

        attempts = make_demonstrations(
            Recorder(config.task.world, config.noise_m, config.disturbed, images, config.task.max_steps),
            path,
            episodes=config.episodes,
            first_seed=config.seed,
            processes=config.processes,
            on_attempt=note,
        )
    print(f"wrote {path}: {config.episodes} episodes of {attempts} attempts")


if __name__ == "__main__":
    script("make_demos", MakeDemosConfig)(main)()
