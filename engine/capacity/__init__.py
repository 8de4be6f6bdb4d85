"""What a run will take, before anything is started: memory by device, and what a weight sync moves."""
