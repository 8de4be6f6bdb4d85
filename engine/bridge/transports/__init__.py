"""How bytes of a weight sync travel: gloo, NCCL, the memory of one machine; where members meet."""
