"""The regimes of a run, one file each: when weights are synchronised, and what follows from it."""
