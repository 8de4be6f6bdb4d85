"""`semion rollout`: samples from model.path, without training."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from engine.commands.common import write_figures
from engine.config.load import load_config
from engine.core.errors import ConfigError
from engine.core.files import atomic_write, staged_folder

OF_ONE_MODEL = [  # the weights of model.path, for every step
    *("sync.sync_interval=never", "sync.reference=never", "sync.lookahead=0", "sync.in_flight=false", "sync.streaming=false"),
]


def rollout(options: argparse.Namespace) -> None:
    """Samples and scores the rollouts of run.steps steps into --output, which is there when it is whole: one file of JSON lines
    where its name ends in .jsonl, else a folder as a run has it."""
    options.overrides += OF_ONE_MODEL
    config = load_config(options.config, options.overrides)
    from engine.api.preflight import check
    from engine.data.ends import end_tokens
    from engine.data.mixture import load_mixture
    from engine.data.templates import model_tokenizer
    from engine.inference.pool import Pool
    from engine.observe.writing import finite
    from engine.rewards.registry import judging_of, open_rewards
    from engine.rollouts.source import RolloutSource
    from engine.rollouts.writer import RolloutFile, RolloutFolder, RolloutWriter
    from engine.run.processes import Cluster

    output = Path(options.output)
    if output.exists():
        raise ConfigError(f"--output must be a new file or folder; found {options.output}: name another")
    spec = check(config, "rollout")
    tokenizer = model_tokenizer(config, spec.shape.vocab_size)
    prompts = load_mixture(config, judging_of, tokenizer)
    figures = []
    with ExitStack() as stack:
        is_file = output.suffix == ".jsonl"
        part = stack.enter_context(atomic_write(output, durable=True) if is_file else staged_folder(output))
        cluster = stack.enter_context(Cluster(spec, verbose=options.verbose, folder=output.parent))
        pool = Pool(cluster.start_engines(), config.inference.timeout_seconds)
        reward = stack.enter_context(open_rewards(config, cluster.start_judges()))
        records = RolloutWriter(RolloutFile(part) if is_file else RolloutFolder(part, config.records))
        stack.callback(records.close)
        ends = end_tokens(config.model.path, tokenizer)
        source = RolloutSource(config, prompts, pool, reward, records, ends.stop)
        stack.callback(source.close)
        for step in range(config.run.steps):
            if steps := config.schedule.opens(step):
                source.open(steps)
            data = source.next(step)
            figures.append({"step": step} | finite(data.metrics))
            print(f"step {step}: reward {data.metrics['reward_mean']:.3f}, {data.num_prompts} prompts", flush=True)
    rewards = [figure["reward_mean"] for figure in figures if figure["reward_mean"] is not None]
    mean = sum(rewards) / len(rewards) if rewards else None
    print(f"{options.output}: mean reward {mean} over {len(figures)} steps")
    write_figures({"reward_mean": mean, "steps": figures}, None, options.json)
