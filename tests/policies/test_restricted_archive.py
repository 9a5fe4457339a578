"""Files that are hostile, cut short, damaged or foreign: refused, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import dill
import pytest
import torch

from bac.errors import CorruptArtefact
from policies.original_checkpoint import read_original_checkpoint
from tests.policies.original_payloads import Payload, changed, original_payload, save


def _zip_of(path: Path, data: bytes) -> Path:
    """A torch zip file around a hand-written pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return path


@pytest.fixture(scope="module")
def payload() -> Payload:
    return original_payload()


@pytest.fixture(scope="module")
def genuine(payload: Payload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("genuine") / "latest.ckpt", payload)


class _Evil:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self._call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def _write_marker(marker: str) -> Callable[[], object]:
    return lambda: Path(marker).touch()


@pytest.mark.parametrize(
    ("named", "evil"),
    [
        ("posix.system", lambda marker: _Evil(os.system, f"touch {marker}")),
        ("eval", lambda marker: _Evil(eval, f"open({marker!r}, 'w')")),
        ("exec", lambda marker: _Evil(exec, f"open({marker!r}, 'w')")),
        ("getattr", lambda marker: _Evil(getattr, os, "system")),
        ("open", lambda marker: _Evil(open, marker, "w")),
        ("dill._dill", _write_marker),
    ],
    ids=["system", "eval", "exec", "getattr", "open", "lambda"],
)
def test_evil_object_is_named_and_not_run(tmp_path: Path, named: str, evil: Callable[[str], object]) -> None:
    marker = tmp_path / "executed"
    path = changed(tmp_path, lambda payload: payload["pickles"].update(x=evil(str(marker))))
    with pytest.raises(CorruptArtefact, match=named):
        read_original_checkpoint(path, weights="ema")
    assert not marker.exists()


@pytest.mark.parametrize("place", ["cfg", "state_dicts", "unheard_of"])
def test_evil_object_is_refused_anywhere(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "executed"
    path = changed(tmp_path, lambda payload: payload.update({place: _Evil(os.system, f"touch {marker}")}))
    with pytest.raises(CorruptArtefact, match=r"posix\.system"):
        read_original_checkpoint(path, weights="ema")
    assert not marker.exists()


def test_the_evil_object_would_have_run(tmp_path: Path) -> None:
    """Guards the test above against evil that is harmless by mistake."""
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(_Evil(open, str(marker), "w"))).close()
    assert marker.exists()


_HAND_WRITTEN = {
    "os.system by INST": b"(S'touch MARKER'\nios\nsystem\n.",
    "builtins.eval by STACK_GLOBAL": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x01x\x85R.",
    "dill._dill._eval_repr": b"cdill._dill\n_eval_repr\n(S'1'\ntR.",
    "functools.partial": b"cfunctools\npartial\n(tR.",
    "collections.OrderedDict.fromkeys": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
    "torch.load": b"ctorch\nload\n.",
    "torch.storage._load_from_bytes": b"ctorch.storage\n_load_from_bytes\n(C\x01xtR.",
}


@pytest.mark.parametrize("data", _HAND_WRITTEN.values(), ids=_HAND_WRITTEN.keys())
def test_hand_written_pickle_is_named_and_refused(tmp_path: Path, data: bytes, request: pytest.FixtureRequest) -> None:
    marker = tmp_path / "executed"
    path = _zip_of(tmp_path / "evil.ckpt", data.replace(b"MARKER", str(marker).encode()))
    with pytest.raises(CorruptArtefact, match=request.node.callspec.id.split(" ")[0]):
        read_original_checkpoint(path, weights="ema")
    assert not marker.exists()


def test_types_that_dill_hands_out_cannot_be_called(tmp_path: Path) -> None:
    data = b"cdill._dill\n_load_type\n(S'DictType'\ntR(tR."
    with pytest.raises(CorruptArtefact, match="not callable"):
        read_original_checkpoint(_zip_of(tmp_path / "evil.ckpt", data), weights="ema")


@pytest.mark.parametrize(
    "known",
    [
        b"ccollections\nOrderedDict\n",
        b"comegaconf.nodes\nAnyNode\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"c_codecs\nencode\n",
        b"ctorch\nFloatStorage\n",
    ],
)
@pytest.mark.parametrize("state", [b"N}S'mark'\nI1\ns\x86b.", b"}S'mark'\nI1\nsb."], ids=["slots", "attributes"])
def test_no_file_can_alter_what_the_next_one_meets(tmp_path: Path, genuine: Path, known: bytes, state: bytes) -> None:
    with pytest.raises(CorruptArtefact, match="pickle"):
        read_original_checkpoint(_zip_of(tmp_path / "evil.ckpt", known + state), weights="ema")
    read_original_checkpoint(genuine, weights="ema")


def test_values_of_pickles_are_never_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    def hide(payload: Payload) -> None:
        payload["pickles"]["epoch"] = dill.dumps(_Evil(open, str(marker), "w"))

    read_original_checkpoint(changed(tmp_path, hide), weights="ema")
    assert not marker.exists()


def test_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    def swell(payload: Payload) -> None:
        policy = payload["state_dicts"]["ema_model"]
        policy["model.head.weight"] = torch.zeros(1).expand(2, 32)

    with pytest.raises(CorruptArtefact, match=r"head\.weight"):
        read_original_checkpoint(changed(tmp_path, swell), weights="ema")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(genuine: Path, tmp_path: Path, kept: float) -> None:
    whole = genuine.read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CorruptArtefact, match="whole zip file"):
        read_original_checkpoint(path, weights="ema")


def test_flipped_bytes_of_a_weight_are_refused(genuine: Path, tmp_path: Path, payload: Payload) -> None:
    weight = payload["state_dicts"]["ema_model"]["model.head.weight"].numpy().tobytes()
    whole = genuine.read_bytes()
    assert whole.count(weight) == 1
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(whole.replace(weight, weight[::-1]))
    with pytest.raises(CorruptArtefact, match="CRC"):
        read_original_checkpoint(path, weights="ema")


def test_damaged_table_of_contents_is_refused(genuine: Path, tmp_path: Path) -> None:
    whole = genuine.read_bytes()
    last = whole.rindex(b"/data/1")
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(whole[:last] + b"\xff" + whole[last + 1 :])
    with pytest.raises(CorruptArtefact, match="zip"):
        read_original_checkpoint(path, weights="ema")


def test_text_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "readme.ckpt"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CorruptArtefact, match="zip"):
        read_original_checkpoint(path, weights="ema")


def test_zip_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(CorruptArtefact, match=r"data\.pkl"):
        read_original_checkpoint(path, weights="ema")


def test_compressed_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + bytes(1000))
    with pytest.raises(CorruptArtefact, match="a compressed one"):
        read_original_checkpoint(path, weights="ema")


def test_other_byte_order_is_refused(tmp_path: Path) -> None:
    path = _zip_of(tmp_path / "big.ckpt", b"}.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(CorruptArtefact, match="little-endian"):
        read_original_checkpoint(path, weights="ema")


def test_every_error_is_one_line(tmp_path: Path) -> None:
    path = _zip_of(tmp_path / "evil.ckpt", b"\x80\x04\x8c\x04a\nb\x1b\x8c\x01c\x93.")
    with pytest.raises(CorruptArtefact) as refusal:
        read_original_checkpoint(path, weights="ema")
    assert "\n" not in str(refusal.value)
    assert "\x1b" not in str(refusal.value)
