"""Demonstrations: how they are stored, read and cut into training windows."""
