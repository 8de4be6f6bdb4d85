"""Weight sync: trainer shards become engine weights. `plan` says what goes where, `transports` how bytes travel, `exchange`
what each member does, `checksum` proves it; `sender` is the trainer's side and the transaction, `inference.receiver` vLLM's."""
