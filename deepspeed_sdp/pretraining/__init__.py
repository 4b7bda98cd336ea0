"""Pretraining runs: recipes, their length, the loop, and the figures of a run."""
