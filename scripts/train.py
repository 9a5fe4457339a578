"""Train a policy on a task's demonstrations: ``python scripts/train.py task=push_t``. Run it again to resume."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from studies.episodes import play
from tqdm import tqdm

from bac.device import usable_device, use_threads
from bac.errors import InvalidInput, sentence
from bac.pictures import save_figure
from bac.results import run_provenance, write_results
from configs.entry import script
from configs.schema import TrainConfig
from configs.tasks import demonstrations, require_environment
from envs.demos.windows import window_index
from policies.base import PolicySpec
from policies.checkpoint import PolicyCheckpoint, load_checkpoint, save_checkpoint
from policies.diffusion_policy import DiffusionPolicy
from policies.hybrid_network import build_network, network_parts
from policies.normalizer import LimitsNormalizer
from policies.training import LOG_FILE, Trainer, TrainingConfig, TrainingWindows
from policies.training_identity import training_identity

CHECKPOINT_FILE = "checkpoint.safetensors"
UNPUBLISHED_SEED = 200_000


def main(config: TrainConfig, folder: Path) -> None:
    """Train to the end of the recipe, saving on the way; write checkpoint, log, curve and JSON into ``folder``."""
    device = usable_device(config.device)
    use_threads(config.threads)
    _require_counts(config)
    recipe = config.optimiser.build(config.seed)
    spec = config.policy.build(config.task)
    if config.rollout.every:
        require_environment(config.task, draws=False)
        config.sampler.build(spec.process)
    demos = demonstrations(config.task, config.demonstrations, config.filter_key)
    observations, actions = demos.joined(spec.low_dim), demos.actions
    least_range = config.task.least_range
    normalizers = (
        LimitsNormalizer.fit(observations, "observation", least_range),
        LimitsNormalizer.fit(actions, "action", least_range),
    )
    windows = TrainingWindows(
        normalizers[0].normalize(torch.from_numpy(observations)),
        normalizers[1].normalize(torch.from_numpy(actions)),
        torch.from_numpy(_window_index(demos.episode_ends, spec)),
        spec.network.observation_steps,
        {key: torch.from_numpy(demos.observations[key]) for key in config.task.images},
    )
    arrays = {**demos.observations, "actions": actions, "episode ends": demos.episode_ends}
    trainer = _trainer(config, recipe, spec, windows, folder, training_identity(spec, least_range, arrays))
    _train(config, trainer, lambda: _checkpoint(spec, trainer, normalizers, config))

    # Stored in half precision, and everything after this reads what was stored.
    save_checkpoint(_checkpoint(spec, trainer, normalizers, config), folder / CHECKPOINT_FILE, torch.float16)
    _draw_curve(folder / LOG_FILE, folder / "training_curve.png")
    results = {
        "steps": trainer.step,
        "digest": load_checkpoint(folder / CHECKPOINT_FILE).digest,
        "provenance": run_provenance(device, asdict(config)),
    }
    write_results(folder / "results.json", results)
    print(f"wrote {folder / CHECKPOINT_FILE}")


def _require_counts(config: TrainConfig) -> None:
    """Refuse numbers that would otherwise be missed only in the middle of the training."""
    given = {"save_every": config.save_every, "rollout.every": config.rollout.every}
    given["rollout.episodes"] = config.rollout.episodes
    for name, least in {"save_every": 1, "rollout.every": 0, "rollout.episodes": 1}.items():
        if given[name] < least:
            raise InvalidInput(
                sentence(name, expected=f"at least {least}", got=given[name], mend="correct the override")
            )


def _trainer(
    config: TrainConfig,
    recipe: TrainingConfig,
    spec: PolicySpec,
    windows: TrainingWindows,
    folder: Path,
    identity: dict[str, str],
) -> Trainer:
    torch.manual_seed(config.seed)
    network = build_network(spec).to(config.device)
    alphas = torch.from_numpy(spec.process.alphas_cumprod())
    trainer = Trainer(network, windows.to(config.device), alphas, recipe, folder, identity)
    if trainer.resume():
        print(f"resumed {folder} at step {trainer.step}")
    return trainer


def _window_index(episode_ends: np.ndarray, spec: PolicySpec) -> np.ndarray:
    index = window_index(
        episode_ends,
        horizon=spec.network.horizon,
        pad_before=spec.network.observation_steps - 1,
        pad_after=spec.action_steps - 1,
    )
    if not len(index):
        longest = int(np.diff(episode_ends, prepend=0).max(initial=0))
        raise InvalidInput(
            sentence(
                "policy.horizon",
                expected=f"one that fits into the demonstrations, the longest of {longest} steps",
                got=spec.network.horizon,
                mend="shorten it",
            )
        )
    return index


def _train(config: TrainConfig, trainer: Trainer, snapshot: Callable[[], PolicyCheckpoint]) -> None:
    every, steps = config.rollout.every, trainer.config.steps

    def scored(step: int) -> bool:
        return every > 0 and step > 0 and (step % every == 0 or step == steps)

    with tqdm(total=steps, initial=trainer.step, desc="train", unit="step") as bar:

        def score() -> None:
            value = _score(config, snapshot())
            trainer.note_score(value)
            trainer.save()
            bar.write(f"step {trainer.step}: score {value:.3f} over {config.rollout.episodes} episodes")

        if scored(trainer.step) and not trainer.has_score:
            score()
        for progress in trainer.run():
            bar.update()
            bar.set_postfix(loss=f"{progress.loss:.4f}", refresh=False)
            # Before the rollout: whatever ends that, no step is taken twice.
            if scored(progress.step) or progress.step % config.save_every == 0 or progress.step == steps:
                trainer.save()
            if scored(progress.step):
                score()


def _score(config: TrainConfig, checkpoint: PolicyCheckpoint) -> float:
    policy = DiffusionPolicy(checkpoint, config.sampler.build(checkpoint.spec.process))
    seeds = range(UNPUBLISHED_SEED, UNPUBLISHED_SEED + config.rollout.episodes)
    episodes = play(config.task, policy, seeds, title="rollout")
    return float(np.mean([episode.score for episode in episodes]))


def _checkpoint(
    spec: PolicySpec, trainer: Trainer, normalizers: tuple[LimitsNormalizer, LimitsNormalizer], config: TrainConfig
) -> PolicyCheckpoint:
    observation, action = (normalizer.to(config.device) for normalizer in normalizers)
    training = {"step": trainer.step, "weights": "ema", "config": asdict(config)}
    denoiser, encoder = network_parts(trainer.ema)
    return PolicyCheckpoint(spec, denoiser, observation, action, training, encoder)


def _draw_curve(log: Path, path: Path) -> None:
    with log.open() as file:
        rows = list(csv.DictReader(file))
    losses = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
    scores = [(int(row["step"]), float(row["score"])) for row in rows if row["score"]]
    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axis.semilogy(*zip(*losses, strict=True), linewidth=0.7, color="tab:blue")
    axis.set(xlabel="optimiser step", ylabel="noise-prediction loss")
    if scores:
        score_axis = axis.twinx()
        score_axis.plot(*zip(*scores, strict=True), "o-", color="tab:orange")
        score_axis.set(ylabel="rollout score (EMA weights)", ylim=(0, 1))
    save_figure(figure, path)


if __name__ == "__main__":
    script("train", TrainConfig)(main)()
