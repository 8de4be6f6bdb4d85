"""A run while it runs: its processes, the ranks, the loop, what rank 0 alone has, checkpoints and restarts."""
