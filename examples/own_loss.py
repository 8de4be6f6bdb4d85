"""A loss of your own in plain torch, a regression of log-ratios on rewards: `python examples/own_loss.py CONFIG`."""

import math
import sys

import torch

import engine


class Regression(engine.GroupLoss):
    """Minimises, over the rollouts of a prompt, the mean of (beta * log-ratio - (reward - value)) squared."""

    def group_loss(self, group):
        beta = 0.5
        value = beta * (torch.logsumexp(group.rewards / beta, 0) - math.log(len(group.rewards)))
        gain = beta * (group.sums(group.log_probs) - group.sums(group.rollout_log_probs))
        return (gain - (group.rewards - value)).square().mean()


if __name__ == "__main__":
    try:
        config = engine.load_config(sys.argv[1], sys.argv[2:])
        for event in engine.train(engine.override(config, {"algorithm.loss": engine.register(Regression)})):
            if isinstance(event, engine.Step):
                print(f"step {event.step}: loss {event.metrics['loss']:.4f}", flush=True)
    except (engine.SemionError, IndexError) as error:
        sys.exit(f"{error}\n{__doc__}")
