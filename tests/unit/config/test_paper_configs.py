"""configs/paper holds every row of the paper's tables with Table 4's numbers, and configs/tiny a twin of each that is the same
run where it matters: loss, regime, rewards, reference and optimizer.
"""

from pathlib import Path
from typing import Any

import pytest

from engine.api.planning import plan
from engine.config.load import RunConfig, load_config
from engine.config.placement import place, training_parts
from engine.core.errors import ConfigError
from engine.models.config_file import read_shape

ROOT = Path(__file__).resolve().parents[3]
PAPER, TINY = ({path.stem: path for path in (ROOT / "configs" / name).glob("*.toml")} for name in ("paper", "tiny"))
LLAMA_8B = str(ROOT / "configs" / "models" / "llama-3.1-8b")

# Table 4: beta (DPO) or KL (GRPO), Adam epsilon, clip, longest response, prompts a step, reference; then s of Tables 1 to 3
VERIFIABLE, CHAT = (0.1, 1e-4, 1.0, 2048, 64), (0.01, 1e-8, 0.1, 1024, 32)
VERIFIABLE_GRPO, CHAT_GRPO = (0.001, *VERIFIABLE[1:]), (0.001, *CHAT[1:])
TABLE = {
    "verifiable_offline_dpo": (*VERIFIABLE, "never", "never"),
    "verifiable_semi_online_dpo_100": (*VERIFIABLE, "follow", 100),
    "verifiable_semi_online_dpo_10": (*VERIFIABLE, "follow", 10),
    "verifiable_online_dpo": (*VERIFIABLE, "follow", 1),
    "verifiable_grpo": (*VERIFIABLE_GRPO, "never", 1),
    "verifiable_grpo_4": (*VERIFIABLE_GRPO, "never", 1),
    "verifiable_grpo_12": (*VERIFIABLE_GRPO, "never", 1),
    "non_verifiable_offline_dpo": (*CHAT, "never", "never"),
    "non_verifiable_semi_online_dpo_10": (*CHAT, "never", 10),
    "non_verifiable_semi_online_dpo_5": (*CHAT, "never", 5),
    "non_verifiable_online_dpo": (*CHAT, "never", 1),
    "non_verifiable_grpo": (*CHAT_GRPO, "never", 1),
    "chat_after_math_online_dpo": (0.01, 1e-8, 0.1, 2048, 32, "never", 1),
    "math_after_chat_online_dpo": (0.1, 1e-4, 1.0, 2048, 32, "follow", 1),
    "mixed_online_dpo": (0.01, 1e-5, 0.1, 2048, 32, "never", 1),
}


def rewards(config: RunConfig) -> list[str]:
    return [name for source in config.data.sources for name in source.rewards]


def test_every_row_has_its_file_and_every_file_its_twin():
    assert PAPER.keys() == TINY.keys() == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_a_row_has_the_papers_numbers_and_names_its_source(name):
    config = load_config(PAPER[name])
    a: Any = config.algorithm  # of its loss's own class
    c = config
    coefficient = a.kl_weight if a.loss == "grpo" else a.beta
    prompts = sum(source.prompts_per_step for source in c.data.sources)
    assert TABLE[name] == (
        *(coefficient, c.optimizer.eps, c.optimizer.clip_norm, c.sampling.max_tokens, prompts),
        *(c.sync.reference, c.sync.sync_interval),
    )
    assert (a.loss == "grpo") is ("grpo" in name)
    assert a.samples_per_prompt == int(name.rpartition("_")[2]) if name.startswith("verifiable_grpo_") else 8
    assert (c.optimizer.learning_rate, c.optimizer.beta1, c.optimizer.beta2, c.optimizer.weight_decay) == (1e-6, 0.9, 0.95, 0.1)
    assert (c.sampling.temperature, c.sampling.top_p, c.evaluation.temperature, c.evaluation.top_p) == (1.0, 1.0, 0.6, 0.9)
    judged_by = {"verifiable": ["math"], "math": ["math"], "mixed": ["math", "model"]}
    assert rewards(config) == judged_by.get(name.split("_")[0], ["model"])
    assert [source.template for source in c.data.sources] == ["figure4" if r == "math" else "figure5" for r in rewards(config)]
    head = PAPER[name].read_text("utf-8").split("\n\n")[0]
    assert "arXiv 2506.21495, Table" in head and "Table 4," in head and "Not published, ours:" in head
    assert c.trainer.world_size == 32 and c.inference.engines in (8, 16)
    assert c.trainer.uses_te and not c.trainer.recompute and c.optimizer.implementation == "te", "what an H200 wants"


# Sections 3.1 and 3.3: prompts that a row trains on; the verifiable rows take all of NuminaMath
PROMPTS = {
    "non_verifiable": [("wildchat", "1k", 1000)],
    "chat_after_math": [("wildchat", "100k", 100_000)],
    "math_after_chat": [("numinamath", "100k", 100_000)],
    "mixed": [("numinamath", "100k", 100_000), ("wildchat", "50k", 50_000)],
}


@pytest.mark.parametrize("name", [name for name in TABLE if not name.startswith("verifiable")])
def test_a_row_says_how_its_prompts_are_made_and_how_many(name):
    (wanted,) = (prompts for start, prompts in PROMPTS.items() if name.startswith(start))
    sources, text = load_config(PAPER[name]).data.sources, PAPER[name].read_text("utf-8")
    for source, (dataset, size, number) in zip(sources, wanted, strict=True):
        folder = f"data/{dataset}_{size}"
        assert (source.train, source.held_out) == (f"{folder}/train.jsonl", f"{folder}/validation.jsonl")
        assert f"# semion prepare {dataset} SOURCE {folder} --train {number}\n" in text


@pytest.mark.parametrize("name", TABLE)
def test_a_row_fits_the_model_and_its_gpus_and_its_sync_is_planned(name):
    judged = [f"reward_model.path={LLAMA_8B}"] if "model" in rewards(load_config(PAPER[name])) else []  # Athene-RM's sizes
    config = load_config(PAPER[name], [f"model.path={LLAMA_8B}", *judged])
    assert config.inference.max_model_tokens <= read_shape(LLAMA_8B).max_positions
    figures = plan(config)
    assert (figures["direct_fraction"], figures["received_over_needed"]) == (1.0, 1.0)
    assert figures["memory"]["fits"], figures["memory"]
    assert [d["name"] == "reward engine" for d in figures["memory"]["devices"]] == [False, False, *(True for _ in judged)]


@pytest.mark.parametrize("name", TABLE)
def test_a_row_asks_for_the_nodes_that_hold_it_and_no_more(name):
    config = load_config(PAPER[name])
    assert len(place(config, training_parts(config)).ranks) == 32
    fewer = load_config(PAPER[name], [f"cluster.nodes={config.cluster.nodes - 1}"])
    with pytest.raises(ConfigError, match=r"cluster\.nodes \* cluster\.gpus_per_node must hold"):
        place(fewer, training_parts(fewer))


@pytest.mark.parametrize("name", TABLE)
def test_a_twin_is_the_same_run_on_a_tiny_model(name):
    paper, tiny = load_config(PAPER[name]), load_config(TINY[name])
    assert (tiny.algorithm, tiny.sync, tiny.sampling.temperature) == (paper.algorithm, paper.sync, paper.sampling.temperature)
    assert rewards(tiny) == rewards(paper)
    assert [source.template for source in tiny.data.sources] == [source.template for source in paper.data.sources]
    ours = {"learning_rate": 1e-6, "schedule": "cosine", "decay_steps": paper.run.steps, "floor_share": 0.2}  # tiny: constant
    library = {"implementation": "te"}  # tiny: on CPUs
    assert tiny.optimizer.model_copy(update=ours | library) == paper.optimizer
    assert tiny.checkpoint.best_by == paper.checkpoint.best_by
    interval = tiny.sync.sync_interval
    assert not isinstance(interval, int) or tiny.run.steps > interval, "it meets a second weight sync"
    assert f"configs/paper/{name}.toml" in TINY[name].read_text("utf-8").split("\n")[0]
