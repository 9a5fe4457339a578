"""What a run computes on: a device by its name and a number of CPU threads, refused where there are no such."""

from __future__ import annotations

import torch

from bac.errors import InvalidInput, Unavailable, sentence


def usable_device(name: torch.device | str) -> torch.device:
    """Return the device of that name: ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        InvalidInput: there is no such kind of device.
        Unavailable: this machine, or this torch, does not have it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda"}:
        raise InvalidInput(sentence("device", expected="cpu, cuda or cuda:N", got=name, mend="choose one of these"))
    count = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise Unavailable(
            sentence(
                f"device {name}",
                expected="a CUDA device that torch can use",
                got=f"{count} of them",
                mend="use device=cpu, or install a torch with CUDA and its driver",
            )
        )
    return device


def use_threads(count: int | None) -> None:
    """Let torch compute on so many CPU threads; None leaves its choice.

    Raises:
        InvalidInput: fewer than 1.
    """
    if count is None:
        return
    if count < 1:
        raise InvalidInput(sentence("threads", expected="at least 1", got=count, mend="correct the override"))
    torch.set_num_threads(count)
