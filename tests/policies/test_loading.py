from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bac.errors import InvalidInput, MissingArtefact
from policies import loading
from policies.checkpoint import load_checkpoint, save_checkpoint
from policies.loading import import_original, load_policy, locate_checkpoint, profile_path, schedule_folder
from policies.original_checkpoint import OriginalCheckpoint, OriginalDiffusion
from policies.samplers import ddim
from tests.policies.networks import KEYS, observation, small_checkpoint

DIFFUSION = OriginalDiffusion(
    num_train_timesteps=10,
    beta_start=1e-4,
    beta_end=2e-2,
    beta_schedule="squaredcos_cap_v2",
    prediction_type="epsilon",
    clip_sample=True,
    variance_type="fixed_small",
)


def test_checkpoint_path_gives_a_policy_with_its_artefacts_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_checkpoint(small_checkpoint(), path)
    policy = load_policy(path, sampler=lambda process: ddim(process, 5))
    assert policy.sampler.name == "ddim-5-trailing"
    assert policy.schedules == schedule_folder(path, policy.sampler) == tmp_path / "schedules" / "ddim-5-trailing"
    assert profile_path(path, policy.sampler) == tmp_path / "profiles" / "ddim-5-trailing.zarr.zip"
    assert policy.predict(observation(2)).shape == (2, 4, 2)


def test_shipped_task_wins_over_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "pretrained" / "push_t" / "checkpoint.safetensors"
    save_checkpoint(small_checkpoint(), shipped)
    monkeypatch.setattr(loading, "PRETRAINED", tmp_path / "pretrained")
    assert locate_checkpoint("push_t") == shipped
    with pytest.raises(MissingArtefact, match=r"a file or one of \['push_t'\], got lift"):
        locate_checkpoint("lift")


def test_original_checkpoint_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "latest.ckpt").touch()
    with pytest.raises(InvalidInput, match=r"convert it with scripts/import_checkpoint\.py"):
        load_policy(tmp_path / "latest.ckpt")


def _pretend_original(monkeypatch: pytest.MonkeyPatch, diffusion: OriginalDiffusion) -> SimpleNamespace:
    """Let the reader return an original with our small checkpoint's weights; the reader has its own tests."""
    ours = small_checkpoint()
    asked = SimpleNamespace(weights=None, checkpoint=ours)

    def read(path: str, *, weights: str) -> OriginalCheckpoint:
        asked.weights = weights
        normalizers = {"obs": ours.observation_normalizer, "action": ours.action_normalizer}
        return OriginalCheckpoint(
            {}, ours.network.state_dict(), normalizers, ours.spec.network, ours.spec.action_steps, diffusion
        )

    monkeypatch.setattr(loading, "read_original_checkpoint", read)
    return asked


def test_converted_original_predicts_as_its_weights_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _pretend_original(monkeypatch, DIFFUSION)
    converted = import_original("x.ckpt", weights="raw", task="push_t", observation=KEYS)
    assert asked.weights == "raw"
    assert converted.spec == asked.checkpoint.spec
    save_checkpoint(converted, tmp_path / "checkpoint.safetensors")
    assert load_checkpoint(tmp_path / "checkpoint.safetensors").digest == asked.checkpoint.digest


@pytest.mark.parametrize("change", [{"beta_schedule": "linear"}, {"prediction_type": "sample"}, {"clip_sample": False}])
def test_original_with_another_diffusion_process_refuses(
    change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_original(monkeypatch, replace(DIFFUSION, **change))
    with pytest.raises(InvalidInput, match=r"diffusion of x\.ckpt"):
        import_original("x.ckpt", weights="ema", task="push_t", observation=KEYS)


def test_original_with_other_observation_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_original(monkeypatch, DIFFUSION)
    with pytest.raises(InvalidInput, match="observation keys: expected 5 channels"):
        import_original("x.ckpt", weights="ema", task="push_t", observation={"keypoints": 3})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_policy_on_a_gpu_agrees_with_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_checkpoint(small_checkpoint(), path)
    keys = [(0, 0), (1, 0)]
    on_gpu, on_cpu = (load_policy(path, device=device).predict(observation(2), keys) for device in ("cuda", "cpu"))
    # Pixels of a 512 table: 1e-4 of the range, for float32 products summed in another order over 10 steps.
    assert abs(on_gpu - on_cpu).max() < 0.05
