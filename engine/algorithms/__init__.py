"""From groups of rollouts to losses: advantages, pairs, and one file an algorithm. Arithmetic only; no device, no groups of
processes."""
