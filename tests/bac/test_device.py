"""Devices and threads that are not there refuse in a sentence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bac.device import usable_device, use_threads
from bac.errors import InvalidInput, Unavailable


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["gpu", "cuda:first", "", "meta"])
def test_an_unknown_device_refuses(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"^device: expected cpu, cuda or cuda:N, got {name}; choose one of these.$"):
        usable_device(name)


@pytest.mark.parametrize(("name", "count", "fine"), [("cuda", 0, False), ("cuda", 1, True), ("cuda:1", 1, False)])
def test_a_device_that_torch_does_not_have_refuses(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int, fine: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if fine:
        assert usable_device(name) == torch.device(name)
    else:
        with pytest.raises(Unavailable, match=f"^device {name}: expected a CUDA device .*, got {count} of them; use"):
            usable_device(name)


def test_threads_are_set_left_or_refused() -> None:
    use_threads(1)
    use_threads(None)
    assert torch.get_num_threads() == 1
    with pytest.raises(InvalidInput, match=r"^threads: expected at least 1, got 0; correct the override\.$"):
        use_threads(0)
    assert usable_device("cpu").type == "cpu"
