"""Samples a model's answers to open-ended questions: the instruction alone in the chat template, one completion each. Files
and formats are data/questions.py's and answers.py's; it is given a pool that already serves the weights to ask.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.benchmarks.questions import Question
from engine.config.load import RunConfig
from engine.core.arrays import TokenIds
from engine.core.errors import DataError
from engine.core.types import Completion, Prompt
from engine.data.templates import encode_prompt, policy_tokenizer
from engine.inference.pool import Pool
from engine.inference.sampling import sample_requests


def prompts_of(config: RunConfig, questions: Sequence[Question]) -> list[Prompt]:
    """A prompt a question. DataError when one is too long: a benchmark wants every answer."""
    tokenizer, limit, prompts = policy_tokenizer(config), config.data.max_prompt_tokens, []
    for question in questions:
        token_ids = encode_prompt(tokenizer, question.instruction, "{problem}")
        if len(token_ids) > limit:
            raise DataError(
                f"question {question.id} must fit data.max_prompt_tokens = {limit}; found {len(token_ids)} tokens: raise it, "
                f"and inference.max_model_tokens with it"
            )
        prompts.append(Prompt(question.id, TokenIds.of(token_ids), question.instruction, "", "", question.dataset))
    return prompts


def sample_answers(config: RunConfig, prompts: Sequence[Prompt], pool: Pool) -> list[Completion]:
    """One completion a prompt, in their order, at the temperature and top-p of [evaluation] (the paper's 0.6 and 0.9)."""
    requests = sample_requests(
        prompts,
        1,
        run_seed=config.run.seed,
        purpose="open_ended",
        step=0,
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
        max_tokens=config.sampling.max_tokens,
    )
    return pool.generate(requests)[0]
