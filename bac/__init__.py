"""Block-wise Adaptive Caching for diffusion policies.

import bac
from policies import load_policy

policy = load_policy("push_t")
fast = bac.accelerate(policy, schedule="bac_weighted-s10")
"""

from bac.accelerate import accelerate, attach, build_executor, detach
from bac.errors import BacError
from bac.plan import Plan
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule

__all__ = ["BacError", "CacheSchedule", "FeatureProfile", "Plan", "accelerate", "attach", "build_executor", "detach"]
