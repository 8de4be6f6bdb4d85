"""From groups of rollouts to losses: advantages, pairs and objectives. Arithmetic only; no device, no process group."""
