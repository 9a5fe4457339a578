"""What the studies share: rows built, timed in turn, and shown as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bac.errors import Unavailable, sentence
from bac.timing import Latency, device_synchroniser, measure_interleaved
from configs.studies import BenchConfig
from policies.benchmark import Row, StartedRow, noise_of, start
from policies.diffusion_policy import DiffusionPolicy
from studies.torchvision_ops import make_torchvision_importable

REFERENCE = "reference"


def wanted(config: BenchConfig, row: Row) -> bool:
    """Return whether ``only`` asks for a row; it always asks for the reference."""
    return config.only is None or row.name == REFERENCE or any(part in row.name for part in config.only)


def require_package(what: str, module: str, package: str) -> Any:
    """Import what some rows alone need.

    Raises:
        Unavailable: the package is not here, or something it imports is not.
    """
    make_torchvision_importable()
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # diffusers raises a RuntimeError for what its lazy imports miss
        raise Unavailable(
            sentence(what, expected=f"the package {package}", got=one_line(error), mend=f"pip install {package}")
        ) from error


def one_line(error: Exception) -> str:
    """Return what somebody else's error says, on one line."""
    return " ".join(str(error).split()) or "nothing more"


def started(rows: Iterable[Row], policy: DiffusionPolicy) -> tuple[list[StartedRow], dict[str, str]]:
    """Build what this machine can; say of the others why not."""
    built, missing = [], {}
    for row in tqdm(list(rows), desc="build", unit="row"):
        try:
            built.append(start(row, policy))
        except Unavailable as reason:
            missing[row.name] = str(reason)
    return built, missing


def timed(
    config: BenchConfig, policy: DiffusionPolicy, rows: Sequence[StartedRow], observed: Tensor, title: str
) -> dict[str, Latency]:
    """Time all rows in turn on normalised observations float32[B, To, Do]."""
    noises = {steps: noise_of(policy, steps, len(observed)) for steps in {each.row.steps for each in rows}}
    with tqdm(total=len(rows) * config.calls, desc=title, unit="chunk") as bar:
        return measure_interleaved(
            {each.row.name: partial(each.denoise, observed, noises[each.row.steps]) for each in rows},
            calls=config.calls,
            warmup=config.warmup,
            limit_s=config.table_s,
            synchronise=device_synchroniser(torch.device(config.device)),
            on_call=bar.update,
        )


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
