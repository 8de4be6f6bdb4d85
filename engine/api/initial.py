"""The first configuration of a run: from a model's folder, a data file and a machine to values that are right for them. Values
of training are the paper's (arXiv 2506.21495, Table 4); the layout is the first of a ladder, fastest first, that fits by the
estimate of engine/capacity with a margin. It writes no file and asks nobody; initial_file.py puts the values into words.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from engine.api.initial_values import Found, Layout, Values, Wishes, template_of, values_of
from engine.capacity.kv_cache import GIB, MIB
from engine.capacity.memory import STAGING_BUCKETS, Channel, estimate
from engine.config.load import RunConfig, load_tree
from engine.config.options import LOSSES
from engine.core.errors import ConfigError, DataError
from engine.data.records import check_source
from engine.data.rows import Row, sample_rows
from engine.data.templates import LeftOut, PromptForm, fit_prompt, load_tokenizer
from engine.models.base import ModelShape
from engine.models.checks import check_engine_layout, check_layout
from engine.models.config_file import read_shape
from engine.models.headers import num_elements
from engine.models.sharding import engine_layout, trainer_layout
from engine.run.spec import Spec, assemble, settled

FREE_SHARE = 0.08  # of a GPU that a layout must leave: for fragmentation, and for what the estimate does not see
ENOUGH_REQUESTS = 32  # at full length that an engine must decode together to be of use
LEAST_BYTES = 6  # of a parameter on a trainer rank whatever is saved: bfloat16 weights and float32 gradients
# What makes a step smaller, in the order in which it is tried: each costs more time than those before it.
LADDER: tuple[Mapping[str, Any], ...] = (
    {},
    {"recompute": True},
    {"recompute": True, "fused_lm_head": True},
    {"recompute": True, "fused_lm_head": True, "moment_dtype": "bfloat16"},
    {"recompute": True, "fused_lm_head": True, "offload_share": 1.0},
)
LARGER = (1, 2, 4, 8)  # GPUs of a node that are tried where what there is does not do
MORE_NODES = (2, 4, 8, 16, 32)  # of 8 GPUs


@dataclass(frozen=True, slots=True)
class Choice:
    """A configuration's values, the run they come to, and how much of the fullest GPU is left."""

    wishes: Wishes
    values: Values
    config: RunConfig
    spec: Spec
    spare_share: float | None = None  # None on CPUs
    host_bytes: int = 0  # of a node, for what is offloaded

    @property
    def summary(self) -> str:
        """The layout and its room in a sentence."""
        c = self.config
        cache = self.spec.kv_cache
        assert cache is not None
        gpu = round(self.wishes.gpu_gibibytes * GIB) if self.wishes.gpus_per_node else None
        held = cache.told(cache.num_bytes(gpu))
        if self.spare_share is None:
            return f"one trainer rank and one engine on CPUs; KV cache: {held}"
        t, i = c.trainer, c.inference
        turns = "taking turns with" if i.placement == "colocated" else "beside"
        return (
            f"{t.world_size} trainer ranks (tensor {t.tensor_parallel}, data {t.data_parallel}) {turns} {i.engines} engines "
            f"(tensor {i.tensor_parallel}) on {self.wishes.nodes} x {self.wishes.gpus_per_node} GPUs of "
            f"{self.wishes.gpu_gibibytes:g} GiB: {self.spare_share:.0%} to spare in training; KV cache: {held}"
            + (f"; {self.host_bytes / GIB:,.0f} GiB of each machine's memory for the optimizer" if self.host_bytes else "")
        )


def look_at(wishes: Wishes) -> Found:
    """Reads config.json, the tokenizer and some rows. SemionError for what cannot be used: the first configuration of a run
    must not begin with a fault."""
    if wishes.loss not in LOSSES.names:
        raise ConfigError(f"--loss must be one of {', '.join(LOSSES.names)}; found {wishes.loss!r}: choose one")
    if wishes.interval != "never" and wishes.interval < 1:
        raise ConfigError(f"--sync-interval must be at least 1, or never; found {wishes.interval}: choose another")
    if min(wishes.gpus_per_node, wishes.nodes - 1) < 0 or wishes.gpu_gibibytes <= 0:
        raise ConfigError(
            f"--gpus must be at least 0, --nodes at least 1 and --gpu-gibibytes above 0; found {wishes.gpus_per_node}, "
            f"{wishes.nodes} and {wishes.gpu_gibibytes:g}: give the machine's"
        )
    if (wishes.reward == "model") != (wishes.reward_model is not None):
        raise ConfigError(
            f"--reward model and --reward-model FOLDER need each other; found {wishes.reward!r} and {wishes.reward_model!r}: "
            f"name the reward model's folder, or another --reward"
        )
    shape = read_shape(wishes.model)
    tokenizer = load_tokenizer(wishes.model)
    for path in filter(None, (wishes.train, wishes.held_out)):
        check_source(path)
    rows, is_whole = _rows(wishes, wishes.train)
    if wishes.held_out:
        _rows(wishes, wishes.held_out)
    has_template = bool(tokenizer.chat_template)
    form = PromptForm(template_of(wishes), chat_template=None if has_template else "")
    fitted = (fit_prompt(tokenizer, row.problem, row.messages, form, shape.max_positions) for row in rows)
    longest = max((len(ids) for ids in fitted if not isinstance(ids, LeftOut)), default=0)
    reward_shape = read_shape(wishes.reward_model, "reward_model.path", "llama") if wishes.reward_model else None
    return Found(shape, reward_shape, has_template, len(rows), is_whole, longest)


def _rows(wishes: Wishes, path: str) -> tuple[list[Row], bool]:
    try:
        return sample_rows(path, wishes.reward == "math", columns=wishes.columns)  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(
            f"{error}; `--columns answer=...` names columns, and `--reward FILE.py:NAME` judges rows without an answer"
        ) from error


def choose(wishes: Wishes, found: Found) -> Choice:
    """The values. ConfigError where nothing fits, which says what would."""
    if not wishes.gpus_per_node:
        return _made(wishes, found, None)
    if (choice := _first_fitting(wishes, found)) is not None:
        return choice
    raise ConfigError(_what_would(wishes, found))


def _first_fitting(wishes: Wishes, found: Found) -> Choice | None:
    """The first layout of the ladder that fits. What the trainer alone has no room for is not tried with other engines."""
    least = num_elements(found.shape) * LEAST_BYTES / min(8, wishes.gpus_per_node)
    if least > wishes.gpu_gibibytes * GIB:
        return None
    hopeless = set[Hashable]()
    for layout in layouts(wishes, found.shape):
        key = (layout.placement, layout.trainer_tp, layout.data_parallel, *layout.savings.items())
        if key in hopeless:
            continue
        fitting = _fitting(wishes, found, layout)
        if isinstance(fitting, Choice):
            return fitting
        if fitting == "trainer":
            hopeless.add(key)
    return None


def layouts(wishes: Wishes, shape: ModelShape) -> Iterator[Layout]:
    """Layouts of a machine, fastest first: whoever would wait for the other takes turns with it; few tensor-parallel ranks
    before many; and what makes a step smaller only when nothing else fits."""
    nodes, per_node = wishes.nodes, wishes.gpus_per_node
    total = nodes * per_node - (wishes.reward_model is not None)  # the reward engine has a GPU of its own
    splits = [(total, total, "colocated")]
    apart = [(part, total - part, "disaggregated") for part in (total // 2, total * 3 // 4) if 0 < part < total]
    waits = wishes.interval == 1  # online, trainer and engines never work at the same time
    splits = [*splits, *apart] if waits or total < 2 else [*apart, *splits]
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= per_node]
    for savings, (trainer, engines, placement), trainer_tp in product(LADDER, splits, sizes):
        if trainer % trainer_tp or not _divides(shape, trainer_tp):
            continue
        for engine_tp in sizes:
            if engines >= engine_tp and _divides(shape, engine_tp):
                count = (per_node // engine_tp) * (engines // per_node) + (engines % per_node) // engine_tp
                if count:
                    yield Layout(placement, trainer_tp, trainer // trainer_tp, count, engine_tp, savings)  # type: ignore[arg-type]


def _divides(shape: ModelShape, size: int) -> bool:
    return shape.num_heads % size == 0 and shape.ffn_hidden % size == 0


def _fitting(wishes: Wishes, found: Found, layout: Layout) -> Choice | Literal["trainer", "engines"]:
    """The configuration of a layout, or for whom the GPUs have no room."""
    try:
        choice = _made(wishes, found, layout)
        choice.spec.placed()
        check_layout(found.shape, trainer_layout(choice.config.trainer))
        check_engine_layout(found.shape, engine_layout(choice.config.inference))
    except ConfigError:  # by a rule: engines that do not stand inside a node, heads that cannot be shared
        return "engines"
    gpu = round(wishes.gpu_gibibytes * GIB)
    staged = STAGING_BUCKETS * choice.config.sync.bucket_mebibytes * MIB
    held = estimate(choice.spec, Channel(staged, staged), gpu)
    cache = choice.spec.kv_cache
    assert cache is not None
    enough = cache.holds(cache.num_bytes(gpu)) >= min(ENOUGH_REQUESTS, cache.max_concurrent)
    training = held.devices[0].num_bytes
    if training > gpu * (1 - FREE_SHARE):
        return "trainer"
    if held.fullest.num_bytes > gpu or not enough:
        return "engines"
    return replace(choice, spare_share=1 - training / gpu, host_bytes=held.host_bytes_per_node)


def _what_would(wishes: Wishes, found: Found) -> str:
    """What is too small, and the smallest machine with these GPUs that does, or else larger GPUs."""
    here = f"{wishes.nodes} x {wishes.gpus_per_node} GPUs of {wishes.gpu_gibibytes:g} GiB"
    more = [(1, gpus) for gpus in LARGER] + [(nodes, 8) for nodes in MORE_NODES]
    tried = [replace(wishes, nodes=nodes, gpus_per_node=gpus) for nodes, gpus in more]
    tried = [other for other in tried if other.nodes * other.gpus_per_node > wishes.nodes * wishes.gpus_per_node]
    for other in (
        *tried,
        *(replace(wishes, gpu_gibibytes=size) for size in (79.0, 139.0, 178.0) if size > wishes.gpu_gibibytes),
    ):
        if (choice := _first_fitting(other, found)) is not None:
            would = f"{other.nodes} x {other.gpus_per_node} GPUs of {other.gpu_gibibytes:g} GiB would do ({choice.summary})"
            break
    else:
        would = "256 of them do not do by tensor and data parallelism alone: see configs/scale for layouts with a pipeline"
    return f"training {wishes.model} needs more memory than {here} have, with {FREE_SHARE:.0%} to spare; {would}"


def _made(wishes: Wishes, found: Found, layout: Layout | None) -> Choice:
    values = values_of(wishes, found, layout)
    tree = {section: {name: value.value for name, value in table.items()} for section, table in values.items()}
    config = load_tree(tree)
    meant = settled(config, on_gpus=layout is not None)  # whatever machine `init` is asked on
    return Choice(wishes, values, config, assemble(meant, found.shape, reward_shape=found.reward_shape))
