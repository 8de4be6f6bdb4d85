"""How many bytes rank 0 deals out at a step (engine/megatron/scatter.py), at most: a function of the configuration. The bytes
lie on its device, as everything that NCCL sends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.capacity.resolved import Resolved

if TYPE_CHECKING:
    from engine.config.load import RunConfig

ID_BYTES, LOG_PROB_BYTES = 4, 4  # of a token
NUMBERS_BYTES = 128  # of a sequence: its place, prompt, group, lengths, advantage, reward and a few values, 8 bytes each


def dealt_bytes(spec: Resolved, *, on_rank_zero: bool) -> int:
    """Of a step's sequences on a rank's device while they are dealt. Every part of a scatter has the size of the largest: on
    rank 0 there is one for each replica, and the one that arrives there; on another rank that alone. None where one rank has
    the whole step."""
    trainer = spec.config.trainer
    if trainer.world_size == 1:
        return 0
    parts = trainer.data_parallel + 1 if on_rank_zero and trainer.data_parallel > 1 else 1
    if spec.source == "supervised":
        sequences = -(-spec.config.sft.sequences_per_step // trainer.data_parallel)
        return parts * sequences * (trainer.microbatch_tokens * ID_BYTES + NUMBERS_BYTES)  # prompt and solution fit a row
    return parts * largest_share_bytes(spec.config, sampled=spec.source != "preferences")


def largest_share_bytes(config: RunConfig, *, sampled: bool) -> int:
    """Of what one replica is sent of a step, where all prompts and completions are as long as they may be. A replica has a
    prompt once, and all that was sampled from it; but where rows share no prompts and the loss compares nothing, each of its
    sequences may be of another prompt, which is counted. `sampled`: rollouts; of preference data, two responses to a prompt,
    only a row is the limit."""
    trainer = config.trainer
    prompts = sum(source.prompts_per_step for source in config.data.sources)
    whole = -(-prompts // trainer.data_parallel)  # prompts of a replica, with all their sequences
    sequences = whole * (config.algorithm.samples_per_prompt if sampled else 2)
    held = whole if trainer.shares_prompts else min(prompts, sequences)
    row = trainer.microbatch_tokens
    completion = min(config.sampling.max_tokens, row) if sampled else row
    return (
        sequences * (completion * (ID_BYTES + LOG_PROB_BYTES) + NUMBERS_BYTES)
        + held * min(config.data.max_prompt_tokens, row) * ID_BYTES
    )
