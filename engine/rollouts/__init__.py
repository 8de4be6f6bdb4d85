"""From prompts to the sequences of a step: sources, the batch, the ledger and its replay, what is measured of rollouts."""
