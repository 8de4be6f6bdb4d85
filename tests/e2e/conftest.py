"""A world small enough for tests of the whole engine: sums of two digits, a Llama of 60 thousand parameters that has
been taught for a second or two what an answer looks like (so that some rollouts are right), and a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.config.load import RunConfig, load_config

Make = Callable[..., RunConfig]
FURTHER = (5, 6, 7)  # whose doubles the second source of offline runs asks for
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "odd_vocab": {"vocab_size": 8193},  # which tensor-parallel 2 does not divide, in tensors of a mebibyte
}


CONFIG = """
[run]
directory = "{directory}"
seed = 5
steps = 4
[model]
path = "{model}"
[data]
train = "{sums}/train.jsonl"
held_out = "{sums}/held_out.jsonl"
template = "{{problem}}"
prompts_per_step = 6
max_prompt_tokens = 64
[algorithm]
samples_per_prompt = 6
[sampling]
max_tokens = 8
[trainer]
microbatch_tokens = 256
timeout_seconds = 200.0
[optimizer]
learning_rate = 1e-3
eps = 1e-8
[inference]
max_model_tokens = 128
kv_cache = "64 MiB"
[rewards]
deadline_seconds = 30.0
[evaluation]
samples = 2
"""


def teach(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int = 80) -> None:
    """Next-token training on "a+b" -> "The answer is $c$" for digits, far from convergence."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        digits = torch.randint(0, 5, (32, 2), generator=draw).tolist()
        rows = [[{"role": "user", "content": f"{a}+{b}"}] for a, b in digits]
        prompts = [tokenizer.apply_chat_template(r, add_generation_prompt=True, return_dict=False) for r in rows]
        ids = torch.tensor(
            [p + tokenizer.encode(f"${a + b}$") + [tokenizer.eos_token_id] for p, (a, b) in zip(prompts, digits, strict=True)]
        )
        start = len(prompts[0])
        logits = model(ids).logits[:, start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, start:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def seed_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """Folder of a Hugging Face checkpoint, by variant; made once a session."""
    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            torch.manual_seed(7)
            torch.set_num_threads(1)
            small = {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "vocab_size": 260,
                "max_position_embeddings": 512,
                "bos_token_id": 256,
                "eos_token_id": 259,
                "tie_word_embeddings": False,
            }
            model = LlamaForCausalLM(LlamaConfig(**(small | VARIANTS[variant])))
            teach(model, tiny_tokenizer, seed=1)
            made[variant] = tmp_path_factory.mktemp(variant)
            model.generation_config.eos_token_id = 259
            model.save_pretrained(made[variant])
            tiny_tokenizer.save_pretrained(made[variant])
        return made[variant]

    return make


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and held_out.jsonl in the NuminaMath schema."""
    folder = tmp_path_factory.mktemp("sums")
    rows = [
        {"problem": f"{a}+{b}", "answer": str(a + b), "solution": f"${a + b}$", "source": "sums"}
        for a in range(5)
        for b in range(5)
    ]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows[5:]) + "\n")
    (folder / "held_out.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:5]) + "\n")
    return folder


@pytest.fixture(scope="session")
def configure(seed_model: Callable[[str], Path], sums: Path) -> Callable[..., RunConfig]:
    """Makes a configuration of four steps on the sums, in a folder, changed by overrides; `variant` names the seed model."""

    def make(folder: Path, *overrides: str, variant: str = "plain", directory: str = "run") -> RunConfig:
        file = folder / "base.toml"
        file.write_text(CONFIG.format(directory=folder / directory, model=seed_model(variant), sums=sums))
        return load_config(file, list(overrides))

    return make


@pytest.fixture
def run_config(configure: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """`configure` in the test's own folder."""
    return partial(configure, tmp_path)


@pytest.fixture(scope="session")
def semi_online(configure: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, str]:
    """A finished, profiled semi-online DPO run at tensor-parallel 2 with two engines, and what it printed."""
    from tests.e2e.test_commands import PROFILED, SEMI_ONLINE, semion, written

    folder = tmp_path_factory.mktemp("semi_online")
    config = configure(folder, *SEMI_ONLINE, *PROFILED)
    return config, semion("train", written(config, folder), "--json", str(folder / "summary.json"))


@pytest.fixture(scope="session")
def online(configure: Make, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished online GRPO run of two data-parallel ranks and two engines."""
    from tests.e2e.test_commands import ONLINE, semion, written

    folder = tmp_path_factory.mktemp("online")
    config = configure(folder, *ONLINE)
    semion("train", written(config, folder))
    return config


@pytest.fixture(scope="session")
def make_offline(configure: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Configurations of offline GroupDPO and GRPO over two pipeline stages, of two sources, one with spare prompts."""
    from tests.e2e.test_commands import OFFLINE

    more = tmp_path_factory.mktemp("more") / "more.jsonl"
    more.write_text("".join(json.dumps({"problem": f"{a}+{a}", "answer": str(2 * a)}) + "\n" for a in FURTHER))
    mix = f'data.mix=[{{train = "{more}", template = "{{problem}}", prompts_per_step = 2}}]'
    return lambda folder, *overrides, directory: configure(folder, *OFFLINE, mix, *overrides, directory=directory)


@pytest.fixture(scope="session")
def offline(make_offline: Make, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Such a run, finished."""
    from tests.e2e.test_commands import semion, written

    folder = tmp_path_factory.mktemp("offline")
    config = make_offline(folder, directory="offline")
    semion("train", written(config, folder))
    return config


@pytest.fixture(scope="session")
def stopped(configure: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, str]:
    """A semi-online GRPO run at tensor-parallel 2 with sequence parallelism that its guard stopped, and what it printed."""
    from tests.e2e.test_commands import semion, written

    folder = tmp_path_factory.mktemp("stopped")
    layout = ["trainer.tensor_parallel=2", "trainer.sequence_parallel=true", "algorithm.loss=grpo", "algorithm.kl_weight=0.05"]
    regime = ["sync.sync_interval=3", "run.steps=9", "checkpoint.every=3"]
    config = configure(folder, *layout, *regime, "guard.action=stop", "guard.length_share=1000.0")
    return config, semion("train", written(config, folder), expect=7)
