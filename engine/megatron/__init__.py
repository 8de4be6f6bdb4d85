"""The trainer: Llama on megatron-core over tensor, pipeline and data parallel ranks. It samples and scores nothing."""
