"""Every model family but Llama, whose tests are the other files': Qwen3, which the engine has, and Qwen2, which it has not and
which is named by the path of its file. Against transformers' own implementation: logits, gradients, weights after three steps;
layouts against one rank; export bit for bit; both specs of megatron-core.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from engine.config.options import Trainer
from engine.core.types import IGNORED
from engine.models.hf import HfCheckpoint
from tests.parallel import material
from tests.parallel.conftest import SMALL
from tests.parallel.pool import WorkerPool

OUTSIDE = f"{Path(__file__).parents[1] / 'unit' / 'models' / 'qwen2_from_outside.py'}:Qwen2"
CASES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {  # configuration, model, sizes, model.family
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "vocab_size": 67}, "auto"),
    "qwen3_tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8, "tie_word_embeddings": True}, "qwen3"),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"vocab_size": 67}, OUTSIDE),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one_rank": {},
    "tp2_sequence_parallel_recompute": {"tensor_parallel": 2, "sequence_parallel": True, "recompute": True},
    "tp2_pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "tp4_over_two_kv_heads": {"tensor_parallel": 4},
    "dp2_distributed_optimizer": {"data_parallel": 2, "distributed_optimizer": True},
}
TE_ERROR = 0.02  # of the logits' norm, in bfloat16; 0.006 seen


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a small model of a case, with norms off 1, and weights and biases large enough to tell layouts apart."""
    folders: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in folders:
            config, model, sizes, _ = CASES[case]
            torch.manual_seed(5)
            model = model(config(**(SMALL | sizes)))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    drawn = torch.randn_like(parameter)
                    parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.08 * drawn)
            folders[case] = tmp_path_factory.mktemp(case)
            model.save_pretrained(folders[case])
        return folders[case]

    return make


def run(pool: WorkerPool, what: str, case: str, folder: Path, output: Path, trainer: dict[str, Any], **more: Any) -> Any:
    """(what the ranks answer, the tensors of all leaders)."""
    size = Trainer(**trainer).world_size
    options = {"model": {"family": CASES[case][3]} | more.pop("model", {})}
    told = pool.run(what, size, trainer=trainer, options=options, checkpoint=str(folder), output=str(output), **more)
    return told, {name: value for file in output.glob("*.safetensors") for name, value in load_file(file).items()}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


def chosen(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_transformers(
    case: str, layout: str, pool: WorkerPool, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """NLL in fp32: logits within 1e-4, each step's gradients within 1e-5, the weights after it within 2e-5."""
    trainer = LAYOUTS[layout]
    told, tensors = run(pool, "train", case, made(case), tmp_path, trainer, loss="nll")
    config = material.run_config({}, {})
    options = config.optimizer
    model = AutoModelForCausalLM.from_pretrained(made(case))
    placed = material.batch_of(0, model.config.vocab_size, Trainer(**{"microbatch_tokens": 64, **trainer}), 0)
    for index, row in enumerate(placed.microbatches):
        for member in material.members(row):
            with torch.no_grad():
                wanted = model(member.tokens[None]).logits[0, member.predicting]
            assert (tensors[f"logits.{index}"][member.among] - wanted).abs().max() <= 1e-4
    decayed = [{"params": [p for p in model.parameters() if (p.ndim > 1) is wide]} for wide in (True, False)]
    adamw = torch.optim.AdamW(decayed, betas=(options.beta1, options.beta2), eps=options.eps)
    for step, metrics in enumerate(told[0]):
        batch = material.batch_of(step, model.config.vocab_size, config.trainer, 0)
        adamw.zero_grad()
        loss = torch.zeros(())
        for row in batch.microbatches:
            for member in material.members(row):
                logits = model(member.tokens[None]).logits[0]
                loss = loss + F.cross_entropy(logits, member.targets, ignore_index=IGNORED, reduction="sum")
        (loss / batch.num_target_tokens).backward()
        assert metrics["loss"] == pytest.approx(loss.item() / batch.num_target_tokens, abs=1e-5)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), material.UNCLIPPED).item()
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        gradients = {f"gradient.{step}.{name}": p.grad for name, p in model.named_parameters()}
        assert worst(chosen(tensors, f"gradient.{step}."), gradients) <= 1e-5
        for group, decay in zip(adamw.param_groups, (options.weight_decay, 0.0), strict=True):
            group["weight_decay"] = decay
            group["lr"] = metrics["learning_rate"]
        adamw.step()
    assert worst(chosen(tensors, "weight."), {f"weight.{n}": p.detach() for n, p in model.named_parameters()}) <= 2e-5


@pytest.mark.parametrize("layout", ["one_rank", "tp2_pp2", "tp4_over_two_kv_heads"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_is_exported(
    case: str, layout: str, pool: WorkerPool, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """Bit for bit, and every tensor of the file."""
    _, tensors = run(pool, "export", case, made(case), tmp_path, LAYOUTS[layout])
    checkpoint = HfCheckpoint(made(case))
    assert tensors.keys() == checkpoint.names()
    assert all(torch.equal(value, checkpoint.tensor(name)) for name, value in tensors.items())


@pytest.fixture(scope="module")
def te_pool() -> Any:
    """Processes with Transformer Engine, or its stand-in where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if not torch.cuda.is_available():
            patch.setenv("SEMION_TE_STAND_IN", "1")
        workers = WorkerPool()
        yield workers
        workers.close()


@pytest.mark.parametrize("case", ["qwen3", "qwen2"])
def test_transformer_engines_spec_exports_what_is_read(
    case: str, te_pool: WorkerPool, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """In bfloat16: bit for bit as the file rounds to. Its names are the table's, or nothing could be loaded."""
    trainer = {"layers": "transformer_engine", "tensor_parallel": 2}
    _, tensors = run(te_pool, "export", case, made(case), tmp_path, trainer, model={"dtype": "bfloat16"})
    checkpoint = HfCheckpoint(made(case))
    assert tensors.keys() == checkpoint.names()
    assert all(torch.equal(value, checkpoint.tensor(name).bfloat16()) for name, value in tensors.items())


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel": 2, "sequence_parallel": True}], ids=["one_rank", "tp2"])
def test_transformer_engines_spec_gives_the_same_logits(
    layout: dict[str, Any], te_pool: WorkerPool, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of Qwen3 in bfloat16, as near to fp32 ones as bfloat16 is. The stand-in for Transformer Engine has no bias for Qwen2."""
    trainer = {"layers": "transformer_engine", "microbatch_tokens": 128, **layout}
    model_options = {"dtype": "bfloat16"}
    _, tensors = run(te_pool, "train", "qwen3", made("qwen3"), tmp_path, trainer, model=model_options, loss="nll")
    model = AutoModelForCausalLM.from_pretrained(made("qwen3"))
    batch = material.batch_of(0, model.config.vocab_size, Trainer(**{"microbatch_tokens": 64, **trainer}), 0)
    for index, row in enumerate(batch.microbatches):
        for member in material.members(row):
            with torch.no_grad():
                wanted = model(member.tokens[None]).logits[0, member.predicting]
            error = (tensors[f"logits.{index}"][member.among].float() - wanted).norm() / wanted.norm()
            assert error <= TE_ERROR
