"""Hydra configurations: YAML values, their typed schema, and what turns both into objects."""
