"""Convert an original ``.ckpt`` to ours: ``python scripts/import_checkpoint.py source=x.ckpt weights=ema``."""

from __future__ import annotations

from pathlib import Path

from bac.errors import InvalidInput, sentence
from configs.entry import script
from configs.schema import ImportConfig
from policies.checkpoint import save_checkpoint
from policies.loading import CHECKPOINT_FILE, Weights, import_original

_WEIGHTS: dict[str, Weights] = {"ema": "ema", "raw": "raw"}


def main(config: ImportConfig, folder: Path) -> None:
    """Convert and write into ``folder``; calibrate and evaluate with ``checkpoint=<that file>``."""
    if config.weights not in _WEIGHTS:
        raise InvalidInput(
            sentence("weights", expected="ema or raw", got=config.weights, mend="ema is what the original evaluates")
        )
    task = config.task
    checkpoint = import_original(
        config.source,
        weights=_WEIGHTS[config.weights],
        task=task.name,
        observation=task.observation,
        vision=task.vision,
    )
    save_checkpoint(checkpoint, folder / CHECKPOINT_FILE)
    print(f"wrote {folder / CHECKPOINT_FILE}, digest {checkpoint.digest[:12]}")


if __name__ == "__main__":
    script("import_checkpoint", ImportConfig)(main)()
