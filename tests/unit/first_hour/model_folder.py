"""The model's folder: what may be missing, broken, of another model or of another kind."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.unit.first_hour.case import Case, Made, accepted, both, fields, folders, gone, refused, tensors, text

CONFIG = "model/config.json"
WEIGHTS = "model/model.safetensors"
TOKENIZER = "model/tokenizer.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4976698672\n"
HTML = "<!DOCTYPE html><html><body>Access to this model is restricted</body></html>"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.1-8B", "r": 16}


def cut(num_bytes: int) -> Made:
    """The weights without their last bytes."""
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-num_bytes])


def sharded(change: Callable[[Path, dict[str, Any]], object] = lambda folder, index: None) -> Made:
    """The weights in two files with their index, which `change` may change."""

    def made(folder: Path) -> None:
        model = folder / "model"
        found = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        names = sorted(found)
        parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
        for file, held in parts.items():
            save_file({name: found[name] for name in held}, model / file)
        index: dict[str, Any] = {"weight_map": {name: file for file, held in parts.items() for name in held}}
        change(model, index)
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return made


def moved(folder: Path, index: dict[str, Any]) -> None:
    """An index that names a tensor in the file where it is not."""
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "model-00002-of-00002.safetensors"


def outside(folder: Path, index: dict[str, Any]) -> None:
    """An index that names a file outside the folder."""
    index["weight_map"][next(iter(index["weight_map"]))] = "../../secret.safetensors"


def of_kind(**changes: Any) -> Made:
    """A config.json of another kind of model."""
    return fields(CONFIG, **changes)


def only(*keep: str, **files: str) -> Made:
    """A folder that has these files alone."""

    def made(folder: Path) -> None:
        for file in (folder / "model").iterdir():
            if file.name not in keep:
                file.unlink()
        for name, content in files.items():
            (folder / "model" / name.replace("__", ".")).write_text(content)

    return made


def header_of(length: int) -> bytes:
    return struct.pack("<Q", length) + b"{}"


def template(content: str) -> Made:
    """A chat template of its own."""
    return both(fields("model/tokenizer_config.json", chat_template=...), text("model/chat_template.jinja", content))


def loop(folder: Path) -> None:
    """A link to itself where the model should be."""
    (folder / "loop").symlink_to(folder / "loop")


CHECK = "check run.toml "
LONG = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
CASES: list[Case] = [
    # what the path names
    refused("no folder", CHECK + "model.path=gone", 4, "model.path", "gone", "found no folder"),
    refused(
        "a model of the hub",
        CHECK + "model.path=meta-llama/Llama-3.1-8B-Instruct",
        4,
        "model.path",
        "meta-llama/Llama-3.1-8B-Instruct",
        "hf download meta-llama/Llama-3.1-8B-Instruct --local-dir",
    ),
    refused(
        "a model of the hub by its address",
        CHECK + "model.path=https://huggingface.co/meta-llama/Llama-3.1-8B",
        4,
        "model.path",
        "hf download meta-llama/Llama-3.1-8B --local-dir",
    ),
    refused(
        "a model of the hub as data are named",
        CHECK + "model.path=hf://meta-llama/Llama-3.1-8B",
        4,
        "model.path",
        "hf download meta-llama/Llama-3.1-8B --local-dir",
    ),
    refused("a bucket", CHECK + "model.path=s3://bucket/llama", 4, "model.path", "s3://bucket/llama", "download"),
    refused("a home folder in quotes", CHECK + "'model.path=~/models/llama'", 4, "model.path", "~/models/llama", "~"),
    refused("an environment variable in quotes", CHECK + "'model.path=$HOME/llama'", 4, "model.path", "$HOME/llama"),
    refused(
        "a file for the folder",
        CHECK + "model.path=model/model.safetensors",
        4,
        "model.path",
        "model.safetensors",
        "found a file",
    ),
    refused(
        "a GGUF file", CHECK + "model.path=model.gguf", 4, "model.path", "GGUF", made=text("model.gguf", b"GGUF\x03\0\0\0")
    ),
    refused("a folder with GGUF alone", CHECK + "model.path=model", 4, "model.path", "GGUF", made=only(llama__gguf="GGUF")),
    refused("an empty folder", CHECK + "model.path=empty", 4, "model.path", "config.json", made=folders("empty")),
    refused("an empty name", CHECK + """'model.path=""'""", 4, "model.path", "empty"),
    refused("a link to itself", CHECK + "model.path=loop", 4, "model.path", "loop", made=loop),
    refused(
        "a folder of a cache of the hub",
        CHECK + "model.path=models--meta-llama--Llama",
        4,
        "model.path",
        "snapshots/abc",
        made=text("models--meta-llama--Llama/snapshots/abc/config.json", "{}"),
    ),
    refused(
        "the folder of a run",
        CHECK + "model.path=old",
        4,
        "model.path",
        "semion export",
        made=both(text("old/config.toml", ""), text("old/checkpoints/LATEST", "step_00000004")),
    ),
    refused(
        "an adapter alone",
        CHECK,
        4,
        "model.path",
        "adapter",
        "merge",
        made=only(adapter_config__json=json.dumps(ADAPTER), adapter_model__safetensors="x"),
    ),
    refused(
        "an adapter beside the base's config.json",
        CHECK,
        4,
        "model.path",
        "adapter",
        "merge",
        made=only(
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            adapter_config__json=json.dumps(ADAPTER),
            adapter_model__safetensors="x",
        ),
    ),
    accepted(
        "a folder with a space, a quote and an umlaut",
        CHECK + """"model.path=my model's ü" """,
        made=lambda folder: (folder / "model").rename(folder / "my model's ü"),
    ),
    accepted("a folder with a slash behind it", CHECK + "model.path=model/"),
    # config.json
    refused("no config.json", CHECK, 4, "config.json", "model.path", made=gone(CONFIG)),
    refused("broken config.json", CHECK, 4, "config.json is not JSON", made=text(CONFIG, '{"model_type": "llama",')),
    refused("empty config.json", CHECK, 4, "config.json is not JSON", made=text(CONFIG, "")),
    refused("config.json that is a list", CHECK, 4, "config.json", "found a list", made=text(CONFIG, "[]")),
    refused(
        "config.json of another encoding",
        CHECK,
        4,
        "config.json",
        made=text(CONFIG, '{"model_type": "llämä"}'.encode("latin-1")),
    ),
    refused("config.json without a type", CHECK, 2, "model_type", "None", made=of_kind(model_type=...)),
    refused("config.json that is a page", CHECK, 4, "config.json is not JSON", made=text(CONFIG, HTML)),
    refused("config.json that git did not fetch", CHECK, 4, "config.json", "git lfs pull", made=text(CONFIG, LFS)),
    refused("a folder for config.json", CHECK, 4, "config.json", made=both(gone(CONFIG), folders(CONFIG))),
    *(
        refused(f"a model of type {kind}", CHECK, 2, "model_type", repr(kind), "llama", made=of_kind(model_type=kind))
        for kind in ("gpt2", "mistral", "mixtral", "gemma2", "deepseek_v3", "qwen3_moe", "llama4", "mllama", "phi3")
    ),
    refused("another family than the model's", CHECK + "model.family=qwen3", 2, "model_type = 'qwen3'", "'llama'"),
    refused("a family that is not there", CHECK + "model.family=bert", 2, "model.family", "'bert'", "llama"),
    refused("a family of a file that is not there", CHECK + "model.family=gone.py:F", 2, "model.family", "gone.py"),
    refused(
        "a classifier",
        CHECK,
        2,
        "LlamaForSequenceClassification",
        made=of_kind(architectures=["LlamaForSequenceClassification"]),
    ),
    refused(
        "a quantized checkpoint",
        CHECK,
        2,
        "quantization_config",
        "gptq",
        made=of_kind(quantization_config={"quant_method": "gptq", "bits": 4}),
    ),
    refused(
        "a checkpoint in FP8", CHECK, 2, "quantization_config", "fp8", made=of_kind(quantization_config={"quant_method": "fp8"})
    ),
    refused("code of its own", CHECK, 2, "auto_map", made=of_kind(auto_map={"AutoModelForCausalLM": "modeling.My"})),
    refused("biases", CHECK, 2, "attention_bias", "True", made=of_kind(attention_bias=True)),
    refused("another activation", CHECK, 2, "hidden_act", "'gelu'", made=of_kind(hidden_act="gelu")),
    refused("a sliding window", CHECK, 2, "sliding_window", "4096", made=of_kind(sliding_window=4096)),
    refused("yarn", CHECK, 2, "rope", "yarn", made=of_kind(rope_scaling=LONG)),
    refused(
        "two rotary tables",
        CHECK,
        2,
        "rope_parameters",
        "rope_scaling",
        made=of_kind(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rope_scaling=LONG),
    ),
    refused(
        "a rotary table without its numbers",
        CHECK,
        4,
        "config.json",
        "factor",
        made=of_kind(rope_scaling={"rope_type": "llama3"}),
    ),
    refused("no layers", CHECK, 4, "num_hidden_layers", made=of_kind(num_hidden_layers=0)),
    refused("negative sizes", CHECK, 4, "hidden_size", "-32", made=of_kind(hidden_size=-32)),
    refused("sizes as text", CHECK, 4, "config.json", "numbers", made=of_kind(num_hidden_layers="two")),
    refused("sizes as a list", CHECK, 4, "config.json", "numbers", made=of_kind(intermediate_size=[48, 48])),
    refused("no heads", CHECK, 4, "config.json", made=of_kind(num_attention_heads=0)),
    refused("heads that do not divide", CHECK, 4, "num_key_value_heads", "3", made=of_kind(num_key_value_heads=3)),
    refused("sizes that nobody has", CHECK, 4, "config.json", made=of_kind(vocab_size=10**30)),
    refused("a vocabulary without its size", CHECK, 4, "vocab_size", made=of_kind(vocab_size=...)),
    refused(
        "positions that hold no prompt", CHECK, 2, "inference.max_model_tokens", "64", made=of_kind(max_position_embeddings=64)
    ),
    # weights
    refused("no weights", CHECK, 4, "model.safetensors", "found neither", made=gone(WEIGHTS)),
    refused(
        "weights of torch alone",
        CHECK,
        4,
        "pytorch_model.bin",
        "convert",
        made=both(gone(WEIGHTS), text("model/pytorch_model.bin", b"PK")),
    ),
    refused(
        "weights as Meta publishes them",
        CHECK,
        4,
        "consolidated.00.pth",
        "convert",
        made=both(gone(WEIGHTS), text("model/consolidated.00.pth", b"PK")),
    ),
    refused("empty weights", CHECK, 4, "model.safetensors", "cannot be read", made=text(WEIGHTS, b"")),
    refused("weights that git did not fetch", CHECK, 4, "model.safetensors", "git lfs pull", made=text(WEIGHTS, LFS)),
    refused("weights that are a page", CHECK, 4, "model.safetensors", "cannot be read", made=text(WEIGHTS, HTML)),
    refused("header cut", CHECK, 4, "model.safetensors", "cannot be read", made=text(WEIGHTS, header_of(4096))),
    refused(
        "header of a length that nobody has",
        CHECK,
        4,
        "model.safetensors",
        "cannot be read",
        made=text(WEIGHTS, header_of(1 << 62)),
    ),
    refused("weights cut short", CHECK, 4, "model.safetensors", "cannot be read", made=cut(10)),
    refused("a folder for the weights", CHECK, 4, "model.safetensors", made=both(gone(WEIGHTS), folders(WEIGHTS))),
    refused("a tensor missing", CHECK, 4, "model.norm.weight", made=tensors(lambda found: found.pop("model.norm.weight"))),
    refused(
        "a tensor of another shape",
        CHECK,
        4,
        "model.norm.weight",
        "[32]",
        "[31]",
        made=tensors(lambda found: found.update({"model.norm.weight": torch.ones(31)})),
    ),
    refused(
        "whole numbers for weights",
        CHECK,
        4,
        "I8",
        "F32",
        made=tensors(lambda found: found.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
    ),
    refused("weights of a model with fewer layers", CHECK, 4, "model.layers.2.", made=of_kind(num_hidden_layers=3)),
    refused("weights of a model with another width", CHECK, 4, "config.json", made=of_kind(intermediate_size=64), sentences=3),
    refused(
        "no output layer that is not tied", CHECK, 4, "lm_head.weight", made=tensors(lambda found: found.pop("lm_head.weight"))
    ),
    accepted(
        "tied embeddings without an output layer",
        CHECK,
        made=both(of_kind(tie_word_embeddings=True), tensors(lambda found: found.pop("lm_head.weight"))),
    ),
    accepted("weights in two files", CHECK, made=sharded()),
    refused(
        "a file of two missing",
        CHECK,
        4,
        "model-00002-of-00002.safetensors",
        made=sharded(lambda model, index: (model / "model-00002-of-00002.safetensors").unlink()),
    ),
    refused("an index of tensors in the wrong file", CHECK, 4, "model-00002-of-00002.safetensors", made=sharded(moved)),
    refused("an index of a file elsewhere", CHECK, 4, "secret.safetensors", made=sharded(outside)),
    refused("an index without its map", CHECK, 4, "index.json", "weight_map", made=sharded(lambda model, index: index.clear())),
    refused(
        "an index whose map is a list",
        CHECK,
        4,
        "index.json",
        "weight_map",
        made=sharded(lambda model, index: index.update(weight_map=["a"])),
    ),
    refused(
        "an index of no files",
        CHECK,
        4,
        "index.json",
        "weight_map",
        made=sharded(lambda model, index: index.update(weight_map={"lm_head.weight": 3})),
    ),
    refused(
        "a broken index",
        CHECK,
        4,
        "index.json is not JSON",
        made=both(gone(WEIGHTS), text("model/model.safetensors.index.json", "{")),
    ),
    # tokenizer, template, ends
    refused(
        "no tokenizer",
        CHECK,
        2,
        "tokenizer.json",
        "model.path",
        made=gone(TOKENIZER, "model/tokenizer_config.json", "model/chat_template.jinja"),
    ),
    refused("broken tokenizer.json", CHECK, 2, "tokenizer.json", "model.path", made=text(TOKENIZER, "{")),
    refused(
        "tokenizer.json of another form", CHECK, 2, "tokenizer.json", "model.path", made=text(TOKENIZER, '{"version": "1.0"}')
    ),
    refused("broken tokenizer_config.json", CHECK, 2, "tokenizer_config.json", made=text("model/tokenizer_config.json", "{")),
    refused(
        "tokenizer_config.json that is a list",
        CHECK,
        2,
        "tokenizer_config.json",
        made=text("model/tokenizer_config.json", "[]"),
    ),
    refused(
        "a tokenizer with more tokens than the model",
        CHECK,
        2,
        "260 tokens",
        "200",
        made=both(
            of_kind(vocab_size=200, eos_token_id=199),
            tensors(
                lambda found: found.update(
                    {name: found[name][:200].contiguous() for name in ("model.embed_tokens.weight", "lm_head.weight")}
                )
            ),
        ),
    ),
    refused(
        "no chat template",
        CHECK,
        2,
        "chat template",
        "data.chat_template",
        made=both(fields("model/tokenizer_config.json", chat_template=...), gone("model/chat_template.jinja")),
    ),
    refused("a broken chat template", CHECK, 2, "chat template", made=template("{% for message in messages %}{{ message }")),
    refused(
        "a chat template that raises",
        CHECK,
        2,
        "chat template",
        "only systems",
        made=template("{{ raise_exception('only systems') }}"),
    ),
    refused("a chat template that says nothing", CHECK, 2, "chat template", made=template("hello")),
    refused("a chat template that asks for what is not there", CHECK, 2, "chat template", made=template("{{ tools[0].name }}")),
    refused(
        "an end beyond the vocabulary",
        CHECK,
        2,
        "eos_token_id",
        "999",
        made=text("model/generation_config.json", '{"eos_token_id": 999}'),
    ),
    refused(
        "an end that is a letter",
        CHECK,
        2,
        "65",
        "no ordinary text",
        made=text("model/generation_config.json", '{"eos_token_id": [259, 65]}'),
    ),
    refused(
        "an end as text",
        CHECK,
        4,
        "generation_config.json",
        "eos_token_id",
        made=text("model/generation_config.json", '{"eos_token_id": "<|eot_id|>"}'),
    ),
    refused(
        "a negative end", CHECK, 4, "eos_token_id", "-1", made=text("model/generation_config.json", '{"eos_token_id": -1}')
    ),
    refused(
        "a broken generation_config.json",
        CHECK,
        4,
        "generation_config.json is not JSON",
        made=text("model/generation_config.json", "{"),
    ),
    refused(
        "model and data both wrong", CHECK + "model.path=gone data.train=gone.jsonl", 4, "model.path", "data.train", sentences=2
    ),
]
