"""What a training run is of, so that no other run goes on from its state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from policies.base import PolicySpec


def training_identity(spec: PolicySpec, least_range: float, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return what a training run is of, besides its recipe: name -> SHA-256 (hex).

    Args:
        spec: of the policy.
        least_range: of its normalisers.
        arrays: the raw demonstrations by name, any dtypes and shapes.
    """
    # The order of the observation's keys decides the network's inputs, so that it is kept.
    values = {"policy": asdict(spec), "least_range": least_range}
    identity = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in values.items()}
    for name, array in arrays.items():
        total = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
        identity[name] = total.hexdigest()
    return identity
