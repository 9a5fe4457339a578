"""Simulated tasks as gymnasium environments, their demonstrations and the episode loop."""
