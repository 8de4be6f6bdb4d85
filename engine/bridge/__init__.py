"""Weight sync: trainer shards become engine weights. `plan` makes a `shard_plan`, which says what goes where; `transports` is
how bytes travel, `exchange` what each member does, `checksum` proves it; `sender` is the trainer's side and the transaction,
`inference.receiver` vLLM's."""
