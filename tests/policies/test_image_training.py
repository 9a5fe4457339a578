from dataclasses import replace
from pathlib import Path

import pytest
import torch

from policies.base import PolicySpec
from policies.diffusion_transformer import DiffusionTransformerConfig
from policies.hybrid_network import HybridNetwork, HybridObservation, build_network, network_parts
from policies.samplers import DiffusionProcess
from policies.training import Trainer, TrainingConfig, TrainingWindows
from policies.vision import IMAGE_FEATURES, VisionConfig
from tests.policies.resuming import require_exact_resume

RECIPE = TrainingConfig(
    cycles=(4,),
    batch_size=3,
    learning_rate=1e-3,
    warmup_steps=1,
    weight_decay=1e-3,
    betas=(0.9, 0.95),
    gradient_clip=1.0,
    ema_power=0.75,
    precision="fp32",
    seed=3,
    encoder_weight_decay=1e-6,
)
SPEC = PolicySpec(
    "push_t_image",
    {"image": IMAGE_FEATURES, "position": 2},
    2,
    DiffusionTransformerConfig(action_dim=2, observation_dim=66, horizon=4, layers=1, heads=2, width=16),
    DiffusionProcess(10),
    VisionConfig({"image": (36, 36)}, (33, 33)),
)

LOW_DIM_SPEC = replace(SPEC, observation={"position": 2}, network=replace(SPEC.network, observation_dim=2), vision=None)


def _windows() -> TrainingWindows:
    frames = torch.linspace(-1, 1, 12)[:, None].expand(-1, 2)
    images = torch.randint(0, 256, (12, 36, 36, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TrainingWindows(frames, -frames, torch.arange(9)[:, None] + torch.arange(4), 2, {"image": images})


def _trainer(folder: Path, config: TrainingConfig = RECIPE) -> Trainer:
    torch.manual_seed(0)
    alphas = torch.from_numpy(SPEC.process.alphas_cumprod())
    return Trainer(build_network(SPEC), _windows(), alphas, config, folder, {})


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = require_exact_resume(_trainer, tmp_path, saved=2, killed=3)
    _, encoder = network_parts(whole.network)
    _, fresh = network_parts(_trainer(tmp_path / "fresh").network)
    assert encoder is not None
    assert fresh is not None
    # Every weight of the encoder learns, and its average lags behind.
    for (name, trained), untrained in zip(encoder.named_parameters(), fresh.parameters(), strict=True):
        assert not torch.equal(trained, untrained), name
    averaged = dict(whole.ema.named_parameters())["obs_encoder.obs_nets.image.nets.3.weight"]
    assert not torch.equal(averaged, encoder.obs_nets["image"].nets[3].weight)


def test_batch_has_the_observed_images_as_bytes() -> None:
    windows = _windows()
    observation, actions = windows.batch(torch.tensor([5, 0]))
    assert isinstance(observation, HybridObservation)
    assert (observation.low_dim.shape, actions.shape) == ((2, 2, 2), (2, 4, 2))
    assert observation.images["image"].dtype == torch.uint8
    assert torch.equal(observation.images["image"][0], windows.images["image"][5:7])


def test_noise_draws_share_what_the_encoder_made_of_an_observation(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, replace(RECIPE, noise_draws=2))
    assert isinstance(trainer.network, HybridNetwork)
    encoded: list[torch.Tensor] = []
    given: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    trainer.network.obs_encoder.register_forward_hook(lambda *made: encoded.append(made[2]))
    trainer.network.model.register_forward_pre_hook(lambda _, asked: given.append(asked))
    next(trainer.run())
    ((tokens,), ((sample, timestep, condition),)) = encoded, given
    assert (len(tokens), len(sample)) == (3, 6)
    assert torch.equal(condition, torch.cat([tokens, tokens]))
    # Strata of ten time steps over six rows: the two of each window are half of all steps apart, or one less or more.
    assert ((timestep[3:] - timestep[:3] - 5).abs() <= 1).all()
    assert not torch.equal(sample[:3], sample[3:])


def test_encoder_decays_apart(tmp_path: Path) -> None:
    config = replace(RECIPE, weight_decay=0.5, encoder_weight_decay=0.25)
    trainer = _trainer(tmp_path, config)
    assert isinstance(trainer.network, HybridNetwork)
    decay = {id(p): group["weight_decay"] for group in trainer._optimizer.param_groups for p in group["params"]}
    assert {decay[id(p)] for p in trainer.network.obs_encoder.parameters()} == {0.25}
    assert {decay[id(p)] for p in trainer.network.model.parameters() if p.ndim == 2} == {0.5}
    assert len(decay) == len(list(trainer.network.parameters()))


@pytest.mark.parametrize("spec", [SPEC, LOW_DIM_SPEC], ids=["image", "low-dim"])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ],
)
def test_bf16_trains_and_resumes_on_every_device(device: str, spec: PolicySpec, tmp_path: Path) -> None:
    config = replace(RECIPE, cycles=(2,), precision="bf16")
    windows = _windows() if spec.vision is not None else replace(_windows(), images={})

    def trainer(folder: Path) -> Trainer:
        torch.manual_seed(0)
        alphas = torch.from_numpy(spec.process.alphas_cumprod())
        return Trainer(build_network(spec).to(device), windows.to(device), alphas, config, folder, {})

    losses = [progress.loss for progress in trainer(tmp_path / "whole").run()]
    killed = trainer(tmp_path / "killed")
    before = [progress.loss for progress in killed.run(until=1)]
    killed.save()
    resumed = trainer(tmp_path / "killed")
    assert resumed.resume()
    after = [progress.loss for progress in resumed.run()]
    # bf16 keeps 8 bits of a number, and a GPU adds in any order.
    assert before + after == pytest.approx(losses, rel=0.02)
    assert (len(before), len(after), resumed.step) == (1, 1, 2)
    for parameter in (*resumed.network.parameters(), *resumed.ema.parameters()):
        assert (parameter.device.type, parameter.dtype) == (device, torch.float32)
    assert resumed._optimizer.state_dict()["state"][0]["step"] == 2
