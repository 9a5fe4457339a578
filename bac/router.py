"""The router of HarmoniCa (Huang et al., arXiv 2410.01723): one learned gate per block and denoising step.

HarmoniCa trains its router by rolling the cached network out over all K denoising steps, so that every step sees what
earlier steps left in the cache. The loss of a step is the error of its noise estimate, weighted by a proxy of what that
error does to the image, plus a penalty on open gates. A chunk of actions is small enough to do without the proxy: here
the loss is the error of the executed actions, and its gradient reaches every gate through the rest of the rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bac.errors import InvalidInput, sentence
from bac.executors import ChunkNoise
from bac.executors.eager import sampler_update
from bac.sampler_table import SamplerTable
from bac.trunk import ResidualTrunk

_FIRST_LOGIT = -1.0
"""Gates begin at 0.27: open enough for a useful chunk, closed enough that every gate has an error to answer for."""


def train_router(
    trunk: ResidualTrunk,
    sampler: SamplerTable,
    batches: Sequence[tuple[Tensor, ChunkNoise]],
    executed: slice,
    *,
    iterations: int,
    penalty: float,
    rate: float = 0.3,
    seed: int = 0,
    on_iteration: Callable[[float, float], None] | None = None,
) -> np.ndarray:
    """Learn what each update is worth to the executed actions; the weights of the network stay as they are.

    The loss of an iteration is the mean squared difference of the executed actions from those of the uncached call with
    the same noise, plus ``penalty`` times the share of the branches' FLOPs behind the gates. It costs some four
    uncached calls of its batch: forward, forward once more for the gradient, step by step, so that memory holds one
    step and the features between the steps, and backward.

    Args:
        trunk: the denoiser.
        sampler: its sampler.
        batches: (normalised observations float32[B, To, Do], noise of the call) pairs; an iteration takes one.
        executed: the actions of a chunk that count.
        iterations: steps of Adam; 0 returns the gates as they begin.
        penalty: squared error, in normalised units, that computing every block at every step may cost.
        rate: of Adam, on the gates' logits; their path is at most ``rate * iterations`` long.
        seed: of the order of the batches, shuffled anew whenever all had their turn.
        on_iteration: called with the root mean square error of the actions and the share of the FLOPs.

    Returns:
        float64[blocks, K] in [0, 1]; column 0 is 1, since nothing is cached before it.

    Raises:
        InvalidInput: no batches, fewer than 0 iterations, or a penalty or rate that is negative or NaN.
    """
    _require_sound(len(batches), iterations, penalty, rate)
    weight = torch.tensor(trunk.cost.branch, dtype=torch.float64, device=trunk.device)[:, None]
    share = weight / (weight.sum() * sampler.steps)
    expected = [_uncached(trunk, sampler, observation, noise)[:, executed] for observation, noise in batches]
    logits = torch.full((len(trunk.blocks), sampler.steps), _FIRST_LOGIT, dtype=torch.float64, device=trunk.device)
    logits.requires_grad_()
    adam = torch.optim.Adam([logits], lr=rate)
    draw = np.random.default_rng(seed)
    turns: list[int] = []
    for _ in range(iterations):
        turns = turns or draw.permutation(len(batches)).tolist()
        turn = turns.pop()
        gates = _with_first_open(logits.sigmoid())
        chunk = gated_chunk(trunk, sampler, *batches[turn], gates)
        error = (chunk[:, executed] - expected[turn]).double().square().mean()
        spent = (share * gates).sum()
        # Not backward(), which would fill in the gradients of a network that has them switched on.
        (logits.grad,) = torch.autograd.grad(error + penalty * spent, [logits])
        adam.step()
        if on_iteration is not None:
            on_iteration(float(error.detach().sqrt()), float(spent.detach()))
    return _with_first_open(logits.detach().sigmoid()).cpu().numpy()


def gated_chunk(
    trunk: ResidualTrunk, sampler: SamplerTable, observation: Tensor, noise: ChunkNoise, gates: Tensor
) -> Tensor:
    """Denoise with every feature a mixture: gate * computed + (1 - gate) * cached. Differentiable in the gates.

    The mixture is added to the stream and becomes the cached feature (soft update). A gate of 0 or 1 does what a
    schedule does; a constant gate in between averages over about the latest 1 / gate steps.

    Args:
        trunk: the denoiser.
        sampler: its sampler.
        observation: float32[B, To, Do], normalised.
        noise: of the call.
        gates: float[blocks, K] in [0, 1]; those of step 0 are not read, it computes.

    Returns:
        float32[B, T, Da], the normalised action chunk.
    """
    noise.require(observation.shape[0], sampler.steps)
    with torch.no_grad():
        tables = trunk.step_tables(sampler.timesteps)
        condition = trunk.condition(observation)

    def step(number: int, sample: Tensor, original: Tensor, *cached: Tensor) -> tuple[Tensor, ...]:
        stream, kept = trunk.embed(sample), []
        for block in range(len(trunk.blocks)):
            feature = trunk.branch(block, stream, tables[number], condition)
            if number > 0:
                feature = torch.lerp(cached[block], feature, gates[block, number].to(feature.dtype))
            kept.append(feature)
            stream = stream + feature
        update = sampler_update(sampler, number)
        return (*update(sample, trunk.head(stream), noise.steps[number], original), *kept)

    state: tuple[Tensor, ...] = (noise.initial, torch.zeros_like(noise.initial))
    for number in range(sampler.steps):
        # Kept whole, a rollout of 100 steps and 24 branches takes some 0.5 GB per observation at d = 256.
        state = checkpoint(step, number, *state, use_reentrant=False, preserve_rng_state=False)
    return state[0]


def _uncached(trunk: ResidualTrunk, sampler: SamplerTable, observation: Tensor, noise: ChunkNoise) -> Tensor:
    full = torch.ones(len(trunk.blocks), sampler.steps, device=trunk.device)
    with torch.no_grad():
        return gated_chunk(trunk, sampler, observation, noise, full)


def _with_first_open(gates: Tensor) -> Tensor:
    return torch.cat((torch.ones_like(gates[:, :1]), gates[:, 1:]), dim=1)


def _require_sound(batches: int, iterations: int, penalty: float, rate: float) -> None:
    if not (batches > 0 and iterations >= 0 and penalty >= 0 and rate >= 0):
        raise InvalidInput(
            sentence(
                "router",
                expected="calibration observations, and iterations, penalty and rate of at least 0",
                got=f"{batches} batches, {iterations}, {penalty}, {rate}",
                mend="correct router_observations, router_iterations or router_penalty",
            )
        )
