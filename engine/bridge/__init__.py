"""Weight sync: trainer shards become engine weights. `publish` is the trainer's side, `receive` vLLM's, `digest` the
proof that they hold the same bits, `channel` the process group between them."""
