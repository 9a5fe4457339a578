from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from bac.executors import ExecutorKind, WeightType
from bac.memory import peak_memory
from bac.schedule import CacheSchedule
from policies.benchmark import executor_rows, row_memory
from policies.loading import load_policy

MEGABYTE = 2**20


def test_peak_is_what_the_work_adds() -> None:
    # The kernel counts pages in batches, so a little may be missing.
    assert 60 * MEGABYTE <= peak_memory(partial(np.full, 8 * MEGABYTE, 1.0)) < 80 * MEGABYTE


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        (ExecutorKind.EAGER, WeightType.FP32),
        (ExecutorKind.COMPILED, WeightType.FP32),
        (ExecutorKind.COMPILED, WeightType.BF16),
        (ExecutorKind.ONNX, WeightType.FP32),
    ],
)
def test_an_executor_needs_at_most_twice_its_weights_and_a_little(kind: ExecutorKind, weights: WeightType) -> None:
    policy = load_policy("push_t")
    schedule = CacheSchedule.load(policy.schedules / "bac-s10.json")
    (row,) = executor_rows(policy, {"BAC": schedule}, kind, weights)
    size = sum(parameter.nbytes for parameter in policy.checkpoint.network.parameters())
    assert row_memory(row, partial(load_policy, "push_t")) <= 2 * size + 64 * MEGABYTE
