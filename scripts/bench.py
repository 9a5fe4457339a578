"""Measure speed: ``python scripts/bench.py task=push_t study=latency``; the studies are in ``scripts/studies``.

``study=latency`` times chunks, ms; ``study=realtime`` plots the score against their latency.
"""

from __future__ import annotations

from pathlib import Path

from studies import evaluated, growth, latency, pareto, peers, realtime, tried, wallclock

from bac.choices import choice
from bac.device import usable_device, use_threads
from configs.entry import script
from configs.studies import BenchConfig, Study

_STUDIES = {
    Study.LATENCY: latency.run,
    Study.GROWTH: growth.run,
    Study.TRIED: tried.run,
    Study.PARETO: pareto.run,
    Study.PEERS: peers.run,
    Study.REALTIME: realtime.run,
    Study.WALLCLOCK: wallclock.run,
    Study.EVALUATED: evaluated.run,
}


def main(config: BenchConfig, folder: Path) -> None:
    """Run a study; write tables, plots and JSON into ``folder``."""
    study = _STUDIES[choice("study", config.study, Study)]
    usable_device(config.device)
    use_threads(config.threads)
    list(config.chosen_executors())  # a misspelt one refuses now and not where its rows begin
    study(config, folder)


if __name__ == "__main__":
    script("bench", BenchConfig)(main)()
