"""The caches of other packages on this network, side by side with ours: what they compute, how far off, how fast.

Each is applied by its own package to the network as it is, in eager torch under diffusers' scheduler. Most decide at
run time from the features they see, so errors are taken chunk by chunk at batch 1, each chunk from a fresh state.

What they need of us is a decoder whose layers take ``(hidden_states, encoder_hidden_states)``, here ``_Decoder``:
diffusers finds blocks by these names and refuses classes it has no metadata of, cache-dit matches them to a pattern.
"""

from __future__ import annotations

import ast
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bac.errors import BacError, Unavailable, sentence
from bac.executors import ChunkNoise, ExecutorKind
from bac.files import write_whole
from bac.methods import BlockAdaptive, SensitivityWeighted
from bac.profile import FeatureProfile
from bac.results import run_provenance, write_results
from bac.timing import Latency
from configs.studies import BenchConfig, PeersConfig
from configs.tasks import HELD_OUT_SEED, demonstrations
from policies.benchmark import Denoise, Row, StartedRow, executor_rows, hook_rows, noise_of
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer
from policies.loading import load_policy, profile_path
from studies.latency import reference_loop, user_loop
from studies.rows import REFERENCE, markdown_table, one_line, require_package, started, timed, wanted

_COLUMNS = ("row", "computed", "action error mean", "p95", "p50 ms", "p99 ms", "against reference")
_UPDATES = 10
_CALIBRATION_SEED = 0
"""Of MagCache's observations, as in ``configs/calibration/standard.yaml``; not that of the held-out ones."""

_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What packages raise at a network they cannot take: they have no error of their own for it."""

_Open = Callable[[], AbstractContextManager[object]]
"""Resets a package's state and opens a chunk."""

_Attach = Callable[[DiffusionPolicy, DiffusionTransformer], _Open]
"""Caches a network of its own by a package."""


@dataclass(frozen=True)
class PeerLoop:
    """A user's loop over a network that a package caches; a ``Denoise``.

    Attributes:
        loop: over the cached network.
        open_chunk: resets the package's state and opens a chunk.
        layers: the network's own decoder layers: what the package calls or skips.
    """

    loop: Denoise
    open_chunk: _Open
    layers: tuple[nn.Module, ...]

    def __call__(self, observation: Tensor, noise: ChunkNoise) -> Tensor:
        """Denoise a chunk from a fresh state."""
        with self.open_chunk():
            return self.loop(observation, noise)


@dataclass(frozen=True)
class Judged:
    """What a row did on the held-out observations.

    Attributes:
        computed: share of the layer calls that were computed, in [0, 1]; of the block updates in a schedule of ours.
        error, error_p95: over observations, of the mean absolute difference of the executed actions, normalised units.
    """

    computed: float
    error: float
    error_p95: float


def run(config: BenchConfig, folder: Path) -> None:
    """Judge all rows chunk by chunk, then time them in turn; write table and JSON into ``folder``."""
    require_package(REFERENCE, "diffusers", "diffusers")
    policy = load_policy(config.checkpoint or config.task.name, device=config.device)
    spread = demonstrations(config.task, config.demonstrations).spread_observations
    observed = policy.observe(spread(config.error_observations, policy.observation_steps, HELD_OUT_SEED))
    calibration = policy.observe(
        spread(config.peers.calibration_observations, policy.observation_steps, _CALIBRATION_SEED)
    )
    profile = FeatureProfile.load(profile_path(policy))
    ours, shares = _our_rows(policy, profile)
    reference = Row(REFERENCE, partial(reference_loop, steps=policy.sampler.steps), policy.sampler.steps, None)
    peers = peer_rows(config.peers, policy, calibration)
    rows = [row for row in (reference, *peers, *ours) if wanted(config, row)]
    built, refused = started(rows, policy)
    judged = judge(policy, built, observed, shares)
    latency = timed(config, policy, built, observed[:1], "time")
    ratios = {name: latency[REFERENCE].p50_ms / each.p50_ms for name, each in latency.items()}
    results = [
        {"row": name, **asdict(judged[name]), **each.to_json(), "ratio": ratios[name]} for name, each in latency.items()
    ]
    text = peers_markdown([row.name for row in rows], judged, latency, refused)
    write_whole(folder / "peers.md", lambda path: path.write_text(text))
    provenance = run_provenance(torch.device(config.device), asdict(config))
    write_results(folder / "results.json", {"rows": results, "refused": refused, "provenance": provenance})
    print(f"{text}\nresults in {folder}")


def peer_rows(peers: PeersConfig, policy: DiffusionPolicy, calibration: Tensor) -> Iterator[Row]:
    """Yield a row per package, cache and threshold.

    Args:
        peers: the thresholds.
        policy: whose sampler the rows run.
        calibration: normalised observations float32[N, To, Do] for the caches that are calibrated.
    """
    steps = policy.sampler.steps

    def row(name: str, attach: _Attach) -> Row:
        return Row(name, partial(cached_by, attach=attach), steps, None)

    for threshold in peers.first_block:
        yield row(f"diffusers FirstBlockCache {threshold:g}", partial(_first_block, threshold=threshold))
    for interval in peers.taylorseer:
        yield row(f"diffusers TaylorSeer every {interval}", partial(_taylorseer, interval=interval))
    for threshold in peers.magcache:
        attach = partial(_magcache, threshold=threshold, skipped=peers.magcache_skipped, calibration=calibration)
        yield row(f"diffusers MagCache {threshold:g}", attach)
    for threshold in peers.dbcache:
        yield row(f"cache-dit DBCache {threshold:g}", partial(_dbcache, threshold=threshold, forecast=False))
    for threshold in peers.dbcache:
        yield row(f"cache-dit DBCache {threshold:g}, TaylorSeer", partial(_dbcache, threshold=threshold, forecast=True))


def judge(
    policy: DiffusionPolicy, rows: Sequence[StartedRow], observed: Tensor, shares: dict[str, float]
) -> dict[str, Judged]:
    """Compare every row with the uncached network on the same observations and noise, chunk by chunk.

    Args:
        policy: whose network the reference is.
        rows: what to judge; all take the policy's sampler.
        observed: normalised observations float32[N, To, Do].
        shares: of our rows, the share of block updates in their schedule.

    Returns:
        Row's name -> what it did.
    """
    noise = noise_of(policy, policy.sampler.steps, len(observed), HELD_OUT_SEED)
    layers = tuple(policy.checkpoint.network.decoder.layers)
    expected = one_by_one(reference_loop(policy, steps=policy.sampler.steps), observed, noise)
    judged = {}
    for each in tqdm(rows, desc="judge", unit="row"):
        with _counted(each.denoise.layers if isinstance(each.denoise, PeerLoop) else layers) as calls:
            chunks = one_by_one(each.denoise, observed, noise)
        errors = (chunks - expected)[:, policy.spec.executed].double().abs().mean(dim=(1, 2)).cpu().numpy()
        possible = len(layers) * policy.sampler.steps * len(observed)
        computed = shares.get(each.row.name, calls.total() / possible)
        judged[each.row.name] = Judged(computed, float(errors.mean()), float(np.percentile(errors, 95)))
    return judged


def peers_markdown(
    names: Iterable[str], judged: dict[str, Judged], latency: dict[str, Latency], refused: dict[str, str]
) -> str:
    """Return the table in the order of ``names``; a refused row says so, and below it why."""
    cells = []
    for name in names:
        if name in refused:
            cells.append((name, "refused", *["-"] * (len(_COLUMNS) - 2)))
            continue
        row, time = judged[name], latency[name]
        errors = f"{row.error:.4f}", f"{row.error_p95:.4f}"
        times = f"{time.p50_ms:.1f}", f"{time.p99_ms:.1f}", f"{latency[REFERENCE].p50_ms / time.p50_ms:.1f}x"
        cells.append((name, f"{row.computed:.0%}", *errors, *times))
    reasons = "".join(f"\n- {name}: {reason}" for name, reason in refused.items())
    return f"{markdown_table(_COLUMNS, cells)}{reasons}\n"


def _our_rows(policy: DiffusionPolicy, profile: FeatureProfile) -> tuple[list[Row], dict[str, float]]:
    """Return our rows, and by name the share of block updates in the schedule of each."""
    bac = {f"BAC S={_UPDATES}": BlockAdaptive(_UPDATES).schedule(profile)}
    both = bac | {f"bac_weighted S={_UPDATES}": SensitivityWeighted(_UPDATES).schedule(profile)}
    kind = ExecutorKind.COMPILED if policy.trunk.device.type == "cpu" else ExecutorKind.CUDA_GRAPH
    hooks = list(hook_rows(policy, bac, partial(user_loop, steps=policy.sampler.steps)))
    planned = list(executor_rows(policy, both, kind))
    scheduled = [*zip(hooks, bac.values(), strict=True), *zip(planned, both.values(), strict=True)]
    return [*hooks, *planned], {row.name: float(schedule.mask.mean()) for row, schedule in scheduled}


def cached_by(policy: DiffusionPolicy, *, attach: _Attach) -> PeerLoop:
    """Cache a copy of the network and see that it runs and forgets.

    Raises:
        Unavailable: the package is not here, refuses the network, or gives two identical calls different chunks.
    """
    network = deepcopy(policy.checkpoint.network)
    layers, steps = tuple(network.decoder.layers), policy.sampler.steps
    shape = 1, policy.observation_steps, policy.spec.network.observation_dim
    observation, noise = torch.zeros(shape, device=policy.trunk.device), noise_of(policy, steps, 1)
    try:
        peer = PeerLoop(user_loop(policy, network, steps=steps), attach(policy, network), layers)
        first, second = (one_by_one(peer, observation, noise) for _ in range(2))
    except BacError:
        raise
    except _REFUSALS as reason:
        raise Unavailable(
            sentence(
                "the package",
                expected="no refusal of the decoder in scripts/studies/peers.py",
                got=f"{type(reason).__name__}, {one_line(reason)}",
                mend="see what that version of the package wants of a decoder layer",
            )
        ) from reason
    if not torch.equal(first, second):
        raise Unavailable(
            sentence(
                "the package",
                expected="the same chunk from two identical calls",
                got=f"chunks up to {(first - second).abs().max():.2g} apart",
                mend="see how that version of the package resets its state",
            )
        )
    return peer


class _Layer(nn.Module):
    """A decoder layer under the argument names that the packages look for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **masks: Any) -> Tensor:
        return self.layer(hidden_states, encoder_hidden_states, **masks)


class _Decoder(nn.Module):
    """``nn.TransformerDecoder`` over such layers."""

    def __init__(self, decoder: nn.TransformerDecoder) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(layer) for layer in decoder.layers)

    def forward(self, stream: Tensor, memory: Tensor, **masks: Any) -> Tensor:
        for layer in self.layers:
            stream = layer(stream, memory, **masks)
        return stream


def _first_block(policy: DiffusionPolicy, network: DiffusionTransformer, *, threshold: float) -> _Open:
    hooks = require_package("FirstBlockCache", "diffusers.hooks", "diffusers")
    return _by_diffusers(network, hooks.FirstBlockCacheConfig(threshold=threshold))


def _taylorseer(policy: DiffusionPolicy, network: DiffusionTransformer, *, interval: int) -> _Open:
    """Forecast the last layer's output and skip those before it: the package's lite mode under our names."""
    hooks = require_package("TaylorSeer", "diffusers.hooks", "diffusers")
    last = policy.spec.network.layers - 1
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=interval,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[rf"layers\.{last}"],
        skip_predict_identifiers=[rf"layers\.{layer}" for layer in range(last)],
    )
    return _by_diffusers(network, config)


def _magcache(
    policy: DiffusionPolicy, network: DiffusionTransformer, *, threshold: float, skipped: int, calibration: Tensor
) -> _Open:
    """Skip by the ratios of residuals that the package measures itself in a calibration run."""
    hooks = require_package("MagCache", "diffusers.hooks", "diffusers")
    steps, measured = policy.sampler.steps, deepcopy(network)
    noise = noise_of(policy, steps, len(calibration))
    open_chunk = _by_diffusers(measured, hooks.MagCacheConfig(calibrate=True, num_inference_steps=steps))
    loop = PeerLoop(user_loop(policy, measured, steps=steps), open_chunk, ())
    with redirect_stdout(io.StringIO()) as told, _step_noise(noise):
        loop(calibration, noise)
    # Printed for the user to copy into the configuration, and forgotten: the package has no other way out for them.
    ratios = ast.literal_eval(told.getvalue().strip().splitlines()[-1])
    config = hooks.MagCacheConfig(
        threshold=threshold, max_skip_steps=skipped, num_inference_steps=steps, mag_ratios=ratios
    )
    return _by_diffusers(network, config)


def _by_diffusers(network: DiffusionTransformer, config: Any) -> _Open:
    """Cache the layers by the methods that diffusers gives its own networks."""
    mixin = require_package("the decoder", "diffusers", "diffusers").CacheMixin
    registry = require_package("the decoder", "diffusers.hooks._helpers", "diffusers")
    registry.TransformerBlockRegistry.register(_Layer, registry.TransformerBlockMetadata())
    decoder = type("_CacheableDecoder", (_Decoder, mixin), {})(network.decoder)
    decoder.enable_cache(config)
    network.add_module("decoder", decoder)

    @contextmanager
    def open_chunk() -> Iterator[None]:
        decoder._reset_stateful_cache()  # as a pipeline of diffusers does after a call
        with decoder.cache_context("chunk"):
            yield

    return open_chunk


def _dbcache(policy: DiffusionPolicy, network: DiffusionTransformer, *, threshold: float, forecast: bool) -> _Open:
    """Decide by the first layer and reuse, or forecast, what the others added: F1B0 in the package's terms."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read at import; it would report every layer it wraps
    cache_dit = require_package("DBCache", "cache_dit", "cache-dit")
    decoder = _Decoder(network.decoder)
    network.add_module("decoder", decoder)
    cache_dit.enable_cache(
        cache_dit.BlockAdapter(
            transformer=decoder,
            blocks=decoder.layers,
            forward_pattern=cache_dit.ForwardPattern.Pattern_2,
            check_forward_pattern=True,
        ),
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            enable_separate_cfg=False,
        ),
        # No layer changes the memory, so there is nothing to forecast in it.
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(enable_encoder_calibrator=False) if forecast else None,
    )

    @contextmanager
    def open_chunk() -> Iterator[None]:
        cache_dit.refresh_context(decoder)
        yield

    return open_chunk


def one_by_one(denoise: Denoise, observed: Tensor, noise: ChunkNoise) -> Tensor:
    """Denoise float32[N, T, Da] one chunk at a time."""
    chunks = []
    for row in range(len(observed)):
        own = ChunkNoise(noise.initial[row : row + 1], noise.steps[:, row : row + 1])
        with _step_noise(own):
            chunks.append(denoise(observed[row : row + 1], own))
    return torch.cat(chunks)


@contextmanager
def _step_noise(noise: ChunkNoise) -> Iterator[None]:
    """Give diffusers' DDPM scheduler this noise instead of its own, so that all rows denoise the same."""
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", side_effect=list(noise.steps)):
        yield


@contextmanager
def _counted(layers: Iterable[nn.Module]) -> Iterator[Counter[str]]:
    """Count the calls of layers; nothing is left on them for when they are timed."""
    calls: Counter[str] = Counter()
    handles = [layer.register_forward_hook(lambda *_: calls.update(layer=1)) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
