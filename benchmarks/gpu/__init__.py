"""Everything that one GPU can show, in one command of less than nine minutes: ``make gpu`` (docs/gpu.md)."""
