"""torchvision beside a torch of another build, where its own library does not load.

diffusers imports it without drawing a box; that it has no operators then stops the import alone.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

_REGISTERED = ("nms", "qnms")
"""What torchvision gives shapes to when it is imported, whether they exist or not."""


@cache
def make_torchvision_importable() -> Any:
    """Declare the missing operators, without what they do, if torchvision is installed and cannot be imported.

    Returns:
        What holds the declarations, or None; nothing needs it.
    """
    if find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    else:
        return None
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in _REGISTERED:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
