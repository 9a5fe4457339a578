"""Tests that run side by side (``pytest -n``) share the cores: one thread each, in what they start as well."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything imports torch, which reads it once.
    os.environ["OMP_NUM_THREADS"] = "1"
