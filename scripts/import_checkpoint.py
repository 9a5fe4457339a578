"""Convert an original ``.ckpt`` to ours: ``python scripts/import_checkpoint.py source=x.ckpt weights=ema``."""

from __future__ import annotations

from pathlib import Path

from configs.entry import script
from configs.schema import ImportConfig
from configs.tasks import require_task
from policies.checkpoint import save_checkpoint
from policies.loading import CHECKPOINT_FILE, import_original
from policies.original_task import OriginalTask


def main(config: ImportConfig, folder: Path) -> None:
    """Convert and write into ``folder``; calibrate and evaluate with ``checkpoint=<that file>``."""
    vision = config.task.vision
    task = OriginalTask(config.task.name, config.task.observation, {} if vision is None else vision.images)
    checkpoint = import_original(config.source, weights=config.weights, task=task)
    require_task(config.task, checkpoint.spec)
    save_checkpoint(checkpoint, folder / CHECKPOINT_FILE)
    print(f"wrote {folder / CHECKPOINT_FILE}, digest {checkpoint.digest[:12]}")


if __name__ == "__main__":
    script("import_checkpoint", ImportConfig)(main)()
