"""The full model in mid-run."""
