"""`semion plan` and `semion calibrate`: what a run moves, holds and takes, what binds, and a better split; and the constants of
the machine at hand. It prints; engine/api/planning.py, engine/capacity and engine/forecast know.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from engine.commands.common import write_figures
from engine.config.load import RunConfig, load_config
from engine.core.errors import ConfigError

SIGMA = 0.6


def add_flags(parser: Any) -> None:
    """The options of `semion plan`."""
    parser.add_argument("--network-gigabytes-per-second", type=float, help="of one GPU, between nodes (45)")
    parser.add_argument("--nvlink-gigabytes-per-second", type=float, help="of one GPU, inside a node (350)")
    parser.add_argument("--disk-gigabytes-per-second", type=float, help="that all ranks together write (2)")
    parser.add_argument(
        "--gpu-gibibytes", type=float, default=139.0, help="memory of a GPU (139: H200; 79: H100, A100 of 80 GB)"
    )
    parser.add_argument("--mean-tokens", type=float, metavar="N", help="mean length of responses (0.35 of sampling.max_tokens)")
    parser.add_argument("--sigma", type=float, default=SIGMA, metavar="X", help="spread of the logarithm of their length (0.6)")
    parser.add_argument("--lengths", metavar="FILE", help="instead: lengths as a run's directory or a JSONL file has them")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="length of a prompt (150)")
    parser.add_argument("--signal", type=float, default=1.0, metavar="X", help="share of prompts that teach something (1)")
    parser.add_argument("--calibration", metavar="FILE", help="constants of a machine, as `semion calibrate` writes them")
    parser.add_argument("--from-run", metavar="RUN", help="constants by which the forecast of this run says what it took")
    parser.add_argument("--constants", action="store_true", help="print every constant with its source too")
    parser.add_argument(
        "--optimize", action="store_true", help="search the split of --gpus GPUs that is fastest, for several s"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="with --optimize: how many GPUs there are")
    parser.add_argument(
        "--write", metavar="FILE", help="with --optimize: write the best configuration for the file's own s here"
    )
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file too")
    parser.add_argument(
        "--html", metavar="FILE", help="write a page: an interval's timeline, the memory of the devices, tables"
    )


def plan(options: argparse.Namespace) -> None:
    """Prints what a run will take, or with --optimize the layouts that are fastest."""
    config = load_config(options.config, options.overrides)
    if options.optimize != (options.gpus is not None) or (options.write and not options.optimize):
        lacking = "--optimize needs --gpus; found none: say how many GPUs there are"
        raise ConfigError(lacking if options.optimize else "--write and --gpus need --optimize; found none: add it")
    from engine.api.planning import planned
    from engine.capacity.transfer import Machine, memory_table, table, verdict
    from engine.forecast.calibration import calibrated, read_calibration
    from engine.forecast.seconds import Regime
    from engine.forecast.telling import binding, constants_table, hosts_table, intervals_table, parts_table, run_table, trust
    from engine.observe.progress import print_table

    known = calibrated(
        read_calibration(options.calibration) if options.calibration else None,
        {
            "network_gigabytes_per_second": options.network_gigabytes_per_second,
            "nvlink_gigabytes_per_second": options.nvlink_gigabytes_per_second,
            "disk_gigabytes_per_second": options.disk_gigabytes_per_second,
        },
    )
    c = known.constants
    machine = Machine(c.network_gigabytes_per_second, c.nvlink_gigabytes_per_second, options.gpu_gibibytes)
    if options.from_run:
        known = _of_run(Path(options.from_run), known, machine)
        c = known.constants
    workload = _workload(options, config)
    if options.optimize:
        if options.html:
            raise ConfigError(
                "--html must be left out with --optimize, which compares layouts; found both: plan the one chosen"
            )
        _optimize(options, config, machine, known, workload)
        return
    made = planned(config, machine, known=known, workload=workload)
    print_table(f"semion plan {options.config}", table(made.figures))
    print_table("", memory_table(made.figures["memory"]))
    print(verdict(made.figures["memory"]))
    print_table("", hosts_table(made.figures))
    if made.forecast is not None:
        print_table("time, estimated", parts_table(made.forecast))
        print_table("", run_table(made.forecast))
        for share, text in binding(made.forecast, config)[:4]:
            print(f"{share:.0%}: {text}")
        print_table(
            "other intervals between weight syncs",
            intervals_table(made.intervals, Regime.asked(config)),
        )
        print(trust(c, known.measured, workload, config, config.cluster.nodes))
    if options.constants:
        print_table("constants", constants_table(c, known.measured))
    if options.html:
        from engine.forecast.page import plan_page
        from engine.observe.writing import write_text

        told = trust(c, known.measured, workload, config, config.cluster.nodes)
        table_of_constants = constants_table(c, known.measured)
        name, picture = Path(options.config).stem, made.picture
        page = plan_page(name, made.figures, config, made.forecast, made.intervals, picture, table_of_constants, told)
        write_text(options.html, page)
        print(f"page: {options.html}")
    write_figures(made.figures, None, options.json)


def _of_run(directory: Path, known: Any, machine: Any) -> Any:
    """The constants by a run's own records. ConfigError where it is no run."""
    from engine.api.planning import recalibrated

    if not (directory / "config.toml").is_file() or not (directory / "metrics.jsonl").is_file():
        raise ConfigError(
            f"--from-run must be a run's directory, with config.toml and metrics.jsonl; found none in {directory}: name another"
        )
    return recalibrated(directory, load_config(directory / "config.toml"), known, machine)


def _optimize(options: argparse.Namespace, config: RunConfig, machine: Any, known: Any, workload: Any) -> None:
    from engine.api.planning import optimized
    from engine.config.load import dump_config
    from engine.core.files import atomic_write
    from engine.forecast.seconds import Regime
    from engine.forecast.telling import best_table, frontier_table, trust
    from engine.observe.progress import print_table

    made = optimized(config, machine, options.gpus, known=known, workload=workload)
    own = Regime.asked(config)
    for regime, found in made.best.items():
        if found and regime.lookahead == (0 if isinstance(regime.interval, str) else own.lookahead):
            searched = f"the fastest of {made.tried:,} layouts" if made.tried else "the run's own layout, for no other fits"
            print_table(f"s = {regime.interval}: {searched}", best_table(found))
    print_table("seconds against staleness", frontier_table(made.best, own))
    print(trust(known.constants, known.measured, workload, config, options.gpus // config.cluster.gpus_per_node))
    if options.write:
        if not made.best[own]:
            raise ConfigError(
                f"--write takes the best layout for s = {own.interval}; found none that keeps the run's deadlines: raise "
                f"inference.timeout_seconds, reward_model.timeout_seconds or trainer.timeout_seconds, or leave --write out"
            )
        chosen = made.best[own][0]
        head = f"# Chosen by `semion plan --optimize --gpus {options.gpus}`: {chosen.layout}.\n"
        with atomic_write(options.write) as part:
            part.write_text(head + dump_config(chosen.config), "utf-8")
        print(f"{options.write}: {chosen.layout}; look at it with `semion plan {options.write}`")
    write_figures(made.figures, None, options.json)


def add_calibrate_flags(parser: Any) -> None:
    """The options of `semion calibrate`."""
    parser.add_argument(
        "--config", metavar="CONFIG", help="a run's TOML file: measure an engine and a policy with its model too"
    )
    parser.add_argument("--output", default="calibration.json", metavar="FILE", help="file to make (calibration.json)")


def calibrate(options: argparse.Namespace) -> None:
    """Measures this machine and writes the file."""
    from engine.forecast.calibration import calibrated, write_calibration
    from engine.forecast.measuring import calibrate as measure
    from engine.forecast.telling import constants_table
    from engine.observe.progress import print_table

    config = load_config(options.config) if options.config else None
    target = Path(options.output)
    found = measure(config, target.absolute().parent, lambda text: print(f"measuring {text} ..."))
    write_calibration(target, found)
    known = calibrated(found)
    heading, *table = constants_table(known.constants, known.measured)
    print_table(found.machine, [heading, *(row for row in table if row[0] in known.measured)])
    print(f"{target}: give it to `semion plan CONFIG --calibration {target}`")


def _workload(options: argparse.Namespace, config: RunConfig) -> Any:
    from engine.api.planning import check_workload
    from engine.forecast.lengths import LogNormal, Workload, recorded_lengths
    from engine.forecast.seconds import PROMPT_TOKENS, SHARE_OF_CAP

    cap, most = config.sampling.max_tokens, config.data.max_prompt_tokens
    check_workload(options.mean_tokens, options.sigma, options.signal, options.prompt_tokens, most)
    asked = options.prompt_tokens if options.prompt_tokens is not None else min(most, PROMPT_TOKENS)
    prompts = LogNormal(asked, 0.0, most)
    if options.lengths:
        return Workload(recorded_lengths(options.lengths, cap), prompts, options.signal)
    mean = options.mean_tokens if options.mean_tokens is not None else SHARE_OF_CAP * cap
    return Workload(LogNormal(mean, options.sigma, cap), prompts, options.signal)
