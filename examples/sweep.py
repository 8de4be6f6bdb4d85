"""A sweep over s, from online to offline, as one script: `python examples/sweep.py CONFIG 1 10 never`.

Each run has its own directory beside the configuration's, and one that is there already goes on or is done at once.
"""

import sys

import engine


def main(path: str, intervals: list[str]) -> None:
    for s in intervals:
        # What steers "auto" has no meaning with a number, so an option without a value takes it out of the configuration
        unset = [] if s == "auto" else ["sync.auto_metric=", "sync.auto_bound=", "sync.auto_most="]
        base = engine.load_config(path, [f"sync.sync_interval={s}", "checkpoint.every=end", *unset])
        config = engine.override(base, run={"directory": f"{base.run.directory}-s{s}"})
        for event in engine.train(config, resume="auto"):
            if isinstance(event, engine.Step):
                print(f"s = {s}, step {event.step}: reward {event.metrics['reward_mean']:.3f}", flush=True)
            elif isinstance(event, engine.Done):
                print(f"s = {s}: {event.summary['steps']} steps in {event.summary['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except (engine.SemionError, IndexError) as error:
        sys.exit(f"{error}\n{__doc__}")
