"""What calibration measures, with progress bars; by command and on a checkpoint's first use alike."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from bac.errors import Unavailable, sentence
from bac.executors import ChunkNoise
from bac.methods import HarmoniCa, Method, NoCache, Search, SensitivityWeighted
from bac.methods.base import ByUpdates, require_updates
from bac.profile import FeatureProfile
from bac.profiler import profile_features
from bac.router import train_router
from bac.schedule import CacheSchedule
from bac.sensitivity import step_sensitivity
from bac.trials import Trials
from configs.schema import CalibrationConfig
from configs.tasks import TaskDemonstrations
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import kept_schedule, profile_path, require_free, schedule_path

_Batches = list[tuple[Tensor, ChunkNoise]]


@dataclass(frozen=True)
class Calibration:
    """Measures one policy on demonstrations.

    Attributes:
        config: how much.
        policy: uncached, with its sampler.
        demonstrations: of its task; observations are drawn from all over them.
    """

    config: CalibrationConfig
    policy: DiffusionPolicy
    demonstrations: TaskDemonstrations

    def on_first_use(self, method: Method) -> None:
        """Measure what the method needs and does not find beside the checkpoint, and keep it there.

        Files appear whole or not at all, and equal measurements write equal files: of several processes that do this at
        the same time the last one wins.

        Raises:
            Mismatch: the profile found there is of other weights or another sampler, or a search with other parameters
                left a schedule of the same name.
            InvalidInput: parameters of the method that this policy or this calibration does not allow.
            Unavailable: the folder cannot be written.
        """
        if isinstance(method, NoCache):
            return
        profile = self.kept_profile()
        self.require_possible(method, profile)
        if _served(method, profile, self.policy):
            return
        by_trials = isinstance(method, Search)
        if by_trials:
            require_free(method, self.policy)
        kept = schedule_path(self.policy, method.label) if by_trials else profile_path(self.policy)
        _require_writable(kept.parent)
        print(f"first use of {method.name} with this checkpoint and sampler: calibrate once, kept in {kept}")
        if isinstance(method, Search):
            self.search(method, profile).save(kept)
        else:
            self.completed(profile or self.features(), method).save(kept)

    def kept_profile(self) -> FeatureProfile | None:
        """Return the profile that lies beside the checkpoint; None if there is none.

        Raises:
            Mismatch: it is of other weights or another sampler.
        """
        path = profile_path(self.policy)
        profile = FeatureProfile.load(path) if path.is_file() else None
        if profile is not None:
            profile.provenance.require(self.policy.provenance, "feature profile")
        return profile

    def require_possible(self, method: Method, profile: FeatureProfile | None) -> None:
        """Refuse what the method would refuse after the profile was measured, or after the one given was completed.

        Raises:
            InvalidInput: parameters of the method that this policy or this calibration does not allow.
            Mismatch: the profile is of other weights or another sampler.
        """
        if isinstance(method, ByUpdates):
            require_updates(method.updates, self.policy.sampler.steps)
        if isinstance(method, NoCache | Search):
            return
        policy = self.policy
        stand_in = FeatureProfile.stand_in(
            policy.trunk.blocks, policy.provenance, policy.sampler.steps, policy.spec.network.horizon
        )
        if profile is None:
            profile = replace(stand_in, sensitivity=None, gates=None)
        profile.provenance.require(policy.provenance, "feature profile")
        if profile.sensitivity is None and self.config.sensitivity_observations:
            profile = replace(profile, sensitivity=stand_in.sensitivity)
        if profile.gates is None and isinstance(method, HarmoniCa):
            profile = replace(profile, gates=stand_in.gates)
        method.schedule(profile)

    def features(self) -> FeatureProfile:
        """Measure a feature profile."""
        policy, batches = self.policy, self._batches(self.config.observations, self.config.batch)
        with tqdm(total=len(batches), desc="features", unit="batch") as bar:
            return profile_features(policy.trunk, policy.sampler, policy.provenance, batches, lambda _: bar.update())

    def completed(self, profile: FeatureProfile, method: Method) -> FeatureProfile:
        """Return the profile with what it lacks: the sensitivity of steps, and the gates if the method is HarmoniCa.

        Raises:
            Mismatch: it is of other weights or another sampler.
        """
        profile.provenance.require(self.policy.provenance, "feature profile")
        if profile.sensitivity is None and self.config.sensitivity_observations:
            profile = replace(profile, sensitivity=self._sensitivity())
        if profile.gates is None and isinstance(method, HarmoniCa):
            profile = replace(profile, gates=self._gates())
        return profile

    def search(self, method: Search, profile: FeatureProfile | None) -> CacheSchedule:
        """Return the schedule that trials find; a profile gives them another beginning."""
        policy, count = self.policy, self.config.trial_observations
        ((observed, noise),) = self._batches(count, count)
        trials = Trials(policy.trunk, policy.sampler, policy.provenance, observed, noise, policy.spec.executed)
        with tqdm(total=method.trials, desc=method.label, unit="trial") as bar:

            def report(best: float) -> None:
                bar.set_postfix_str(f"action error {best:.4f}")
                bar.update()

            return method.find(trials, profile, report)

    def _sensitivity(self) -> np.ndarray:
        policy, batches = self.policy, self._batches(self.config.sensitivity_observations, 1)
        with tqdm(total=len(batches), desc="sensitivity", unit="observation") as bar:
            return step_sensitivity(
                policy.trunk, policy.sampler, batches, policy.spec.executed, self.config.seed, lambda _: bar.update()
            )

    def _gates(self) -> np.ndarray:
        config, policy = self.config, self.policy
        batches = self._batches(config.router_observations, config.router_batch)
        with tqdm(total=config.router_iterations, desc="router", unit="rollout") as bar:

            def report(error: float, share: float) -> None:
                bar.set_postfix_str(f"action error {error:.4f} (rms) at {share:.0%} of the FLOPs")
                bar.update()

            return train_router(
                policy.trunk,
                policy.sampler,
                batches,
                policy.spec.executed,
                iterations=config.router_iterations,
                penalty=config.router_penalty,
                seed=config.seed,
                on_iteration=report,
            )

    def _batches(self, observations: int, batch: int) -> _Batches:
        """Return normalised observations from all over the demonstrations, with noise, in batches."""
        policy, seed = self.policy, self.config.seed
        observed = policy.observe(self.demonstrations.spread_observations(observations, policy.observation_steps, seed))
        keys = [(seed, row) for row in range(observations)]
        starts = range(0, observations, batch)
        return [
            (observed[start : start + batch], policy.draw_noise(len(part), part))
            for start in starts
            if (part := keys[start : start + batch])
        ]


def _served(method: Method, profile: FeatureProfile | None, policy: DiffusionPolicy) -> bool:
    """Return whether calibration left all that a method needs."""
    match method:
        case Search():
            return kept_schedule(method, policy) is not None
        case HarmoniCa():
            return profile is not None and profile.gates is not None
        case SensitivityWeighted():
            return profile is not None and profile.sensitivity is not None
        case _:
            return profile is not None


def _require_writable(folder: Path) -> None:
    """Refuse before anything is measured."""
    probe = folder / f".partial-{os.getpid()}-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Unavailable(
            sentence(
                f"calibration folder {folder}",
                expected="one that can be written",
                got=error.strerror or type(error).__name__,
                mend="copy the checkpoint to a folder of yours",
            )
        ) from error
