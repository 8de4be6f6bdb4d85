"""What the policy measures of an optimizer step beside its loss's own metrics. Declarations alone: no megatron here."""

from __future__ import annotations

from engine.core.metrics import Metric

LOSS = Metric("loss", "of the step, over all microbatches and ranks", title="loss", reduce="sum", peers={"TRL": "loss"})
GRAD_NORM = Metric(
    "grad_norm",
    "norm of the gradient before clipping",
    title="grad norm",
    peers={"TRL": "grad_norm", "verl": "actor/grad_norm"},
)
LEARNING_RATE = Metric(
    "learning_rate",
    "AdamW's in this step",
    title="learning rate",
    peers={"TRL": "learning_rate", "verl": "actor/lr"},
)
NUM_TOKENS = Metric(
    "num_tokens",
    "computed: of all packed rows, prompts and padding included, a prompt that samples of a row share once",
    unit="tokens",
    reduce="sum",
)
SHARED = Metric(
    "shared_token_share",
    "of the prompts and completions trained on, tokens that were not computed since samples shared their prompt",
    unit="share",
)
UPDATED = Metric("updated", "1 where AdamW moved the weights, 0 where the gradient was 0 and the step moved nothing")
METRICS = (LOSS, GRAD_NORM, LEARNING_RATE, UPDATED, NUM_TOKENS, SHARED)
