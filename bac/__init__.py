"""Block-wise Adaptive Caching for diffusion policies.

import bac
from policies import load_policy

policy = load_policy("push_t")
fast = bac.accelerate(policy, schedule="bac_weighted-s10")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bac.errors import BacError

if TYPE_CHECKING:
    from bac.acceleration import accelerate, attach, build_executor, detach
    from bac.plan import Plan
    from bac.profile import FeatureProfile
    from bac.schedule import CacheSchedule

__all__ = ["BacError", "CacheSchedule", "FeatureProfile", "Plan", "accelerate", "attach", "build_executor", "detach"]

# Found at first use: bac.control runs on robots' computers and in test suites that have no torch.
_HOMES = {
    "accelerate": "bac.acceleration",
    "attach": "bac.acceleration",
    "build_executor": "bac.acceleration",
    "detach": "bac.acceleration",
    "Plan": "bac.plan",
    "FeatureProfile": "bac.profile",
    "CacheSchedule": "bac.schedule",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bac' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
