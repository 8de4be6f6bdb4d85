"""The inference pool: `vllm_engine` is one engine in its own process, `pool` all of them as one, `sampling` the requests."""
