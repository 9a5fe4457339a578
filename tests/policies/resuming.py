"""Whether a training that was killed and resumed is the one that was not."""

from collections.abc import Callable
from pathlib import Path

import torch

from policies.training import Trainer


def require_exact_resume(make: Callable[[Path], Trainer], folder: Path, *, saved: int, killed: int) -> Trainer:
    """Train whole, and again with a save and a later kill; compare to the bit and return the whole one."""
    whole = make(folder / "whole")
    losses = [progress.loss for progress in whole.run()]

    first = make(folder / "killed")
    before = [progress.loss for progress in first.run(until=saved)]
    first.save()
    list(first.run(until=killed))  # lost with the kill: not saved

    resumed = make(folder / "killed")
    assert resumed.resume()
    after = [progress.loss for progress in resumed.run()]
    assert before + after == losses
    assert torch.equal(weights(resumed), weights(whole))
    return whole


def weights(trainer: Trainer) -> torch.Tensor:
    """Return every parameter, of the network and of its average."""
    return torch.cat([p.flatten() for network in (trainer.network, trainer.ema) for p in network.parameters()])
