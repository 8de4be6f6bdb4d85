"""The reward model on vLLM, in the process that makes it: conversations in, one raw number each out. It places no process,
makes no pairs, and judges one conversation without looking at the others.

vLLM is not batch-invariant, so what it runs together is fixed: each call's distinct conversations in the order of their
tokens, nothing kept from earlier calls. A call's scores therefore depend on what it asks, never on the order, on what was asked
before or on timing. Who asks makes each call of one group (engine/rewards/model.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from engine.capacity.kv_cache import reward_cache
from engine.config.load import RunConfig
from engine.core.errors import InferenceError
from engine.core.importing import uncollected
from engine.core.types import Message, Score
from engine.inference.advice import reward_advice
from engine.inference.nvcc import without_nvcc
from engine.inference.process import prepare_process
from engine.models.reward_head import ATHENE
from engine.observe.telling import activity


class RewardEngine:
    """vLLM with the run's reward model."""

    def __init__(self, config: RunConfig) -> None:
        from engine.data.conversations import Conversations

        prepare_process(config)
        self._on_gpu = False
        self._conversations = Conversations(config.reward_model)
        try:
            with activity("engine"):
                self._load(config)
        except Exception as error:
            why = " ".join(str(error).split())
            advice = reward_advice(why, config, on_gpu=self._on_gpu)
            raise InferenceError(f"the reward engine could not start from {config.reward_model.path}: {why}{advice}") from error

    def _load(self, config: RunConfig) -> None:
        import torch

        with uncollected():
            from vllm import LLM
            from vllm.config import PoolerConfig

            from engine.inference import athene

        options = config.reward_model
        self._on_gpu = torch.cuda.is_available()
        on_cpu = not self._on_gpu
        further: dict[str, Any] = {}
        if options.tensor_parallel > 1:
            further = {"tensor_parallel_size": options.tensor_parallel, "distributed_executor_backend": "mp"}
        if self._on_gpu:
            capability = torch.cuda.get_device_capability(0)
            further |= without_nvcc({}, capability, dtype=options.dtype, tensor_parallel=options.tensor_parallel)
        torch.set_num_threads(config.inference.threads)
        athene.register()
        is_athene = self._conversations.head.form == "athene"
        self._llm = LLM(
            model=options.path,
            runner="pooling",
            pooler_config=PoolerConfig(use_activation=False),  # the raw score: vLLM would take its sigmoid
            hf_overrides={
                "architectures": [ATHENE if is_athene else "LlamaForSequenceClassification"],
                "num_labels": 1,
            },
            dtype=options.dtype,
            load_format="safetensors",
            enforce_eager=on_cpu,
            max_model_len=options.max_tokens,
            max_num_batched_tokens=options.batched_tokens,
            kv_cache_memory_bytes=reward_cache(self._conversations.head.shape, options).num_bytes(None),
            block_size=32 if on_cpu else None,
            enable_chunked_prefill=False,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **further,
        )

    def describe(self) -> dict[str, str]:
        """The process and what it judges with; answered when it is up."""
        return {"pid": str(os.getpid()), "form": self._conversations.head.form}

    def score(self, conversations: Sequence[tuple[str | tuple[Message, ...], str]]) -> list[Score]:
        """One score for each (user's message or turns up to it, answer), in order.

        Statuses: `too_long` for more than reward_model.max_tokens tokens, `invalid` where the model's number is not finite, or
        the tokenizer cannot keep a text that spells special tokens;
        their value is 0.
        """
        encoded = [self._conversations.encode(message, answer) for message, answer in conversations]
        distinct = sorted({ids for ids in encoded if ids})
        prompts = [{"prompt_token_ids": list(ids)} for ids in distinct]
        outputs = self._llm.classify(prompts, use_tqdm=False) if prompts else []
        values = dict(zip(distinct, (output.outputs.probs for output in outputs), strict=True))
        return [_unjudged(ids) if not ids else _score(*values[ids]) for ids in encoded]


def _unjudged(ids: tuple[int, ...] | None) -> Score:
    return Score(0.0, "too_long" if ids is None else "invalid")


def _score(value: float) -> Score:
    return Score(value, "ok") if math.isfinite(value) else Score(0.0, "invalid")
