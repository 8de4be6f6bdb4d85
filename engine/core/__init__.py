"""What every package may use and what uses nothing of ours: records, typed errors, counted seeds, files."""
