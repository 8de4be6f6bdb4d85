"""Recomputes the steps of a finished run in float64 and compares them with what the run wrote down, with code of its own: a
Llama in plain torch, and the paper's equations again. It imports nothing of the engine (tests/unit/tools holds that), samples
nothing, judges nothing and takes no optimizer step: rewards and tokens are those of the ledger.

    tools/golden_check.py RUN_DIRECTORY [--tolerance 4e-7] [--float32]

Checked is every step whose weights are on disk: the seed model's at step 0, then those of checkpoints/ (`checkpoint.every` and
`checkpoint.keep` decide which are there), and of the reference alike. For each: the loss, its gradient's norm by autograd, and
the metrics of its row of metrics.jsonl that depend on log-probs; and the sampled tokens' log-probs that the ledger records.
The exit status is 1 where a loss differs by more than --tolerance of the sizes of the terms that it is a sum of, or another
figure by more than its line says, 2 where the run cannot be recomputed. --float32 computes everything once more with this
file's own model in float32: how far that is off is what float32 can do, whoever computes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

Tensor = torch.Tensor
# Of the sizes of a loss's terms, which are the loss itself unless they cancel: on policy all ratios of GRPO are 1 and
# advantages add up to 0, so that the terms may be many times the loss, and with responses of one length nothing but rounding
# is left of it, though much of its gradient. What float32 adds up is wrong by a share of the terms, not of what remains
LOSS_TOLERANCE = 4e-7
# Of everything else that float32 computes: relative to the figure, absolute below 1
TOLERANCES = {"grad_norm": 1e-5, "rollout log-probs": 1e-4}
OTHERS = 1e-5
TINY = 1e-300
TEMPLATES = {  # the paper's figures 4 and 5
    "figure4": "Given the following problem, reason and give a final answer to the problem. Problem: {problem}\n"
    "Your response should end with 'The final answer is $\\boxed{[answer]}$. I hope it is correct.' "
    "where [answer] is the response to the problem.",
    "figure5": "{problem}",
}
WITH_ADVANTAGES, WITHOUT_PAIRS = ("grpo", "cispo"), ("grpo", "cispo", "oapl")
VERIFIABLE = {"math": True, "model": False}  # rewards that say right or wrong, and those that give degrees


class CannotCheckError(Exception):
    """A run that this tool does not know how to recompute."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of one step."""

    step: int
    name: str
    recorded: float
    recomputed: float
    tolerance: float
    floor: float = 1.0  # the difference is taken relative to the recorded figure, or to this where that is larger

    @property
    def difference(self) -> float:
        """How far both are apart."""
        return abs(self.recorded - self.recomputed) / max(abs(self.recorded), self.floor)

    @property
    def agrees(self) -> bool:
        """False for NaN too."""
        return self.recorded == self.recomputed or self.difference <= self.tolerance


# -- the model


class Llama:
    """A Llama of a Hugging Face folder: embedding, blocks of RMS norm, rotary grouped-query attention and SwiGLU, RMS norm,
    head."""

    def __init__(self, folder: Path, *, with_gradient: bool = False, dtype: torch.dtype = torch.float64) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        if self.config["model_type"] != "llama":
            raise CannotCheckError(f"{folder}: model_type must be 'llama'; found {self.config['model_type']!r}")
        self.weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                names = tensors.keys()
                self.weights |= {name: tensors.get_tensor(name).to(dtype).requires_grad_(with_gradient) for name in names}
        self.head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        if self.config.get("tie_word_embeddings"):
            self.head = self.weights["model.embed_tokens.weight"]
        self.head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[T, V] of one sequence [T]."""
        x = self.weights["model.embed_tokens.weight"][torch.tensor(token_ids)]
        cosine, sine = self._rotations(len(token_ids))
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(prefix + "self_attn.", self._norm(x, prefix + "input_layernorm"), cosine, sine)
            x = x + self._mlp(prefix + "mlp.", self._norm(x, prefix + "post_attention_layernorm"))
        return self._norm(x, "model.norm") @ self.head.T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return x / (mean_square + self.config.get("rms_norm_eps", 1e-6)).sqrt() * self.weights[name + ".weight"]

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate, up, down = (self.weights[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
        z = x @ gate.T
        return (z * z.sigmoid() * (x @ up.T)) @ down.T

    def _attention(self, prefix: str, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        heads = self.config["num_attention_heads"]
        kv_heads = self.config.get("num_key_value_heads", heads)
        length = x.shape[0]
        q, k, v = (
            (x @ self.weights[f"{prefix}{name}_proj.weight"].T).view(length, -1, self.head_dim).transpose(0, 1)
            for name in ("q", "k", "v")
        )
        q, k = (rotated(part, cosine, sine) for part in (q, k))
        k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(self.head_dim)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return mixed.transpose(0, 1).reshape(length, -1) @ self.weights[prefix + "o_proj.weight"].T

    def _rotations(self, length: int) -> tuple[Tensor, Tensor]:
        """(cosines, sines) [T, D]."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        theta = rope.get("rope_theta") or self.config.get("rope_theta", 10000.0)
        frequencies = theta ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        kind = rope.get("rope_type", "default")
        if kind == "llama3":  # long wavelengths are stretched, those between two bounds partly
            wavelengths, before = 2 * math.pi / frequencies, rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            share = ((before / wavelengths - low) / (high - low)).clamp(0, 1)
            frequencies = share * frequencies + (1 - share) * frequencies / rope["factor"]
        elif kind != "default":
            raise CannotCheckError(f"rope_type must be 'default' or 'llama3'; found {kind!r}")
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
        angles = torch.cat([angles, angles], 1)
        return angles.cos().to(self.head.dtype), angles.sin().to(self.head.dtype)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Each half-split pair of components [.., T, D] turned by its angle."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


# -- the run


@dataclass(eq=False)
class Sample:
    """One rollout with what is recomputed of it; log-probs [L] of the response's tokens."""

    row: dict[str, Any]
    prompt: tuple[int, ...]
    policy: Tensor = field(default_factory=lambda: torch.zeros(0))
    entropy: Tensor = field(default_factory=lambda: torch.zeros(0))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0))  # log of the sum of all tokens' squared probabilities
    reference: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def reward(self) -> float:
        """Its reward."""
        return float(self.row["reward"])

    @property
    def correct(self) -> bool:
        """Of a verifiable prompt: whether the answer is right."""
        told = self.row.get("correct")
        return self.reward > 0 if told is None else bool(told)

    @property
    def truncated(self) -> bool:
        """Whether it was cut off at sampling.max_tokens."""
        return bool(self.row.get("finish_reason") == "length")

    @property
    def spans(self) -> list[list[int]]:
        """[version, number of tokens] of each version of the weights that sampled some, in their order."""
        return self.row.get("spans") or [[self.row["version"], len(self.row["token_ids"])]]

    @property
    def sampled(self) -> Tensor:
        """The log-probs that were recorded when it was sampled."""
        return torch.tensor(self.row["log_probs"], dtype=torch.float64)

    def log_probs(self, model: Llama, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """(of the response's tokens, entropy at each of their positions, log of the sum of squared probabilities there) under a
        model."""
        tokens = tuple(self.row["token_ids"])
        logits = model.logits([*self.prompt, *tokens])[len(self.prompt) - 1 : -1] / temperature
        every = logits.log_softmax(-1)
        of_tokens = every.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return of_tokens.double(), -(every.exp() * every).sum(1).double(), (2 * every).logsumexp(1).detach().double()


@dataclass(frozen=True)
class Prompt:
    """One prompt of the data, and whether its reward says right or wrong."""

    token_ids: tuple[int, ...]
    verifiable: bool | None


def rollouts(place: Path) -> dict[int, list[dict[str, Any]]]:
    """Rows by step, with tokens and log-probs: of a file of JSON lines that has them in each, or of a run's folder, where they
    stand beside the rows in Arrow streams, a batch a step."""
    if not place.exists():
        raise CannotCheckError(f"rollouts must be on record; found none at {place}")
    files = [place] if place.is_file() else sorted([*place.glob("*.jsonl"), *place.glob("*.jsonl.zst")])
    found: dict[int, list[dict[str, Any]]] = {}
    for file in files:
        with pa.input_stream(str(file)) as stream:  # unpacks what ends in .zst
            lines = stream.read().decode("utf-8").splitlines()
        for row in map(json.loads, lines):
            found.setdefault(row["step"], []).append(row)
        columns = file.with_name(f"{file.name[:8]}.arrows")
        for batch in pa.ipc.open_stream(pa.OSFile(str(columns))) if columns.exists() else ():
            step = batch.column("step")[0].as_py()
            for row, columns_of_row in zip(found.get(step, ()), batch.to_pylist(), strict=True):
                row |= columns_of_row
    if any(not row.keys() >= {"token_ids", "log_probs"} for rows in found.values() for row in rows):
        raise CannotCheckError(f"{place} must hold tokens and log-probs; found rows without: the run did not keep them")
    return found


class Run:
    """A run's directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: dict[str, Any] = tomllib.loads((directory / "config.toml").read_text("utf-8"))
        self.algorithm: dict[str, Any] = self.config["algorithm"]
        self.metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
        there = [place for place in (directory / "rollouts", directory / "rollouts.jsonl") if place.exists()]
        self.ledger = rollouts(Path(self.config["data"].get("replay") or (there or [directory / "rollouts"])[0]))
        self.interval = self.config["sync"]["sync_interval"]
        self.lookahead: int = self.config["sync"].get("lookahead", 0)
        self.in_flight: bool = self.config["sync"].get("in_flight", False)
        self._require()

    def _require(self) -> None:
        sync, data = self.config["sync"], self.config["data"]
        known = {
            "algorithm.loss": (self.algorithm["loss"], ("dpo", "group_dpo", "grpo", "cispo", "oapl")),
            "algorithm.pairing": (self.algorithm.get("pairing", "random"), ("random", "best_worst")),
            "algorithm.normalize_advantages": (
                self.algorithm.get("normalize_advantages", "mean"),
                ("mean", "mean_std", "leave_one_out"),
            ),
            "sync.reference_mix": (sync.get("reference_mix", 1.0), (1.0,)),
            "sync.semantics": (sync.get("semantics", "paper"), ("paper",)),
            "sampling.top_p": (self.config["sampling"]["top_p"], (1.0,)),
        }
        for option, (found, choices) in known.items():
            if found not in choices:
                raise CannotCheckError(f"{option} must be one of {', '.join(map(str, choices))}; found {found!r}")
        if data.get("replay") and not Path(data["replay"]).name.endswith(".jsonl"):
            raise CannotCheckError(f"data.replay must be a ledger of rollouts; found {data['replay']}")

    def sources(self) -> dict[str, dict[str, Any]]:
        """The sources of prompts by the name of their table."""
        data = self.config["data"]
        return {"data": data} | {f"data.mix[{i}]": source for i, source in enumerate(data.get("mix", []))}

    @property
    def shares(self) -> list[tuple[int, int]]:
        """Of each source: how many prompts are sampled for a step, and how many the step counts."""
        places = [(s["prompts_per_step"], s.get("spare_prompts", 0)) for s in self.sources().values()]
        return [(count + spare, count) for count, spare in places]

    @property
    def temperature(self) -> float:
        """Of the distribution that the log-probs are of: the one sampled from, where the loss has ratios to it."""
        ratios = self.algorithm["loss"] in WITHOUT_PAIRS or self.algorithm.get("alpha", 0) > 0
        return float(self.config["sampling"]["temperature"]) if ratios else 1.0

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the reference."""
        return self.algorithm["loss"] not in WITHOUT_PAIRS or self.algorithm.get("kl_weight", 0) > 0

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        """All prompts by id: the row's own, or the first 16 hex digits of the SHA-256 of its text."""
        tokenizer = AutoTokenizer.from_pretrained(self.config["model"]["path"], local_files_only=True)
        found: dict[str, Prompt] = {}
        for source in self.sources().values():
            template = TEMPLATES.get(source["template"], source["template"])
            reward = source["reward"]
            for line in Path(source["train"]).read_text("utf-8").splitlines():
                row = json.loads(line) if line.strip() else {}
                problem = row.get("problem") or row.get("prompt") or row.get("question")
                if not isinstance(problem, str):
                    continue
                message = [{"role": "user", "content": template.replace("{problem}", problem)}]
                ids = tokenizer.apply_chat_template(
                    message, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
                )
                verifiable = VERIFIABLE.get(reward) if isinstance(reward, str) else None
                name = str(row.get("id") or hashlib.sha256(problem.encode()).hexdigest()[:16])
                found[name] = Prompt(tuple(ids), verifiable)
        return found

    def weights(self, step: int) -> Path | None:
        """The folder of the weights after so many optimizer steps; None where they are not on disk."""
        folder = self.directory / "checkpoints" / f"step_{step:08d}" / "policy" if step else Path(self.config["model"]["path"])
        return folder if (folder / "config.json").exists() else None

    def synced(self, step: int) -> int:
        """The steps in the weights that engines took last before `step`: a sync is due where t % s == 0, or where s is decided
        on the way, there is one on record."""
        if self.interval == "auto":
            return max(row["step"] for row in self.metrics[: step + 1] if "sync_seconds" in row)
        return 0 if self.interval == "never" else step // int(self.interval) * int(self.interval)

    def version(self, step: int) -> int:
        """The steps in the weights that sample for `step`: those of the last sync, or of so many before it as are sampled
        ahead."""
        if not self.lookahead:
            return self.synced(step)
        return max(0, self.synced(step) - self.lookahead * int(self.interval))

    def versions(self, step: int) -> list[int]:
        """The steps in all weights that may have sampled tokens of `step`: one, or with sync.in_flight those of every sync from
        that one to the last before the step's own."""
        first = self.version(step)
        if not self.in_flight:
            return [first]
        return list(range(first, max(0, self.synced(step) - int(self.interval)) + 1, int(self.interval)))

    def reference_step(self, step: int) -> int:
        """The steps in the reference's weights at `step`."""
        reference = self.config["sync"]["reference"]
        if reference == "never":
            return 0
        return self.synced(step) if reference == "follow" else step // int(reference) * int(reference)

    def groups(self, step: int) -> list[list[Sample]]:
        """The step's rollouts by prompt, in the ledger's order."""
        count, rows = self.algorithm["samples_per_prompt"], self.ledger[step]
        groups = [rows[start : start + count] for start in range(0, len(rows), count)]
        if len(groups) != sum(sampled for sampled, _ in self.shares):
            raise CannotCheckError(
                f"step {step}: the ledger must hold {count} rollouts of each prompt that a step has; found {len(rows)} rows"
            )
        made = []
        for group in groups:
            (name,) = {row["prompt_id"] for row in group}
            prompt = self.prompts.get(name)
            digests = {row.get("prompt_tokens") for row in group} - {None}
            if prompt is None or digests - {hashlib.sha256(",".join(map(str, prompt.token_ids)).encode()).hexdigest()[:16]}:
                raise CannotCheckError(f"step {step}: prompt {name} has other tokens here than in the ledger, or is not there")
            made.append([Sample(row, prompt.token_ids) for row in group])
        return made

    def verifiable(self, group: Sequence[Sample]) -> bool:
        """Whether the rewards of a group say right or wrong."""
        told = self.prompts[group[0].row["prompt_id"]].verifiable
        if told is None:
            raise CannotCheckError("data.reward must be 'math' or 'model', or nobody knows whether it says right or wrong")
        return told


# -- the losses


def sides(group: Sequence[Sample], verifiable: bool, options: Mapping[str, Any]) -> tuple[list[Sample], list[Sample]]:
    """Correct and incorrect; of degrees, those above the group's mean and the others. What was cut off is not chosen, unless
    asked for."""
    mean = math.fsum(s.reward for s in group) / max(1, len(group))
    better = [s for s in group if (s.correct if verifiable else s.reward > mean)]
    return [s for s in better if choosable(s, options)], [s for s in group if s not in better]


def choosable(sample: Sample, options: Mapping[str, Any]) -> bool:
    """Whether it may be the chosen one of a pair."""
    return not sample.truncated or bool(options.get("choose_truncated"))


def drawn_pair(run: Run, step: int, whole: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """DPO's one pair of a prompt, or none. Where several responses would do, Python's random.Random draws the chosen one and
    then the rejected, seeded by what names the draw: the upper 63 bits of the 8-byte BLAKE2b of the run's seed, "pair", the
    step, the prompt's id and its first sample index, with the separator U+001F."""
    first = whole[0].row
    text = "\x1f".join([str(run.config["run"]["seed"]), "pair", str(step), first["prompt_id"], str(first["sample_index"])])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    draw = random.Random(int.from_bytes(digest, "big") >> 1)
    group = judged(whole)
    if run.algorithm.get("pairing", "random") == "random" and run.verifiable(whole):
        better, worse = sides(group, True, run.algorithm)
    else:
        able = [s for s in group if choosable(s, run.algorithm)]
        highest, lowest = max((s.reward for s in able), default=0.0), min((s.reward for s in group), default=0.0)
        better = [s for s in able if s.reward == highest > lowest]
        worse = [s for s in group if s.reward == lowest < highest]
    return [(draw.choice(better), draw.choice(worse))] if better and worse else []


def judged(group: Sequence[Sample]) -> list[Sample]:
    """Those whose reward says something."""
    return [s for s in group if s.row["status"] == "ok"]


def advantages(rewards: Sequence[float], normalize: str) -> list[float]:
    """Each reward minus its group's mean; over the deviation of the group, or minus the others' mean, where asked."""
    if not rewards or max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    factor = 1.0
    if normalize == "mean_std":
        factor = 1 / math.sqrt(math.fsum(c * c for c in centred) / len(rewards))
    elif normalize == "leave_one_out":
        factor = len(rewards) / (len(rewards) - 1)
    return [factor * c for c in centred]


@dataclass
class Trained:
    """What a step trains on, or what one prompt gives it."""

    pairs: list[list[tuple[Sample, Sample]]] = field(default_factory=list)  # of each prompt that has some
    credited: list[tuple[Sample, float]] = field(default_factory=list)  # responses and their advantages
    shares: list[float] = field(default_factory=list)  # OAPL's of each of them
    sequences: list[Sample] = field(default_factory=list)  # all of them, each once

    @property
    def has_signal(self) -> bool:
        """A pair, or an advantage."""
        return bool(self.pairs) or any(credit for _, credit in self.credited)


def contribution(run: Run, step: int, whole: Sequence[Sample]) -> Trained:
    """What one prompt gives. Without a signal it gives nothing, but for a KL term, which GRPO has of such prompts too."""
    options, group = run.algorithm, judged(whole)
    if options["loss"] == "dpo":
        pairs = drawn_pair(run, step, whole)
        return Trained([pairs], sequences=list(pairs[0])) if pairs else Trained()
    found = Trained(sequences=list(group))
    if options["loss"] == "oapl":
        credit = optimal_advantages([s.reward for s in group], options.get("value_beta", 1.0))
        found.credited, found.shares = list(zip(group, credit, strict=True)), [1 / max(1, len(group))] * len(group)
        return found
    if options["loss"] == "group_dpo":
        better, worse = sides(group, run.verifiable(whole), options)
        found.pairs = [[(b, w) for b in better for w in worse]] if better and worse else []
        if not options["alpha"]:
            found.sequences = [s for s in group if s in better or s in worse]
    if options["loss"] in WITH_ADVANTAGES or options["alpha"] > 0:
        credit = advantages([s.reward for s in group], options["normalize_advantages"])
        found.credited = list(zip(group, credit, strict=True))
    with_kl = bool(found.credited) and options["kl_weight"] > 0
    return found if found.has_signal or with_kl else Trained()


def trained(run: Run, step: int, groups: Sequence[Sequence[Sample]]) -> Trained:
    """What a step trains on. Where a source has spare prompts, the first ones with a signal, and where those are too few the
    first without one beside them, in order."""
    total, start = Trained(), 0
    for sampled, places in run.shares:
        found = [contribution(run, step, whole) for whole in groups[start : start + sampled]]
        start += sampled
        ranked = sorted(range(sampled), key=lambda i: (not found[i].has_signal, i)) if sampled > places else range(sampled)
        for i in sorted(ranked[:places]):
            total.pairs += found[i].pairs
            total.credited += found[i].credited
            total.shares += found[i].shares
            total.sequences += found[i].sequences
    return total


def optimal_advantages(rewards: Sequence[float], beta: float) -> list[float]:
    """OAPL's: each reward minus beta times the log of the mean of exp(reward / beta)."""
    highest = max(rewards, default=0.0)
    mean = math.fsum(math.exp((reward - highest) / beta) for reward in rewards) / max(1, len(rewards))
    value = highest + (beta * math.log(mean) if rewards else 0.0)
    return [0.0 if max(rewards) == min(rewards) else reward - value for reward in rewards]


def compared(options: Mapping[str, Any], chosen: Sample, rejected: Sample) -> tuple[Tensor, Tensor]:
    """(the loss of one pair without its NLL, beta times its difference of log-ratios): DPO's equation 3, or IPO's 17; with
    smoothed labels, log-ratios divided by length, and WPO's weights, where asked."""
    reduce = torch.mean if options.get("average_log_probs") else torch.sum
    ratios = [reduce(s.policy - s.reference) for s in (chosen, rejected)]
    margin, smoothing = options["beta"] * (ratios[0] - ratios[1]), options.get("label_smoothing", 0.0)
    if options.get("preference_loss") == "ipo":
        loss = (ratios[0] - ratios[1] - 0.5 / options["beta"]) ** 2
    else:
        loss = (1 - smoothing) * torch.log1p((-margin).exp()) + smoothing * torch.log1p(margin.exp())
    if options.get("weight_pairs"):
        loss = loss * math.prod(float((s.policy.detach() - s.squares).mean().exp()) for s in (chosen, rejected))
    return loss, margin


def preference_terms(options: Mapping[str, Any], trained: Trained) -> tuple[Tensor, dict[str, float]]:
    """Equations 3 and 4, and the NLL of the chosen: the mean over the pairs of each prompt, summed over prompts."""
    total, margins = torch.zeros((), dtype=torch.float64), []
    for pairs in trained.pairs:
        for chosen, rejected in pairs:
            loss, margin = compared(options, chosen, rejected)
            margins.append(float(margin.detach()))
            total = total + (loss - options.get("nll_weight", 0.0) * chosen.policy.sum()) / len(pairs)
    count = len(margins)
    return total, {"pairs": float(count), "margin_mean": math.fsum(margins) / count if count else math.nan}


def weighed(options: Mapping[str, Any], sample: Sample) -> tuple[Tensor, float, float]:
    """(the constant by which an off-policy loss weighs each token [L]; its sum; tokens whose ratio is outside the bounds).
    CISPO holds each token's ratio at its bounds; a correction holds or drops those of its level."""
    gap = (sample.policy - sample.sampled).detach()
    if options["loss"] == "cispo":
        kind, level, low, high = "truncate", "token", options.get("weight_low"), options.get("weight_high", 5.0)
    else:
        kind, level = options["correction"], options.get("correction_level", "token")
        low, high = options.get("correction_low"), options.get("correction_high")
    if level != "token":
        gap = (gap.sum() if level == "sequence" else gap.mean()).expand_as(gap)
    ratio = gap.exp()
    least, most = 0.0 if low is None else low, math.inf if high is None else high
    inside = (ratio >= least) & (ratio <= most)
    weight = ratio.clamp(least, most) if kind == "truncate" else torch.where(inside, ratio, 0.0)
    return weight, float(weight.sum()), float((~inside).sum())


def gains(options: Mapping[str, Any], sample: Sample, credit: float) -> tuple[Tensor, dict[str, float]]:
    """(what each token [L] adds to the objective, sums over tokens by the names of metrics.jsonl): equation 1, its ratio that
    of the token or the geometric mean over the response (GSPO's GSPO-token, arXiv 2507.18071, equations 13 and 14), or a
    gradient weighed by a constant."""
    if options["loss"] == "cispo" or options.get("correction", "none") != "none":
        weight, total, outside = weighed(options, sample)
        cispo = options["loss"] == "cispo"
        score = sample.policy if cispo else (sample.policy - sample.policy.detach()).exp()
        return weight * credit * score, {"weight_mean": total, "outside_share": outside}
    epsilon = options["clip_ratio"]
    low, high = 1 - options.get("clip_ratio_low", epsilon), 1 + options.get("clip_ratio_high", epsilon)
    ratio = (sample.policy - sample.sampled).exp()
    if options.get("ratio_level") == "geometric":
        mean = (sample.policy - sample.sampled).mean().exp().detach()
        ratio = mean * (sample.policy - sample.policy.detach()).exp()
    free, held = ratio * credit, ratio.clamp(low, high) * credit
    gain = torch.minimum(free, held)
    if credit < 0 and "dual_clip" in options:
        gain = gain.clamp(min=options["dual_clip"] * credit)
    return gain, {"clipped_share": float((gain != free).sum())}


def rounded(options: Mapping[str, Any], sample: Sample, credit: float, gain: Tensor) -> float:
    """The size of a response's terms, as far as float32 rounds them: a log-prob is a difference of numbers of size 1 or more,
    and each token of a product over the response is wrong by its own rounding."""
    if options["loss"] == "cispo":
        weight, *_ = weighed(options, sample)
        return float((weight * abs(credit) * sample.policy.detach().abs().clamp(min=1)).sum())
    return float(gain.abs().sum()) * (len(gain) if options.get("correction_level") == "sequence" else 1)


def policy_gradient_terms(options: Mapping[str, Any], trained: Trained) -> tuple[Tensor, float, dict[str, float]]:
    """A gain of each token, with the k3 estimate of the KL to the reference; a sum over tokens. Between it and the figures: the
    sum of the sizes of its terms, which cancel on policy."""
    total, sums = torch.zeros((), dtype=torch.float64), dict[str, float]()
    size, kls, ratios, tokens = 0.0, 0.0, 0.0, 0
    for sample, credit in trained.credited:
        ratio = (sample.policy - sample.sampled).exp()
        gain, more = gains(options, sample, credit)
        sums = {name: sums.get(name, 0.0) + value for name, value in more.items()}
        loss = -gain.sum()
        size += rounded(options, sample, credit, gain.detach())
        ratios += float(ratio.detach().sum())
        if options["kl_weight"] > 0:
            d = sample.reference - sample.policy
            kl = (d.exp() - d - 1).sum()
            kls += float(kl.detach())
            loss = loss + options["kl_weight"] * kl
        total = total + loss / (len(ratio) if options.get("normalize_length") else 1)
        tokens += len(ratio)
    count = max(1, tokens)
    shares = {name: value / count for name, value in sums.items()}
    return total, size, {"kl_mean": kls / count, "ratio_mean": ratios / count, **shares}


def regression_terms(options: Mapping[str, Any], trained: Trained) -> tuple[Tensor, float, dict[str, float]]:
    """OAPL (arXiv 2602.19362, equation 3): the mean over a prompt's responses of the square of what is left of the regression,
    summed over prompts; its size, and figures."""
    total, left, ratios, tokens = torch.zeros((), dtype=torch.float64), 0.0, 0.0, 0
    for (sample, credit), share in zip(trained.credited, trained.shares, strict=True):
        gap = sample.policy - sample.sampled
        square = (options.get("ratio_beta", 1e-3) * gap.sum() - credit) ** 2
        total = total + share * square
        left += float(square.detach())
        ratios, tokens = ratios + float(gap.detach().exp().sum()), tokens + len(gap)
    figures = {"residual_square_mean": left / max(1, len(trained.credited)), "ratio_mean": ratios / max(1, tokens)}
    return total, float(total.detach()), figures


def objective(run: Run, trained: Trained, num_prompts: int) -> tuple[Tensor, float, dict[str, float]]:
    """(the step's loss, the sum of the sizes of its terms, figures that metrics.jsonl has too)."""
    options, figures = run.algorithm, dict[str, float]()
    total, size = torch.zeros((), dtype=torch.float64), 0.0
    if options["loss"] not in WITHOUT_PAIRS:
        loss, more = preference_terms(options, trained)
        total, size, figures = total + loss, float(loss.detach().abs()), figures | more
    if trained.credited:
        terms = regression_terms if options["loss"] == "oapl" else policy_gradient_terms
        loss, sizes, more = terms(options, trained)
        weight = options.get("alpha", 1.0)
        total, size, figures = total + weight * loss, size + weight * sizes, figures | more
    num_tokens = sum(len(s.policy) for s in trained.sequences)
    if options["entropy_weight"]:
        bonus = options["entropy_weight"] * sum((s.entropy.mean() for s in trained.sequences), torch.zeros(()))
        total, size = total - bonus, size + float(bonus.detach())
        figures["entropy_mean"] = sum(float(s.entropy.detach().sum()) for s in trained.sequences) / max(1, num_tokens)
    counts = {"prompts": num_prompts, "pairs": len(trained.pairs), "tokens": num_tokens}
    divisor = max(1, counts[options["reduction"]])
    return total / divisor, size / divisor, figures


# -- the check


def check(directory: Path, tolerance: float = LOSS_TOLERANCE, dtype: torch.dtype = torch.float64) -> list[Comparison]:
    """Every figure of every step whose weights are on disk, recomputed in `dtype`. CannotCheckError where nothing could be
    compared."""
    run, found = Run(directory), list[Comparison]()
    for record in run.metrics:
        step = int(record["step"])
        policy, reference = run.weights(step), run.weights(run.reference_step(step))
        if policy is not None and (reference is not None or not run.needs_reference):
            found += compare(run, step, record, policy, reference, tolerance, dtype)
    if not found:
        raise CannotCheckError(f"{directory}: the weights of no step are on disk; set checkpoint.every and checkpoint.keep")
    return found


def compare(
    run: Run,
    step: int,
    record: Mapping[str, float],
    policy: Path,
    reference: Path | None,
    tolerance: float,
    dtype: torch.dtype,
) -> Iterator[Comparison]:
    """One step."""
    groups = run.groups(step)
    allowed = [] if run.config["data"].get("replay") else run.versions(step)
    samplers = {version: Llama(folder, dtype=dtype) for version in allowed if (folder := run.weights(version)) is not None}
    if samplers:  # the log-probs that engines gave, under the weights that they are said to have had
        rollouts = [sample for group in groups for sample in group]
        versions = {version for sample in rollouts for version, _ in sample.spans}
        strange = next(iter(versions - set(allowed)), allowed[0])
        yield Comparison(step, "version", float(strange), float(allowed[0]), 0.0)
        gaps = [gap for sample in rollouts for gap in sampling_gaps(sample, samplers, run.temperature)]
        yield Comparison(step, "rollout log-probs", 0.0, max(gaps, default=0.0), TOLERANCES["rollout log-probs"])
    what, model = trained(run, step, groups), Llama(policy, with_gradient=True, dtype=dtype)
    other = Llama(reference, dtype=dtype) if reference is not None and run.needs_reference else None
    for sample in what.sequences:
        sample.policy, sample.entropy, sample.squares = sample.log_probs(model, run.temperature)
        if other is not None:
            sample.reference = sample.log_probs(other, run.temperature)[0]
    loss, size, figures = objective(run, what, sum(places for _, places in run.shares))
    yield Comparison(step, "loss", record["loss"], float(loss.detach()), tolerance, max(size, TINY))
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(model.weights.values()), allow_unused=True)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
        yield Comparison(step, "grad_norm", record["grad_norm"], norm, TOLERANCES["grad_norm"], TINY)
    for name, value in figures.items():
        if name in record and record[name] is not None and not math.isnan(record[name]):
            yield Comparison(step, name, record[name], value, OTHERS)


def sampling_gaps(sample: Sample, samplers: Mapping[int, Llama], temperature: float) -> Iterator[float]:
    """How far the recorded log-probs are from those of the version that sampled each token, where its weights are on disk; of a
    response that went on under new weights, all tokens before are read by them again."""
    first = 0
    for version, count in sample.spans:
        span = slice(first, first + count)
        first += count
        if version in samplers:
            recomputed = sample.log_probs(samplers[version], temperature)[0]
            yield float((sample.sampled - recomputed)[span].abs().max())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of a finished run")
    parser.add_argument("--tolerance", type=float, default=LOSS_TOLERANCE, help="of a loss, relative to its terms")
    parser.add_argument("--float32", action="store_true", help="show how far plain float32 is off")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        found = check(options.directory, options.tolerance)
        plain = check(options.directory, dtype=torch.float32) if options.float32 else []
    except (CannotCheckError, OSError) as error:
        print(f"golden_check: {error}", file=sys.stderr)
        return 2
    heading = f" {'float32 too':>11}" if plain else ""
    print(f"{'step':>4}  {'figure':<18} {'recorded':>16} {'in float64':>16} {'difference':>11}{heading}")
    for i, one in enumerate(found):
        mark = "" if one.agrees else f"   more than {one.tolerance:g}"
        off = f" {replace(one, recorded=plain[i].recomputed).difference:>11.1e}" if plain else ""
        print(f"{one.step:>4}  {one.name:<18} {one.recorded:>16.9g} {one.recomputed:>16.9g} {one.difference:>11.1e}{off}{mark}")
    losses = [one.difference for one in found if one.name == "loss"]
    print(f"largest difference of {len(losses)} losses, relative to their terms: {max(losses):.1e}")
    return 0 if all(one.agrees for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
