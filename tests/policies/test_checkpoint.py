from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bac.errors import CorruptArtefact, MissingArtefact
from policies.checkpoint import PolicyCheckpoint, load_checkpoint, save_checkpoint
from policies.loading import load_policy
from tests.policies.networks import small_checkpoint


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PolicyCheckpoint, Path]:
    checkpoint = small_checkpoint()
    save_checkpoint(checkpoint, tmp_path / "checkpoint.safetensors")
    return checkpoint, tmp_path / "checkpoint.safetensors"


def test_round_trip_keeps_every_bit(saved: tuple[PolicyCheckpoint, Path]) -> None:
    checkpoint, path = saved
    loaded = load_checkpoint(path)
    assert loaded.digest == checkpoint.digest
    assert loaded.spec == checkpoint.spec
    for name, tensor in checkpoint.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor), name
    assert torch.equal(loaded.action_normalizer.scale, checkpoint.action_normalizer.scale)
    assert torch.equal(loaded.observation_normalizer.offset, checkpoint.observation_normalizer.offset)


def test_half_precision_has_its_own_digest(tmp_path: Path) -> None:
    checkpoint = small_checkpoint()
    save_checkpoint(checkpoint, tmp_path / "half.safetensors", torch.float16)
    loaded = load_checkpoint(tmp_path / "half.safetensors")
    assert loaded.digest != checkpoint.digest
    # Statistics stay float32: half precision would move every action by up to a quarter pixel.
    assert torch.equal(loaded.action_normalizer.scale, checkpoint.action_normalizer.scale)


def test_digest_tells_weights_apart() -> None:
    assert small_checkpoint(0).digest == small_checkpoint(0).digest != small_checkpoint(1).digest


def test_missing_file_refuses(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefact, match=r"checkpoint: expected a file .*none\.safetensors"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_unknown_task_names_the_shipped_ones() -> None:
    with pytest.raises(MissingArtefact, match="push_t"):
        load_policy("push_tea")


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_truncated_file_refuses(saved: tuple[PolicyCheckpoint, Path], keep: float) -> None:
    _, path = saved
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    with pytest.raises(CorruptArtefact, match="expected a whole bac-policy-1 file"):
        load_checkpoint(path)


def test_foreign_safetensors_refuses(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CorruptArtefact, match="KeyError 'format None'"):
        load_checkpoint(tmp_path / "other.safetensors")


def _tamper(path: Path, change: dict[str, torch.Tensor | None]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"network.head.bias": torch.tensor([0.0, torch.nan])}, "NaN or infinite weights in .*head.bias"),
        ({"network.head.bias": None}, "Missing key.*head.bias"),
        ({"network.head.extra": torch.zeros(1)}, "Unexpected key.*head.extra"),
        ({"network.head.bias": torch.zeros(3)}, "size mismatch for head.bias"),
        ({"action.scale": None}, "action.scale"),
        ({"action.scale": torch.tensor([1.0, torch.nan])}, "normaliser statistics"),
    ],
)
def test_damaged_content_refuses(
    saved: tuple[PolicyCheckpoint, Path], change: dict[str, torch.Tensor | None], told: str
) -> None:
    _, path = saved
    _tamper(path, change)
    with pytest.raises(CorruptArtefact, match=told):
        load_checkpoint(path)


def test_failed_write_keeps_the_older_file(
    saved: tuple[PolicyCheckpoint, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, path = saved

    def die_midway(tensors: object, partial: Path, metadata: object) -> None:
        Path(partial).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("policies.checkpoint.save_file", die_midway)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(small_checkpoint(1), path)
    assert load_checkpoint(path).digest == checkpoint.digest
    assert list(path.parent.iterdir()) == [path]
