from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bac.errors import InvalidInput, Mismatch, MissingArtefact
from bac.methods import BlockAdaptive, full_schedule
from bac.profile import Metric
from policies import loading
from policies.checkpoint import load_checkpoint, save_checkpoint
from policies.loading import import_original, load_policy, locate_checkpoint, profile_path, require_free, schedule_path
from policies.samplers import ddim
from tests.policies.networks import observation, small_checkpoint, small_policy
from tests.policies.original_payloads import original_payload, save


def test_checkpoint_path_gives_a_policy_with_its_artefacts_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_checkpoint(small_checkpoint(), path)
    policy = load_policy(path, sampler=lambda process: ddim(process, 5))
    assert policy.sampler.name == "ddim-5-trailing"
    assert policy.schedules == schedule_path(policy, "any").parent == tmp_path / "schedules" / "ddim-5-trailing"
    assert profile_path(policy) == tmp_path / "profiles" / "ddim-5-trailing.zarr.zip"
    assert policy.predict(observation(2)).shape == (2, 4, 2)


def test_shipped_task_wins_over_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "pretrained" / "push_t" / "checkpoint.safetensors"
    save_checkpoint(small_checkpoint(), shipped)
    monkeypatch.setattr(loading, "PRETRAINED", tmp_path / "pretrained")
    assert locate_checkpoint("push_t") == shipped
    with pytest.raises(MissingArtefact, match=r"a file, or a task of the shipped \['push_t'\], got lift"):
        locate_checkpoint("lift")


def test_original_checkpoint_has_artefacts_of_its_own(tmp_path: Path) -> None:
    path = save(tmp_path / "epoch=0050.ckpt", original_payload())
    policy = load_policy(path, sampler=lambda process: ddim(process, 5), weights="raw")
    folder = tmp_path / "epoch=0050.ckpt.calibration" / "raw"
    assert profile_path(policy) == folder / "profiles" / "ddim-5-trailing.zarr.zip"
    assert schedule_path(policy, "bac-s2") == folder / "schedules" / "ddim-5-trailing" / "bac-s2.json"
    assert load_policy(path).checkpoint.digest != policy.checkpoint.digest


def test_a_kept_schedule_is_in_the_way_of_other_parameters_of_its_budget(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_checkpoint(small_checkpoint(), path)
    policy = load_policy(path)
    method = BlockAdaptive(updates=2)
    require_free(method, policy)
    full = full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)
    kept, file = replace(full, method=method.name, parameters=method.parameters), schedule_path(policy, method.label)
    kept.save(file)
    require_free(method, policy)
    require_free(BlockAdaptive(updates=3, metric=Metric.L1), policy)
    other = BlockAdaptive(updates=2, metric=Metric.L1, upstream_blocks=3)
    told = (
        r"bac-s2\.json: expected one made with metric=l1, upstream_blocks=3, got metric=cosine, upstream_blocks=5; del"
    )
    with pytest.raises(Mismatch, match=told):
        require_free(other, policy)
    # Of the checkpoint that lay here before, or torn: nobody can use it.
    replace(kept, provenance=replace(kept.provenance, checkpoint="facade")).save(file)
    require_free(other, policy)
    file.write_text("{")
    require_free(other, policy)


def test_converted_original_is_one_of_ours(tmp_path: Path) -> None:
    converted = import_original(save(tmp_path / "latest.ckpt", original_payload()), weights="raw")
    save_checkpoint(converted, tmp_path / "checkpoint.safetensors")
    loaded = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert (loaded.digest, loaded.spec) == (converted.digest, converted.spec)
    assert loaded.training["weights"] == "raw"


def test_weights_are_no_choice_where_there_is_one_set(tmp_path: Path) -> None:
    save_checkpoint(small_checkpoint(), tmp_path / "mine.safetensors")
    with pytest.raises(InvalidInput, match=r"weights: expected null for a checkpoint of ours, got ema"):
        load_policy(tmp_path / "mine.safetensors", weights="ema")


def test_policy_made_in_memory_has_no_place_for_artefacts() -> None:
    assert small_policy().schedules is None
    with pytest.raises(MissingArtefact, match="policy: expected one loaded from a file"):
        profile_path(small_policy())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_policy_on_a_gpu_agrees_with_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_checkpoint(small_checkpoint(), path)
    keys = [(0, 0), (1, 0)]
    on_gpu, on_cpu = (load_policy(path, device=device).predict(observation(2), keys) for device in ("cuda", "cpu"))
    # Pixels of a 512 table: 1e-4 of the range, for float32 products summed in another order over 10 steps.
    assert abs(on_gpu - on_cpu).max() < 0.05
