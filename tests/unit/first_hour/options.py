"""Options: names, types, bounds, conflicts, and the TOML file that holds them."""

from __future__ import annotations

from pathlib import Path

from tests.unit.first_hour.case import Case, Made, accepted, config_lines, refused, replaced, text


def encoded(encoding: str) -> Made:
    """run.toml in another encoding, with a letter that shows it."""

    def made(folder: Path) -> None:
        file = folder / "run.toml"
        file.write_bytes((file.read_text() + "# Zürich\n").encode(encoding))

    return made


def with_line_ends(folder: Path) -> None:
    """run.toml as Windows writes it, with a byte order mark too."""
    file = folder / "run.toml"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))


CHECK = "check run.toml "
CASES: list[Case] = [
    # names
    refused(
        "misspelt option",
        CHECK + "trainer.tensor_paralel=2",
        2,
        "trainer.tensor_paralel",
        "did you mean trainer.tensor_parallel?",
    ),
    refused("misspelt section", CHECK + "modle.path=x", 2, "modle", "did you mean model?"),
    refused(
        "option of another section",
        CHECK + "run.learning_rate=1e-4",
        2,
        "run.learning_rate",
        "did you mean optimizer.learning_rate?",
    ),
    refused(
        "option without its section",
        CHECK + "learning_rate=1e-4",
        2,
        "learning_rate=1e-4",
        "did you mean optimizer.learning_rate",
    ),
    refused(
        "misspelt option without its section",
        CHECK + "lerning_rate=1e-4",
        2,
        "lerning_rate=1e-4",
        "did you mean optimizer.learning_rate",
    ),
    refused(
        "dashes for underscores", CHECK + "sampling.max-tokens=8", 2, "sampling.max-tokens", "did you mean sampling.max_tokens"
    ),
    refused("capital letters", CHECK + "Sampling.Max_Tokens=8", 2, "Sampling", "did you mean sampling"),
    refused("option of another trainer", CHECK + "trainer.micro_batch_size=8", 2, "trainer.micro_batch_size is not an option"),
    refused("letters of another alphabet", CHECK + "rün.steps=3", 2, "rün", "did you mean run"),
    refused("space before the equals sign", CHECK + "run.steps =3", 2, "'=3'", "blanks beside the equals sign", sentences=2),
    refused("no equals sign", CHECK + "run.steps", 2, "'run.steps'", "section.key=value"),
    refused("value without a key", CHECK + "=3", 2, "'=3'", "section.key=value"),
    refused("section alone", CHECK + "run=3", 2, "'run=3'", "section.key=value"),
    refused("key that ends in a dot", CHECK + "run.=3", 2, "'run.=3'", "section.key=value"),
    refused("too many dots", CHECK + "trainer.tensor_parallel.size=3", 2, "trainer.tensor_parallel"),
    refused("index of a list that is empty", CHECK + "data.mix[0].train=x", 2, "data.mix[0]"),
    refused("negative index", CHECK + "data.mix[-1].train=x", 2, "data.mix[-1].train=x"),
    refused("index of what is no list", CHECK + "run.steps[0]=3", 2, "run.steps"),
    refused("required option unset", CHECK + "run.steps=", 2, "run.steps is required and missing"),
    refused(
        "four mistakes at once",
        CHECK + "run.steps=0 modle.path=x trainer.tensor_paralel=2 data.train=gone.jsonl",
        2,
        "run.steps",
        "modle",
        "tensor_paralel",
        "gone.jsonl",
        sentences=4,
    ),
    # types
    refused("word for a number", CHECK + "run.steps=three", 2, "run.steps", "'three'"),
    refused("number as text", CHECK + """'run.steps="3"'""", 2, "run.steps", "'3'", "write 3"),
    refused("fraction for a whole number", CHECK + "run.steps=2.5", 2, "run.steps", "2.5"),
    refused("exponent for a whole number", CHECK + "run.steps=1e3", 2, "run.steps", "1000", "write 1000"),
    refused("zero steps", CHECK + "run.steps=0", 2, "run.steps", "greater than 0", "0"),
    refused("negative steps", CHECK + "run.steps=-4", 2, "run.steps", "-4"),
    refused("boolean for a number", CHECK + "run.steps=true", 2, "run.steps", "True"),
    refused("nan for a whole number", CHECK + "run.steps=nan", 2, "run.steps", "nan"),
    refused("more steps than a machine word", CHECK + "run.steps=99999999999999999999999999", 2, "run.steps"),
    refused("seed beyond what libraries take", CHECK + "run.seed=99999999999999999999999999", 2, "run.seed"),
    refused("list for a number", CHECK + "run.steps=[3]", 2, "run.steps", "[3]"),
    refused("table for a number", CHECK + "'run.steps={a=1}'", 2, "run.steps"),
    refused("date for a number", CHECK + "run.steps=2024-01-01", 2, "run.steps"),
    refused("infinite learning rate", CHECK + "optimizer.learning_rate=inf", 2, "optimizer.learning_rate", "inf"),
    refused("learning rate that is no number", CHECK + "optimizer.learning_rate=nan", 2, "optimizer.learning_rate", "nan"),
    refused("negative learning rate", CHECK + "optimizer.learning_rate=-1e-4", 2, "optimizer.learning_rate", "-0.0001"),
    refused("learning rate with a comma", CHECK + "optimizer.learning_rate=1,5", 2, "optimizer.learning_rate", "1,5"),
    refused("capital True", CHECK + "trainer.recompute=True", 2, "trainer.recompute", "write true"),
    refused("yes for true", CHECK + "trainer.recompute=yes", 2, "trainer.recompute", "write true"),
    refused("1 for true", CHECK + "trainer.recompute=1", 2, "trainer.recompute", "write true"),
    refused("true in quotes", CHECK + """'trainer.recompute="true"'""", 2, "trainer.recompute", "write true"),
    refused("number for a folder", CHECK + "run.directory=2024", 2, "run.directory", "in quotes"),
    refused("boolean for a file", CHECK + "data.train=true", 2, "data.train", "in quotes"),
    refused("list for a file", CHECK + "'data.train=[\"a.jsonl\"]'", 2, "data.train", "a.jsonl"),
    refused("empty folder", CHECK + """'run.directory=""'""", 2, "run.directory", "an empty name"),
    refused("folder of blanks", CHECK + """'run.directory="  "'""", 2, "run.directory", "an empty name"),
    refused("quote that is not closed", CHECK + """'run.directory="abc'""", 2, "run.directory", "quote"),
    refused("none for an option", CHECK + "data.held_out=none", 3, "data.held_out", "none", "data.held_out="),
    refused("null for a number", CHECK + "trainer.first_stage_layers=null", 2, "trainer.first_stage_layers", "'null'"),
    # words
    refused("dtype of other libraries", CHECK + "model.dtype=bf16", 2, "model.dtype", "write 'bfloat16'"),
    refused("half precision", CHECK + "model.dtype=float16", 2, "model.dtype", "'float16'", "'bfloat16'"),
    refused("capital loss", CHECK + "algorithm.loss=DPO", 2, "algorithm.loss", "'DPO'", "dpo"),
    refused("loss that is not there", CHECK + "algorithm.loss=ppo", 2, "algorithm.loss", "'ppo'", "grpo"),
    refused("loss of a file that is not there", CHECK + "algorithm.loss=gone.py:Loss", 2, "algorithm.loss", "gone.py"),
    refused("loss that is a number", CHECK + "algorithm.loss=3", 2, "algorithm.loss", "3"),
    refused("option of another loss", CHECK + "algorithm.loss=grpo algorithm.pairing=random", 2, "algorithm.pairing", "grpo"),
    refused("capital Never", CHECK + "sync.sync_interval=Never", 2, "sync.sync_interval", "write 'never'"),
    refused("regime by its name", CHECK + "sync.sync_interval=offline", 2, "sync.sync_interval", "'offline'"),
    refused("interval of zero", CHECK + "sync.sync_interval=0", 2, "sync.sync_interval", "0"),
    refused("transport that is not there", CHECK + "sync.transport=rdma", 2, "sync.transport", "'rdma'", "gloo"),
    refused("semantics that are not there", CHECK + "sync.semantics=verl", 2, "sync.semantics", "'verl'", "paper"),
    refused("placement that is not there", CHECK + "inference.placement=shared", 2, "inference.placement", "'shared'"),
    refused("pairing that is not there", CHECK + "algorithm.pairing=best", 2, "algorithm.pairing", "'best'"),
    refused("schedule that is not there", CHECK + "optimizer.schedule=cosin", 2, "optimizer.schedule", "'cosin'", "cosine"),
    refused("template that is no template", CHECK + "data.template=hello", 2, "data.template", "'hello'", "{problem}"),
    refused("template that is not there", CHECK + "data.template=figure6", 2, "data.template", "'figure6'", "figure5"),
    # bounds and conflicts
    refused("greedy sampling in training", CHECK + "sampling.temperature=0", 2, "sampling.temperature"),
    refused("negative temperature", CHECK + "sampling.temperature=-1", 2, "sampling.temperature", "-1"),
    refused("temperature below what can be sampled", CHECK + "sampling.temperature=1e-5", 2, "sampling.temperature", "0.01"),
    refused("top_p of zero", CHECK + "sampling.top_p=0", 2, "sampling.top_p", "0"),
    refused("top_p above one", CHECK + "sampling.top_p=1.5", 2, "sampling.top_p", "1.5"),
    refused("one sample a prompt", CHECK + "algorithm.samples_per_prompt=1", 2, "algorithm.samples_per_prompt", "1"),
    refused("three tensor-parallel ranks", CHECK + "trainer.tensor_parallel=3", 2, "trainer.tensor_parallel must divide"),
    refused("three tensor-parallel engines", CHECK + "inference.tensor_parallel=3", 2, "inference.tensor_parallel"),
    refused("more stages than layers", CHECK + "trainer.pipeline_parallel=4", 2, "layers"),
    refused("no engines", CHECK + "inference.engines=0", 2, "inference.engines", "0"),
    refused(
        "lengths that do not fit", CHECK + "inference.max_model_tokens=100", 2, "inference.max_model_tokens", "512 + 8 > 100"
    ),
    refused(
        "longer than the model's positions",
        CHECK + "inference.max_model_tokens=5000",
        2,
        "inference.max_model_tokens",
        "4096",
        "5000",
    ),
    refused("microbatch that holds no sequence", CHECK + "trainer.microbatch_tokens=64", 2, "trainer.microbatch_tokens", "64"),
    refused(
        "KV cache that holds no request",
        CHECK + "inference.kv_cache='1 MiB' inference.max_model_tokens=4096",
        2,
        "inference.kv_cache",
        "found 1 MiB",
    ),
    refused("fp8 without its library", CHECK + "trainer.fp8=current", 2, "trainer.fp8", "transformer_engine"),
    refused("reward function beside another reward", CHECK + "rewards.function=rewards.py:right", 2, "rewards.function"),
    refused("reward model without a folder", CHECK + "data.reward=model", 2, "reward_model.path"),
    refused("reward that is not there", CHECK + "data.reward=maths", 2, "data.reward", "'maths'", "math"),
    refused("weights without rewards", CHECK + "'data.reward_weights=[1.0, 2.0]'", 2, "data.reward_weights"),
    refused(
        "replay online", CHECK + "data.replay=train.jsonl", 2, "data.replay", "sync.sync_interval", "`chosen`", sentences=2
    ),
    refused("best checkpoint of nothing", CHECK + "data.held_out= checkpoint.best_by=reward", 2, "checkpoint.best_by"),
    refused("supervised output of a training run", "train run.toml sft.checkpoint_out=out", 2, "sft.checkpoint_out"),
    refused("supervised training without an output", "sft run.toml", 2, "sft.checkpoint_out"),
    refused("evaluation without problems", "eval run.toml data.held_out=", 2, "data.held_out", "--suite"),
    refused("columns that are no table", CHECK + "data.columns=problem", 2, "data.columns"),
    refused("columns of unknown names", CHECK + "'data.columns={question=\"q\"}'", 2, "data.columns"),
    # the file
    refused("no file", "check gone.toml", 2, "gone.toml", "No such file"),
    refused("folder for a file", "check model", 2, "model", "Is a directory"),
    refused("file below a file", "check run.toml/run.toml", 2, "run.toml/run.toml"),
    refused(
        "empty file",
        "check run.toml",
        2,
        "section [run]",
        "section [model]",
        "section [data]",
        made=text("run.toml", ""),
        sentences=3,
    ),
    refused("only comments", "check run.toml", 2, "section [run]", made=text("run.toml", "# to do\n"), sentences=3),
    refused(
        "section missing",
        "check run.toml",
        2,
        "section [model] is required",
        made=replaced("run.toml", '[model]\npath = "model"\n', ""),
    ),
    refused(
        "key twice", "check run.toml", 2, "run.toml", "line 4", made=replaced("run.toml", "steps = 4", "steps = 4\nsteps = 5")
    ),
    refused("section twice", "check run.toml", 2, "run.toml", "line", made=config_lines("[run]", "seed = 1")),
    refused("array of tables for a section", "check run.toml", 2, "run", made=replaced("run.toml", "[run]", "[[run]]")),
    refused(
        "section as a value",
        "check run.toml",
        2,
        "trainer",
        made=lambda folder: text("run.toml", "trainer = 3\n" + (folder / "run.toml").read_text())(folder),
    ),
    refused("option as a section", "check run.toml", 2, "run.seed", made=config_lines("[run.seed]", "a = 1")),
    refused(
        "quote that is not closed in the file",
        "check run.toml",
        2,
        "run.toml",
        "line",
        made=replaced("run.toml", 'path = "model"', 'path = "model'),
    ),
    refused(
        "word without quotes in the file",
        "check run.toml",
        2,
        "run.toml",
        "line 5",
        made=replaced("run.toml", 'path = "model"', "path = model"),
    ),
    refused(
        "capital True in the file", "check run.toml", 2, "run.toml", "line", made=config_lines("[trainer]", "recompute = True")
    ),
    refused(
        "colon for an equals sign", "check run.toml", 2, "run.toml", "line", made=replaced("run.toml", "steps = 4", "steps: 4")
    ),
    refused("Latin-1", "check run.toml", 2, "run.toml", "UTF-8", made=encoded("latin-1")),
    refused("UTF-16", "check run.toml", 2, "run.toml", "UTF-8", made=encoded("utf-16")),
    accepted("byte order mark and Windows line ends", "check run.toml", made=with_line_ends),
    refused("bytes", "check run.toml", 2, "run.toml", made=text("run.toml", bytes(range(256)))),
    refused("NUL in the file", "check run.toml", 2, "run.toml", made=config_lines("# \0")),
    refused("JSON for TOML", "check run.json", 2, "run.json", "TOML", made=text("run.json", '{"run": {"steps": 4}}')),
    refused("YAML for TOML", "check run.yaml", 2, "run.yaml", "TOML", made=text("run.yaml", "run:\n  steps: 4\n")),
    refused("the model's config.json for the run's", "check model/config.json", 2, "model/config.json", "TOML"),
    accepted(
        "path with a space, a quote and an umlaut",
        "check 'my \"run\" ü.toml'",
        made=lambda folder: (folder / "run.toml").rename(folder / 'my "run" ü.toml'),
    ),
    refused("path with a line break", "check 'run\n.toml'", 2, "run", ".toml", "No such file"),
    refused("path longer than a name may be", "check " + "a" * 300, 2, "File name too long"),
    accepted("the last of two values counts", CHECK + "run.steps=0 run.steps=3"),
    refused(
        "ten thousand unknown options",
        "check run.toml",
        2,
        "more",
        made=config_lines("[trainer]", *[f"o{i} = 1" for i in range(10000)]),
        sentences=21,
    ),
    refused(
        "value of a megabyte",
        "check run.toml",
        2,
        "model.dtype",
        made=replaced("run.toml", 'path = "model"', f'path = "model"\ndtype = "{"x" * 1000000}"'),
    ),
    refused("tables within tables", "check run.toml", 2, "run.toml", made=text("run.toml", "a = " + "[" * 5000 + "]" * 5000)),
    refused("an empty overrides argument", "check run.toml ''", 2, "''", "section.key=value"),
    refused(
        "resumed with nothing to resume that differs",
        "train run.toml --resume auto run.seed=3 sft.checkpoint_out=x",
        2,
        "sft.checkpoint_out",
    ),
]
