"""What the training loop, its publisher and its source measure of a step, and the catalogue of everything that a step's record
may hold. Declarations alone: importing this starts nothing.
"""

from __future__ import annotations

from engine.algorithms.dpo import PAIR_WEIGHT
from engine.algorithms.entropy import EntropyBonus
from engine.algorithms.group import GROUPS
from engine.algorithms.nll import NllLoss
from engine.algorithms.registry import make_loss
from engine.config.options import LOSSES, AlgorithmOptions
from engine.core.errors import ConfigError
from engine.core.metrics import Metric, by_name
from engine.megatron import metrics as of_policy
from engine.rollouts import batch as of_batch
from engine.rollouts import metrics as of_rollouts
from engine.rollouts import waves as of_waves

STEP = Metric("step", "optimizer steps before this one")
TARGET_TOKENS = Metric("target_tokens", "that the loss looks at: the completions trained on", unit="tokens")
SYNC_SECONDS = Metric(
    "sync_seconds", "a weight sync, where there was one, until every engine has verified it", title="sync", unit="s"
)
INTERVAL = Metric(
    "interval_steps",
    "with sync.sync_interval = 'auto': s, the steps between the weight syncs before and after this step; only there",
    title="sync interval",
    unit="steps",
)
SYNC_MEBIBYTES = Metric("sync_mebibytes", "sent in it", title="synced", unit="MiB")
SYNC_ATTEMPTS = Metric("sync_attempts", "that it took, where there were several", unit="attempts")
ROLLOUT_SECONDS = Metric(
    "rollout_seconds",
    "colocated: until the rollouts of all steps opened are judged and the engines sleep; only there",
    unit="s",
)
FINISH_SECONDS = Metric(
    "finish_seconds",
    "with sync.lookahead: before a weight sync, until engines have completed what they sample ahead; only there",
    unit="s",
)
EVALUATION_SECONDS = Metric("evaluation_seconds", "the evaluation before the step, where there was one", unit="s")
TRAIN_SECONDS = Metric("train_seconds", "reference, forward, backward and optimizer", unit="s")
SCORE_SECONDS = Metric(
    "score_seconds",
    "of train_seconds: the reference's forward, and the policy's own where groups are split over rows or ranks",
    unit="s",
)
FAILED_CHECKPOINTS = Metric(
    "failed_checkpoints",
    "that could not be written since the run was last started, with checkpoint.on_failure = 'continue', where there are any",
    title="checkpoints that failed",
    unit="checkpoints",
)
UNIX_SECONDS = Metric("unix_seconds", "when the step was done, since 1970 (UTC)", unit="s", peers={"W&B": "_timestamp"})
STEP_SECONDS = Metric("step_seconds", "all of a step but evaluations", title="step", unit="s", peers={"TRL": "step_time"})
TRAINER_IDLE_SHARE = Metric(
    "trainer_idle_share",
    "of step_seconds, waiting for rollouts: wait_seconds, finish_seconds and rollout_seconds",
    title="trainer idle",
    unit="share",
)
TRAINING_TOKENS_PER_SECOND = Metric(
    "training_tokens_per_second",
    "num_tokens over train_seconds: what was computed, so a prompt that samples shared counts once",
    title="training",
    unit="tokens/s",
)
GENERATION_TOKENS_PER_SECOND = Metric(
    "generation_tokens_per_second",
    "generation_tokens over generation_seconds: the pace of engines while they sample, not of the run",
    title="generation",
    unit="tokens/s",
)
METRICS = (
    STEP,
    TARGET_TOKENS,
    SYNC_SECONDS,
    SYNC_MEBIBYTES,
    SYNC_ATTEMPTS,
    INTERVAL,
    FINISH_SECONDS,
    ROLLOUT_SECONDS,
    EVALUATION_SECONDS,
    TRAIN_SECONDS,
    SCORE_SECONDS,
    STEP_SECONDS,
    TRAINER_IDLE_SHARE,
    FAILED_CHECKPOINTS,
    UNIX_SECONDS,
    GENERATION_TOKENS_PER_SECOND,
    TRAINING_TOKENS_PER_SECOND,
)


def catalogue(options: AlgorithmOptions | None = None) -> dict[str, Metric]:
    """Every metric of ours by name, and those of the loss that `options` name. ConfigError where a user's loss gives the name
    of one of ours to something else."""
    ours: dict[str, Metric] = {}
    for name in LOSSES.names:
        algorithm = LOSSES.load(name)
        ours |= by_name(algorithm(algorithm.Options(loss=name)).metrics)
    more = (*EntropyBonus.metrics, *NllLoss.metrics, PAIR_WEIGHT, GROUPS, *of_policy.METRICS)
    found = by_name((*METRICS, *of_rollouts.METRICS, *of_waves.METRICS, *of_batch.METRICS, *ours.values(), *more))
    for metric in make_loss(options).metrics if options is not None else ():
        if found.setdefault(metric.name, metric) != metric:
            raise ConfigError(
                f"algorithm.loss = {options.loss if options else ''!r} must give its metrics names of their own; found "
                f"{metric.name!r}, which is: {found[metric.name].help}: choose another name"
            )
    return found


def groups() -> dict[str, list[str]]:
    """The names of `catalogue()` by what they tell of, under the headings of a report."""
    of_losses = [metric for name in LOSSES.names for metric in LOSSES.load(name)(LOSSES.load(name).Options(loss=name)).metrics]
    parts = {
        "Rollouts": (*of_rollouts.METRICS, *of_waves.METRICS),
        "Prompts and pairs": (*of_batch.METRICS, GROUPS),
        "Loss": (*of_losses, PAIR_WEIGHT, *EntropyBonus.metrics, *NllLoss.metrics),
        "Optimizer and batches": of_policy.METRICS,
        "Time and speed": METRICS,
    }
    return {heading: list(dict.fromkeys(metric.name for metric in metrics)) for heading, metrics in parts.items()}


def table(metrics: dict[str, Metric]) -> str:
    """The metrics as a table in Markdown."""
    rows = ["| name | unit | meaning | elsewhere |", "|---|---|---|---|"]
    for metric in metrics.values():
        elsewhere = ", ".join(f"{peer} `{name}`" for peer, name in metric.peers.items())
        rows.append(f"| `{metric.name}` | {metric.unit} | {metric.help} | {elsewhere} |")
    return "\n".join(rows) + "\n"
