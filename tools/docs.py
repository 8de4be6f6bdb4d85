"""The documentation as a site, and the pages of the paper's rows, docs/rows, which are made from configs/paper. The documents
that are made from the code's declarations are tools/document.py's.

    tools/docs.py           writes docs/rows
    tools/docs.py --check   says whether they are up to date, and writes nothing
    tools/docs.py site      builds the site into build/site, without the network; open build/site/index.html
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from engine.config.load import load_config

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAPER = ROOT / "configs" / "paper"
ROWS = sorted(path.stem for path in PAPER.glob("*.toml"))
TABLE_1 = {  # Math500, NuminaMath, AMC23 (%), as the paper has them; the seed model: 47.4, 33.9, 23.7
    "verifiable_offline_dpo": (53.7, 36.4, 28.8),
    "verifiable_semi_online_dpo_100": (58.9, 39.3, 35.1),
    "verifiable_semi_online_dpo_10": (57.2, 39.4, 31.4),
    "verifiable_online_dpo": (58.7, 39.6, 32.9),
    "verifiable_grpo": (58.1, 38.8, 33.6),
}
MEASURED = {  # the same regime in the tiny reproduction: the label of its line in docs/results.md
    "verifiable_offline_dpo": "offline DPO",
    "verifiable_semi_online_dpo_100": "semi-online DPO, s = 100",
    "verifiable_semi_online_dpo_10": "semi-online DPO, s = 10",
    "verifiable_online_dpo": "online DPO",
    "verifiable_grpo": "GRPO",
}
REGIMES: dict[str | int, str] = {"never": "all sampled from the weights at the start", 1: "sampled from the newest weights"}
REFERENCES: dict[str | int, str] = {
    "never": "the weights at the start",
    "follow": "copied from the policy at every weight sync",
}
JUDGES = {"math": "Math-Verify, right or wrong", "model": "the reward model Athene-RM-8B, a number"}
LLAMA = "configs/models/llama-3.1-8b"  # its sizes, without weights: enough to plan with


def row_document(name: str) -> str:
    """The page of one row of the paper's tables, from its file in configs/paper."""
    file, config = PAPER / f"{name}.toml", load_config(PAPER / f"{name}.toml")
    table, numbers, choices, comments = _comments(file)
    prompts = sum(source.prompts_per_step for source in config.data.sources)
    judges = " and ".join(JUDGES[reward] for source in config.data.sources for reward in source.rewards)
    s, options = config.sync.sync_interval, config.algorithm.model_dump()
    regime = REGIMES.get(s, f"sampled {s} steps at a time, from the weights of the interval's start")
    reference = REFERENCES.get(config.sync.reference, f"copied from the policy every {config.sync.reference} steps")
    loss = {"dpo": "DPO on one pair a prompt", "grpo": "GRPO on all answers"}[config.algorithm.loss]
    weight = "kl_weight" if config.algorithm.loss == "grpo" else "beta"
    rows = {
        "loss": f"{loss}, `algorithm.{weight}` = {options[weight]:g}",
        "rollouts": f"{prompts} prompts × {config.algorithm.samples_per_prompt} answers a step, {regime} "
        f"(`sync.sync_interval` = {json.dumps(s)})",
        "reward": judges,
        "reference": reference,
        "longest answer": f"{config.sampling.max_tokens} tokens",
        "AdamW": f"learning rate {config.optimizer.learning_rate:g}, epsilon {config.optimizer.eps:g}, gradients clipped at "
        f"norm {config.optimizer.clip_norm:g}",
        "length of the run": f"{config.run.steps:,} steps, evaluated and saved every {config.checkpoint.every}",
        "GPUs": f"{config.cluster.nodes} nodes of {config.cluster.gpus_per_node}: {comments['nodes']}",
    }
    what = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    start = "".join(f"{line}\n" for line in comments["commands"])
    reward = f" reward_model.path={LLAMA}" if config.reward_model.path else ""
    path, cluster = f"configs/paper/{name}.toml", config.cluster
    return f"""# {_title(name)}

This page is written by `tools/docs.py` from `configs/paper/{name}.toml`.

{table} of [arXiv 2506.21495](https://arxiv.org/abs/2506.21495). Numbers: {numbers}

## What it does

| | |
|---|---|
{what}

## What is our choice

{choices} They are explained in [the paper's choices and ours](../paper.md).

## Running it

```
{start}semion plan {path} model.path={LLAMA}{reward}
sbatch --nodes={cluster.nodes} --gpus-per-node={cluster.gpus_per_node} tools/slurm/train.sbatch {path}
```

The model goes into `{config.model.path}`. `semion plan` needs no weights and says what memory and what weight sync the layout
takes; here it only borrows the sizes of Llama 3.1 8B. [From one GPU to nodes](../to_nodes.md) explains the last line.

## What was measured

{_measured(name)}

**Nothing of this row has run on a GPU**, and none of the paper's figures has been reproduced at its size
([what is unverified](../results.md#unverified)).
"""


def _title(name: str) -> str:
    """A row's name as people write it."""
    words = name.replace("semi_online", "semi-online").replace("dpo", "DPO").replace("grpo", "GRPO")
    head, _, number = words.rpartition("_")
    if number.isdigit():
        words = f"{head}, {'n' if 'GRPO' in head else 's'} = {number}"
    for task in ("non_verifiable", "verifiable", "mixed", "math_after_chat", "chat_after_math"):
        if words.startswith(f"{task}_"):
            words = f"{task.capitalize().replace('non_', 'Non-').replace('Non_', 'Non-')}: {words[len(task) + 1 :]}"
            break
    return words.replace("_", " ")


def _comments(file: Path) -> tuple[str, str, str, dict[str, Any]]:
    """What the comments of a configuration of the paper say: its table and row, where its numbers are from, what is ours, and
    the nodes and the commands that make what it reads."""
    text = file.read_text("utf-8")
    head = " ".join(line.removeprefix("#").strip() for line in text.split("\n\n")[0].splitlines())
    table, rest = head.removeprefix("arXiv 2506.21495, ").split(". ", 1)
    numbers, rest = rest.split(" Not published, ours: ")
    choices = "Not published, ours: " + rest.split(" model.path is the best checkpoint")[0]
    nodes = next(line.partition("#")[2].strip() for line in text.splitlines() if line.startswith("nodes = "))
    said = [line.partition("# semion ")[2] for line in text.splitlines() if "# semion " in line]
    commands = [f"semion {line}{'' if len(line.split()) > 2 else ' SOURCE data/numinamath'}" for line in said]
    return table, numbers, choices, {"nodes": nodes.removeprefix("of 8 GPUs: "), "commands": commands}


def _measured(name: str) -> str:
    """The paper's figures and ours at tiny size, as docs/results.md has them."""
    parts = []
    if name in TABLE_1:
        found = " / ".join(f"{value:g}" for value in TABLE_1[name])
        parts.append(f"The paper: {found} % on Math500, NuminaMath and AMC23, from 47.4 / 33.9 / 23.7 % before.")
    if label := MEASURED.get(name):
        lines = (DOCS / "results.md").read_text("utf-8").splitlines()
        before, after, *errors = next(line for line in lines if line.startswith(f"| {label} |")).split("|")[2:6]
        parts.append(
            f"Ours, a toy: the same regime and loss took a Llama of a million parameters from {before.strip()} to "
            f"{after.strip()} on word problems in 120 steps (standard error over three seeds: {errors[1].strip()}; "
            f"[the table, and where it disagrees with the paper](../results.md#regimes-the-tiny-reproduction))."
        )
    parts.append(
        f"The row's twin for two cores, `configs/tiny/{name}.toml`, has the same loss, regime, rewards and reference. It ran "
        f"to its end, and its records proved its regime "
        f"([seconds and rollouts](../results.md#the-papers-rows-on-a-tiny-model)):\n\n"
        f"```\n.venv/bin/python tools/tiny.py {name}\n```"
    )
    return "\n\n".join(parts)


def rows_document() -> str:
    """The table of the rows."""
    lines = []
    for name in ROWS:
        config = load_config(PAPER / f"{name}.toml")
        cells = [f"[{_title(name)}]({name}.md)", _comments(PAPER / f"{name}.toml")[0], f"`{config.algorithm.loss}`"]
        lines.append("| " + " | ".join([*cells, str(config.sync.sync_interval), f"{config.sync.reference}"]) + " |")
    return ROWS_HEAD + "\n".join(lines) + "\n"


ROWS_HEAD = """# A page for each row

This file is written by `tools/docs.py` from `configs/paper`. Every row of the paper's tables that trains a model has a file
there, with the numbers of its table 4, and a page here: what the run does, what is our choice, what was measured and needed.

| page | in the paper | loss | s | reference |
|---|---|---|---|---|
"""

PAGES: dict[str, Callable[[], str]] = {
    "rows/index.md": rows_document,
    **{f"rows/{name}.md": partial(row_document, name) for name in ROWS},
}


def site(folder: Path) -> int:
    """Builds the site into `folder`; the exit code of mkdocs, which is not 0 for a broken link."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", str(ROOT / "mkdocs.yml")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # of the theme, about its successor
    code = subprocess.run([*command, "--site-dir", str(folder)], cwd=ROOT, env=environment, check=False).returncode
    print(f"{folder / 'index.html'}" if code == 0 else "the site was not built: mend what is named above")
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["site"], help="build the site")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.what == "site":
        return site(ROOT / "build" / "site")
    stale = [name for name, page in PAGES.items() if not _is_written(name, page)]
    if options.check:
        print(f"{' and '.join(stale)} differ from configs/paper: run tools/docs.py" if stale else "up to date")
        return int(bool(stale))
    for name in stale:
        (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
        print(DOCS / name)
    return 0


def _is_written(name: str, page: Callable[[], str]) -> bool:
    return (DOCS / name).exists() and (DOCS / name).read_text("utf-8") == page()


if __name__ == "__main__":
    sys.exit(main())
