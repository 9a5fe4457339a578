"""Pictures of what the methods work on: similarity maps, sensitivity of steps, gates of a router, schedule grids."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np

from bac.files import write_whole
from bac.profile import FeatureProfile, Metric
from bac.schedule import CacheSchedule
from bac.trunk import Block

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

_KINDS = 3


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=120, bbox_inches="tight"))
    plt.close(figure)


def plain_log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic with ticks at 1, 2 and 5 times the powers of ten, written out."""
    if which == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def similarity_maps(profile: FeatureProfile, metric: Metric, schedule: CacheSchedule | None = None) -> Figure:
    """Draw every block's K x K map, a row per layer; with a schedule, its update steps as ticks on the diagonal."""
    layers = len(profile.blocks) // _KINDS
    figure, axes = plt.subplots(_KINDS, layers, figsize=(1.6 * layers, 5.2), squeeze=False, layout="constrained")
    for row, block in enumerate(profile.blocks):
        axis = axes[row % _KINDS, row // _KINDS]
        values = profile.values[metric][row]
        axis.imshow(
            values, cmap="magma" if metric is Metric.COSINE else "magma_r", vmin=values.min(), vmax=values.max()
        )
        if schedule is not None:
            updates = np.flatnonzero(schedule.mask[row])
            axis.plot(updates, updates, "|", color="cyan", markersize=5)
        axis.set_title(str(block), fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(
        f"{metric} between denoising steps (noisiest top left), {profile.observations} observations", fontsize=10
    )
    return figure


def schedule_grid(schedule: CacheSchedule) -> Figure:
    """Draw the schedule: a row per block, a column per step, dark where the block updates, grey where in part."""
    figure, axis = plt.subplots(figsize=(10, 0.2 * len(schedule.blocks) + 1), layout="constrained")
    axis.imshow(1 - schedule.share, cmap="gray", aspect="auto", interpolation="none", vmin=0, vmax=1.15)
    axis.set_yticks(range(len(schedule.blocks)), [str(block) for block in schedule.blocks], fontsize=7)
    axis.set_xlabel("denoising step (0 is the noisiest)")
    share = float(schedule.share.mean())
    axis.set_title(
        f"{schedule.method}: {schedule.updates} of {schedule.mask.size} block updates ({share:.0%})", fontsize=10
    )
    return figure


def sensitivity_curve(sensitivity: np.ndarray) -> Figure:
    """Draw float[K], the gain from the noise estimate of each step to the executed actions."""
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    axis.semilogy(np.arange(len(sensitivity)), sensitivity, "o-", markersize=3)
    axis.set(xlabel="denoising step (0 is the noisiest)", ylabel="gain to the actions")
    axis.set_title("how much of an error in a step's noise estimate reaches the actions", fontsize=10)
    return figure


def gate_map(gates: np.ndarray, blocks: tuple[Block, ...]) -> Figure:
    """Draw float[blocks, K] in [0, 1], a learned router's gates: a row per block, a column per step."""
    figure, axis = plt.subplots(figsize=(10, 0.2 * len(blocks) + 1), layout="constrained")
    image = axis.imshow(gates, cmap="viridis", aspect="auto", interpolation="none", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="gate")
    axis.set_yticks(range(len(blocks)), [str(block) for block in blocks], fontsize=7)
    axis.set_xlabel("denoising step (0 is the noisiest)")
    axis.set_title("learned gates: what each update is worth to the actions", fontsize=10)
    return figure
