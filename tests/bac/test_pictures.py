"""Pictures show the numbers they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toys import random_profile, random_schedule

from bac.pictures import gate_map, save_figure, schedule_grid, similarity_maps
from bac.profile import Metric


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L1])
def test_similarity_maps_show_every_block(metric: Metric) -> None:
    profile, schedule = random_profile(seed=0), random_schedule(0, steps=7)
    figure = similarity_maps(profile, metric, schedule)
    # A row of the figure per kind, so axes of one layer stand below each other.
    order = [0, 3, 1, 4, 2, 5]
    assert [axis.get_title() for axis in figure.axes] == [str(profile.blocks[block]) for block in order]
    for axis, block in zip(figure.axes, order, strict=True):
        assert np.array_equal(axis.images[0].get_array(), profile.values[metric][block])
        assert axis.lines[0].get_xdata().tolist() == np.flatnonzero(schedule.mask[block]).tolist()
    figure.clear()


def test_schedule_grid_is_dark_where_blocks_update(tmp_path: Path) -> None:
    schedule = random_schedule(1)
    figure = schedule_grid(schedule)
    assert np.array_equal(figure.axes[0].images[0].get_array(), ~schedule.mask)
    assert f"{schedule.updates} of 72 block updates" in figure.axes[0].get_title()
    save_figure(figure, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_gate_map_shows_the_gates() -> None:
    profile = random_profile(seed=0)
    gates = np.random.default_rng(0).random((len(profile.blocks), 7))
    axis = gate_map(gates, profile.blocks).axes[0]
    assert np.array_equal(axis.images[0].get_array(), gates)
    assert [label.get_text() for label in axis.get_yticklabels()] == [str(block) for block in profile.blocks]
