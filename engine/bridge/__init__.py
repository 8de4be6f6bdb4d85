"""Weight sync: trainer shards become engine weights. `plan` says what goes where, `transport` how bytes travel, `exchange` what
each member does, `digest` proves it; `publish` is the trainer's side and the transaction, `receive` vLLM's."""
