"""What an exported model says of itself: README.md, a model card with a front matter as the Hugging Face hub reads it, and
generation_config.json, by which transformers and vLLM ask it as its accuracy was measured. Everything comes from what the run
wrote down; what is on no record is left out. Nothing is judged here, and no weight is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.core.errors import ConfigError, DataError
from engine.core.files import atomic_write
from engine.core.jsonl import read_rows
from engine.data.records import HUB, records, source_digest
from engine.data.templates import NAMED, NO_CHAT, TEMPLATE_DATE, PromptForm, encode_prompt, load_tokenizer, read_chat_template
from engine.models.config_file import CONFIG, GENERATION_CONFIG, read_end_ids
from engine.observe.origin import Origin
from engine.observe.summary import EVALUATION
from engine.run.checkpoint import BEST, best, read_manifest

CARD, TEMPLATE_FILE = "README.md", "chat_template.jinja"
LICENSE = re.compile(r"^(license|license_name|license_link):\s*(\S.*)$", re.MULTILINE)
FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def complete(folder: Path, checkpoint: Path) -> None:
    """Writes the card and the generation config of a policy that was exported from `checkpoint` into `folder`.
    CheckpointError for a manifest that cannot be read, DataError for a record of the run that cannot, StorageError where
    nothing can be written."""
    made = Made.read(checkpoint)
    _write(folder / GENERATION_CONFIG, json.dumps(generation_config(folder, made), indent=2) + "\n")
    _write(folder / CARD, card(made, folder))


def generation_config(folder: Path, made: Made) -> dict[str, Any]:
    """How the model was asked when its accuracy was measured: the end tokens that it was trained with, the evaluation's
    temperature and top-p, no top-k (which transformers would set to 50) and no penalty, and the longest answer of training."""
    file, asked = folder / GENERATION_CONFIG, made.config["evaluation"]
    said = json.loads(file.read_text("utf-8")) if file.exists() else {}
    kept = {name: value for name, value in said.items() if name.endswith("_token_id") or name == "transformers_version"}
    if "eos_token_id" not in kept and (ends := read_end_ids(folder).get(CONFIG)):
        kept["eos_token_id"] = list(ends)
    if stops := [one for one in made.config["sampling"].get("stop", ()) if isinstance(one, int)]:
        ends = kept.get("eos_token_id", [])
        kept["eos_token_id"] = list(dict.fromkeys([*([ends] if isinstance(ends, int) else ends), *stops]))
    sampled = {"do_sample": True, "temperature": asked["temperature"], "top_p": asked["top_p"], "top_k": 0}
    how = sampled if asked["temperature"] > 0 else {"do_sample": False}
    return kept | how | {"max_new_tokens": made.config["sampling"]["max_tokens"]}


@dataclass(frozen=True)
class Made:
    """What a checkpoint and the records beside it say."""

    name: str  # of the run
    step: int
    config: Mapping[str, Any]  # the configuration, as JSON has it
    digests: Mapping[str, str | None]  # of data files and of what judges
    made_with: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]  # up to `step`, in their order
    samples: Sequence[Mapping[str, Any]]  # greedy answers of `step`
    findings: Sequence[Mapping[str, Any]]  # of the guard, before `step`
    times: tuple[float, float] | None  # Unix seconds of the first and the last step
    chosen: bool  # as the best of several
    fork: Origin | None = None  # where its run comes from, if from another

    @classmethod
    def read(cls, checkpoint: Path) -> Made:
        """Of a checkpoint's folder: its manifest, and the records of its run where it lies in one."""
        manifest, run = read_manifest(checkpoint), checkpoint.parent.parent
        step, named = int(manifest["step"]), str(manifest["config"]["run"]["directory"])

        def rows(name: str) -> Iterator[dict[str, Any]]:
            inside = checkpoint.parent.name == "checkpoints" and (run / name).exists()
            form: dict[str, Any] = EVALUATION if name == "evaluations.jsonl" else {"numbers": name == "metrics.jsonl"}
            return read_rows(run / name, **form) if inside else iter(())

        own, before = list(rows("evaluations.jsonl")), (manifest.get("records") or {}).get("judged", [])
        fork = Origin.from_json(manifest["fork"]) if "fork" in manifest else None
        # A fork's own records begin where it does; what its checkpoint knows of before is its origin's.
        judged = [row for row in before if not own or (fork is not None and row["step"] < fork.step)] + own
        seconds = list[float]()  # when the first and the last step ended
        for row in rows("metrics.jsonl"):
            if row["step"] < step and "unix_seconds" in row:
                seconds[1:] = [row["unix_seconds"]]
        pointer = checkpoint.parent / BEST
        return cls(
            name=Path(named).name,
            step=step,
            config=manifest["config"],
            digests=manifest["data"],
            made_with=manifest.get("made_with") or {},
            evaluations=[row for row in judged if row["step"] <= step],
            samples=[row for row in rows("samples.jsonl") if row["step"] == step],
            findings=[row for row in rows("guard.jsonl") if row["step"] < step],
            times=(seconds[0], seconds[-1]) if seconds else None,
            chosen=pointer.exists() and best(checkpoint.parent) == checkpoint,
            fork=fork,
        )

    @property
    def base(self) -> str:
        """What the model that training started from is called: its folder, or its name on the hub where that is the hub's own
        cache (`models--OWNER--NAME/snapshots/REVISION`)."""
        path = Path(self.config["model"]["path"])
        cached = next((part for part in path.parts if part.startswith("models--")), None)
        return cached.removeprefix("models--").replace("--", "/") if cached else path.name

    @property
    def sources(self) -> list[Mapping[str, Any]]:
        """The tables of the run's sources of prompts."""
        data = self.config["data"]
        return [data, *data.get("mix", ())]

    @cached_property
    def example(self) -> tuple[PromptForm, str, str | None]:
        """(form, problem, greedy answer) of one that was recorded and that `form` makes the recorded tokens of, else the first
        source's form, no problem and None."""
        forms = [_form(source, self.config["data"]) for source in self.sources]
        folder = Path(self.config["model"]["path"])
        if self.samples and folder.is_dir():
            tokenizer = load_tokenizer(folder)
            for sample in self.samples:
                for form in forms:
                    try:
                        chat = read_chat_template(form.chat_template or "tokenizer")
                        asked = PromptForm(form.template, form.system, chat)
                        found = encode_prompt(tokenizer, sample["problem"], asked)
                    except (ConfigError, DataError):
                        continue
                    if list(found) == sample["prompt_ids"]:
                        return form, sample["problem"], sample["text"]
        return forms[0], "", None


def _form(source: Mapping[str, Any], data: Mapping[str, Any]) -> PromptForm:
    """How a source's problems are put; `chat_template` is what data.chat_template says."""
    template = source["template"]
    return PromptForm(NAMED.get(template, template), source.get("system", ""), data.get("chat_template", "tokenizer"))


def card(made: Made, folder: Path) -> str:
    """The model card; `folder`: where the exported model is, whose chat template is looked at."""
    config, algorithm = made.config, made.config["algorithm"]
    regime = _regime(config["sync"]["sync_interval"])
    conversational = [] if config["data"].get("chat_template") == "none" else ["conversational"]
    front = {
        "base_model": made.base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **_license(Path(config["model"]["path"])),
        "tags": ["semion", "reinforcement-learning", _name(algorithm["loss"]), regime, *conversational],
    }
    head = (
        f"`{made.base}` after {made.step} steps of {regime} reinforcement learning with the loss `{_name(algorithm['loss'])}`"
    )
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items()) + "---",
        f"# {made.name}",
        f"{head}, made by Semion and written by `semion export` from the run's own records. What is on no record is left out.",
        _accuracy(made),
        _how_to_ask(made, folder),
        _training(made),
        _data(made),
        _made_with(made),
        _limits(made),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _accuracy(made: Made) -> str:
    """A table of the first and the last judgement of each held-out set."""
    lines = []
    for name in dict.fromkeys(row["set"] for row in made.evaluations):
        rows = [row for row in made.evaluations if row["set"] == name]
        for row in dict((row["step"], row) for row in (rows[0], rows[-1])).values():
            graded = row["measure"] == "reward"
            mean, error = (_figure(row[figure], graded=graded) for figure in ("mean", "standard_error"))
            count = f"{row['num_problems']} × {row['num_seeds']}"
            shown = f"{mean} ± {error}" if row["standard_error"] else f"{mean} (no spread among the problems)"
            cells = [name, str(row["step"]), row["measure"], shown, count, _figure(row["truncated"])]
            lines.append(cells)
    if not lines:
        return ""
    asked = made.config["evaluation"]
    heading = ["set", "steps", "measure", "mean ± standard error", "problems × samples", "cut off"]
    how = (
        f"Problems that were held out, asked at temperature {asked['temperature']:g} and top-p {asked['top_p']:g}, with at "
        f"most {made.config['sampling']['max_tokens']} tokens an answer; the standard error is clustered by problem. Step 0 is "
        f"the model that training started from."
    )
    return f"## Before and after\n\n{how}\n\n{_table(heading, lines)}"


def _how_to_ask(made: Made, folder: Path) -> str:
    form, problem, answer = made.example
    templates = dict.fromkeys(_form(source, made.config["data"]).template for source in made.sources)
    others = [template for template in templates if template != form.template]
    transformers, vllm = _code(form, problem, _carried_template(made, folder))
    parts = [
        "## How to ask it",
        f"The model was trained on problems put into this text ({{problem}} stands for the problem), and its accuracy is that "
        f"of such questions:\n\n{_fenced(form.template)}",
    ]
    if others:
        parts.append("Other prompts of the run were put so:\n\n" + "\n\n".join(map(_fenced, others)))
    parts.append(f"With `transformers`, in the folder of this file:\n\n{_fenced(transformers, 'python')}")
    if answer is not None:
        parts.append(f"At the end of training it said to this, greedily:\n\n{_fenced(answer)}")
    parts += [
        "`generation_config.json` has the temperature, the top-p and the length of answer of the evaluations above, and the "
        "end tokens of training. Without `do_sample=False` the model is asked as it was judged.",
        f"With vLLM, after the lines above up to `messages`:\n\n{_fenced(vllm, 'python')}",
    ]
    return "\n\n".join(parts)


def _carried_template(made: Made, folder: Path) -> str | None:
    """The name of the chat template's file where the run had one of its own and the exported folder does not have it."""
    said = made.config["data"].get("chat_template", "tokenizer")
    if said in ("tokenizer", "none"):
        return None
    file = folder / TEMPLATE_FILE
    there = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
    return None if there == made.digests.get("data.chat_template") else Path(said).name


def _code(form: PromptForm, problem: str, template_file: str | None) -> tuple[str, str]:
    """Python that asks the model through transformers, and what differs through vLLM."""
    bare = form.chat_template in ("none", NO_CHAT)
    system = [f'{{"role": "system", "content": {form.system!r}}}'] if form.system else []
    user = '{"role": "user", "content": TEMPLATE.replace("{problem}", problem)}'
    asked = f"messages = [{', '.join([*system, user])}]"
    chat = f', chat_template=open("{template_file}").read()' if template_file else ""
    render = [
        "prompt = tokenizer.apply_chat_template(",
        f'    messages, add_generation_prompt=True, tokenize=False, date_string="{TEMPLATE_DATE}"{chat}',
        ")",
        'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
    ]
    joined = [
        'prompt = "\\n\\n".join(message["content"] for message in messages)',
        'inputs = tokenizer(prompt, return_tensors="pt")',
    ]
    transformers = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"TEMPLATE = {form.template!r}",
        f"problem = {problem!r}" if problem else 'problem = "..."  # yours',
        asked,
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")',
        *(joined if bare else render),
        "output = model.generate(**inputs, do_sample=False)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    ask = (
        "llm.generate(prompt, sampling)"
        if bare
        else f'llm.chat(messages, sampling{chat}, chat_template_kwargs={{"date_string": "{TEMPLATE_DATE}"}})'
    )
    vllm = [
        "from vllm import LLM",
        "",
        'llm = LLM(".")',
        "sampling = llm.get_default_sampling_params()  # those of generation_config.json",
        *(joined[:1] if bare else ()),
        f"print({ask}[0].outputs[0].text)",
    ]
    return "\n".join(transformers), "\n".join(vllm)


def _training(made: Made) -> str:
    config = made.config
    algorithm, sync, sources = config["algorithm"], config["sync"], made.sources
    own = {name: value for name, value in algorithm.items() if name not in ("loss", "samples_per_prompt") and value is not None}
    prompts = sum(source["prompts_per_step"] for source in sources)
    rate = config["optimizer"]
    reference = {"never": "the model at the start", "follow": "follows the generator"}
    rewards = dict.fromkeys(_name(name) for source in sources for name in _listed(source["reward"]))
    rows = [
        ["steps", f"{made.step} of {config['run']['steps']}"],
        ["loss", f"`{_name(algorithm['loss'])}`: " + ", ".join(f"{key} {_name(value)}" for key, value in own.items())],
        ["s (steps between weight syncs)", f"{sync['sync_interval']}, {_regime(sync['sync_interval'])}"],
        ["reference", reference.get(sync["reference"], f"every {sync['reference']} steps")],
        ["rollouts a step", f"{prompts} prompts × {algorithm['samples_per_prompt']} samples"],
        ["reward", ", ".join(f"`{name}`" for name in rewards)],
        ["sampling", _sampling(config["sampling"])],
        ["longest prompt and answer", f"{config['data']['max_prompt_tokens']}, {config['sampling']['max_tokens']} tokens"],
        ["learning rate", f"{rate['learning_rate']:g}, {_name(rate.get('schedule', 'constant'))}"],
        ["weights while training", config["model"]["dtype"]],
        ["seed", str(config["run"]["seed"])],
    ]
    if made.fork is not None:
        named = f"`{Path(made.fork.run).name}` after {made.fork.step} steps, checkpoint `{made.fork.checkpoint}`"
        rows += [["forked from", named], ["changed from it", made.fork.differences()]]
    if config["data"].get("replay"):
        rows.append(["trained on", f"`{_place(config['data']['replay'])}`, replayed"])
    return "## Training\n\n" + _table(["", ""], rows)


def _sampling(asked: Mapping[str, Any]) -> str:
    said = [f"temperature {asked['temperature']:g}", f"top-p {asked['top_p']:g}"]
    said += [f"top-k {asked['top_k']}"] if asked.get("top_k") else []
    said += [f"min-p {asked['min_p']:g}"] if asked.get("min_p") else []
    said += [f"ends at {', '.join(f'`{one!r}`' for one in asked['stop'])} too"] if asked.get("stop") else []
    return ", ".join(said)


def _data(made: Made) -> str:
    """A row a file: its name, its SHA-256 as the run began with it, and its rows where it is still there, unchanged."""
    lines = []
    for option, path in _files(made.config["data"]):
        digest = made.digests.get(option)
        if digest is not None:
            lines.append([f"`{option}`", f"`{_place(path)}`", _num_rows(path, digest), f"`{digest}`"])
    return "## Data\n\n" + _table(["option", "file", "rows", "SHA-256"], lines) if lines else ""


def _files(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for place, source in enumerate([data, *data.get("mix", ())]):
        key = f"data.mix[{place - 1}]" if place else "data"
        yield from ((f"{key}.{name}", source[name]) for name in ("train", "held_out") if source.get(name))
    if data.get("replay"):
        yield "data.replay", data["replay"]


def _num_rows(path: str, digest: str) -> str:
    """Counted in the file; empty where it is not the one that the run read, or not here."""
    if path.startswith(HUB) or not Path(path).exists() or source_digest(path) != digest:
        return ""
    return f"{sum(1 for _ in records(path, None)):,}"


def _made_with(made: Made) -> str:
    found, trainer = made.made_with, made.config["trainer"]
    layout = {"tensor": "tensor_parallel", "pipeline": "pipeline_parallel", "data": "data_parallel"}
    rows = []
    if made.times is not None:
        first, last = (datetime.fromtimestamp(seconds, UTC) for seconds in made.times)
        rows.append(["when", f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"])
    ranks = ", ".join(f"{name} {trainer[option]}" for name, option in layout.items())
    rows.append(["layout", f"trainer: {ranks}; {made.config['inference']['engines']} engines"])
    if found:
        on = found.get("gpu") or (found.get("processor") and f"{found['processor']}, {found['cores']} cores, no GPU")
        rows += [["machine of the first trainer rank", on]] if on else []
        revision = f", commit {found['commit']}" if found.get("commit") else ""
        rows.append(["Semion", f"{found['semion']}{revision}"])
        rows.append(["libraries", ", ".join(f"{name} {number}" for name, number in found["versions"].items())])
    return "## Made with\n\n" + _table(["", ""], rows)


def _limits(made: Made) -> str:
    config = made.config
    found = [
        f"Trained on prompts of at most {config['data']['max_prompt_tokens']} tokens and on answers of at most "
        f"{config['sampling']['max_tokens']}; longer ones were never seen in this training.",
        "Asked in another form than the one above it may answer otherwise, and worse: its accuracy was not measured so.",
        "Rewards were "
        + ", ".join(dict.fromkeys(f"`{_name(name)}`" for source in made.sources for name in _listed(source["reward"])))
        + ": what they do not see was not trained for. No other judgement, of safety for one, is on record.",
    ]
    if not made.evaluations:
        found.append("No evaluation on held-out problems is on record.")
    if made.chosen:
        found.append("It is the best of its run's checkpoints by the held-out sets above, which flatters its figures there.")
    found += [f"The run's guard found, at step {row['step']}: {row['text']}" for row in made.findings]
    return "## Limits\n\n" + "\n".join(f"- {text}" for text in found)


def _license(base: Path) -> dict[str, str]:
    """What the model card of the model that training started from says of its license, where there is one to read."""
    file = base / CARD
    front = FRONT.match(file.read_text("utf-8", errors="replace")) if file.is_file() else None
    return {name: value.strip().strip("'\"") for name, value in LICENSE.findall(front[1])} if front else {}


def _regime(interval: int | str) -> str:
    return "offline" if interval == "never" else "online" if interval == 1 else "semi-online"


def _name(value: Any) -> str:
    """An option's value; of a part of the user's own without the folders of this machine."""
    text = str(value)
    return Path(text).name if "/" in text and not text.startswith(HUB) else text


def _place(path: str) -> str:
    return path if path.startswith(HUB) else Path(path).name


def _listed(reward: str | Sequence[str]) -> Sequence[str]:
    return (reward,) if isinstance(reward, str) else reward


def _figure(value: float | None, *, graded: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if graded else f"{value:.1%}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _fenced(text: str, language: str = "") -> str:
    """A block of code that no line of the text closes."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _write(file: Path, text: str) -> None:
    with atomic_write(file) as part:
        part.write_text(text, encoding="utf-8")
