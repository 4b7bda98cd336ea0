"""The state of a training: saved, loaded, compared."""
