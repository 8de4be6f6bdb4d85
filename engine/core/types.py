"""The records that flow through the engine: a prompt becomes a group of rollouts, a group becomes training sequences,
sequences are packed into microbatches. Nothing here computes; every record is frozen except the tensors' own contents.

Worked example: prompt "3 + 4 = ?" with N = 2 samples. Rollout 0 says 7 (reward 1), rollout 1 says 8 (reward 0).
DPO makes one pair = two `Sequence`s with `group=0`, one `chosen`; GRPO makes two `Sequence`s with advantages +0.5, -0.5.

Shape legend: T tokens of a packed row, L of them with a target, B segments of it, P pairs of it. A segment is a sequence, or
what belongs to none: padding, or a prompt that several sequences share (engine/megatron/packing.py has a picture).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from engine.core.arrays import NO_LOG_PROBS, LogProbs, TokenIds

if TYPE_CHECKING:  # what only names rewards or prompts starts without it
    import torch

# How a reward came about; "truncated" is never a reward's own, but what sampling.truncated = 'leave_out' makes of it.
Status = Literal["ok", "timeout", "died", "unparsable", "too_long", "invalid", "truncated"]

Message = tuple[str, str]  # role, text

Spans = tuple[tuple[int, int], ...]  # (version of the weights, number of tokens that it sampled), versions rising

IGNORED = -100  # target value of a position whose token no loss looks at


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, tokenized once."""

    id: str  # stable across runs: a digest of the problem's text, or the row's own id
    token_ids: TokenIds  # the chat template applied, generation prompt included
    problem: str  # the problem as the file gives it
    answer: str  # gold answer
    solution: str  # worked solution; empty where the file has none
    source: str  # where the row says it comes from
    reward: str = "math"  # which reward judges its completions, as Source.judge says it
    verifiable: bool = True  # whether that says right or wrong; other rewards are degrees, whose sign means nothing
    row: str = ""  # all columns of its row, as JSON, where its reward asks for them
    messages: tuple[Message, ...] = ()  # the whole conversation, where the problem, its last message, is not all of it


@dataclass(frozen=True, slots=True)
class Judging:
    """What who loads prompts must know of the rewards that will judge them."""

    verifiable: bool  # whether they say right or wrong
    needs_answer: bool  # whether a row without an answer is an error
    wants_row: bool  # whether they look at all columns


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one request: sampled tokens, of one version of the weights unless sync.in_flight."""

    prompt_id: str
    sample_index: int  # 0 .. N-1; N .. 2N-1 where the prompt comes twice in a step
    seed: int  # the sampling seed, a pure function of (run seed, step, prompt id, sample index)
    version: int  # optimizer steps in the weights that sampled it, or its first token
    token_ids: TokenIds  # EOS included when it was sampled
    log_probs: LogProbs  # of each sampled token, natural log, of softmax(logits / temperature)
    text: str
    finish_reason: Literal["stop", "length"]
    temperature: float = 1.0  # of the log-probs: what was sampled at, or 1 where the loss asks for the model's own distribution
    spans: Spans = ()  # with sync.in_flight: which versions sampled how many of its tokens, in their order; else empty

    @property
    def by_version(self) -> Spans:
        """Which versions sampled how many of its tokens, in their order."""
        return self.spans or ((self.version, len(self.token_ids)),)

    @property
    def truncated(self) -> bool:
        """Whether it was cut off at sampling.max_tokens, before it ended by itself."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Score:
    """A reward with how it came about; anything but `ok` is counted and reported."""

    value: float
    status: Status
    parts: tuple[tuple[str, float], ...] = ()  # named ones that the value was made of
    right: bool | None = None  # where several rewards make the value: what the first, verifiable one says
    problem: str = field(default="", compare=False)  # of `invalid`: the error, as people read it

    @property
    def correct(self) -> bool:
        """Of a verifiable prompt: whether the answer is right."""
        return self.value > 0 if self.right is None else self.right


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion and its reward."""

    completion: Completion
    score: Score


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All rollouts of one prompt at one step, ordered by sample index."""

    prompt: Prompt
    step: int  # the step that consumes it
    rollouts: tuple[Rollout, ...]
    wave: int | None = None  # with sync.streaming: in which part of the step it was complete and judged

    @property
    def judged(self) -> tuple[Rollout, ...]:
        """The rollouts whose reward says something: a timeout or a death is no evidence against an answer."""
        return tuple(rollout for rollout in self.rollouts if rollout.score.status == "ok")


@dataclass(frozen=True, slots=True)
class Sequence:
    """One training sequence: prompt and completion, with what its loss needs."""

    prompt_ids: TokenIds
    completion_ids: TokenIds
    rollout_log_probs: LogProbs = NO_LOG_PROBS  # one a completion token; none for supervised data
    advantage: float = 0.0
    group: int = -1  # whom it is compared with: every chosen with every rejected of the same number; -1: nobody
    chosen: bool = False  # in its group
    reward: float = 0.0
    values: Mapping[str, float] = field(default_factory=dict, hash=False)  # what its algorithm attached; the same names in all

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion together."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(slots=True)
class Microbatch:
    """One packed row of segments. Position t predicts `targets[t]`; only completion tokens are targets."""

    token_ids: torch.Tensor  # [T] int64
    targets: torch.Tensor  # [T] int64, IGNORED where nothing is learned
    target_positions: torch.Tensor  # [L] int64, rising: where there is a target; in a row without one, position 0
    position_ids: torch.Tensor  # [T] int64, from 0 in every sequence; a sample goes on where the prompt that it shares ended
    cu_seqlens: torch.Tensor  # [B + 1] int32, row boundaries of the segments
    parents: torch.Tensor  # [B] int64, the segment of the shared prompt that a segment goes on from, -1 for none
    advantages: torch.Tensor  # [B] float32
    rewards: torch.Tensor  # [B] float32
    values: dict[str, torch.Tensor]  # [B] float32 each, by the name that the algorithm gave; none in an empty microbatch
    rollout_log_probs: torch.Tensor  # [T] float32, 0 where the target is IGNORED
    pairs: torch.Tensor  # [P, 2] int64, (chosen, rejected) as indices into the B segments, of groups that are all here
    pair_weights: torch.Tensor  # [P] float32, 1 / number of pairs of its group
    groups: torch.Tensor  # [B] int64, the sequence's group, -1 for none
    places: torch.Tensor  # [B] int64, the sequence's place in the step, which orders those of a group; -1 for no sequence
    split: torch.Tensor  # [B] bool, whether the sequence's group is split over several microbatches or ranks
    chosen: torch.Tensor  # [B] bool
    # The rest is filled by Policy.score on the last stage
    reference_log_probs: torch.Tensor | None = None  # [T] float32
    log_square_probs: torch.Tensor | None = None  # [T] float32: log of the sum of the policy's squared probabilities
    split_gradients: torch.Tensor | None = None  # [T] float32, derivative of the split groups' loss by each token log-prob
    split_loss: torch.Tensor | None = None  # the split groups' loss, on one microbatch
    split_metrics: dict[str, torch.Tensor] = field(default_factory=dict)  # their metrics, on the same microbatch


@dataclass(frozen=True, slots=True)
class Batch:
    """What one data-parallel rank trains on in one step; the counts are those of the whole step, over all ranks."""

    step: int
    microbatches: tuple[Microbatch, ...]
    num_prompts: int  # all prompts of the step, skipped ones included
    num_groups: int  # prompts that have a pair, or more
    num_target_tokens: int
    num_sequence_tokens: int = 0  # prompts and completions, a prompt counted for each of its samples
    num_saved_tokens: int = 0  # of them, what rows do not hold since samples share prompts
    num_spread_groups: int = 0  # groups of which several data-parallel ranks have sequences
    num_spread_rows: int = 0  # of this rank's microbatches, the first ones: those with such groups alone
