"""The studies of ``scripts/bench.py``, one file each: ``run(config, folder)`` measures, draws and writes."""
