"""The engines' layouts that fit so many GPUs by themselves, with when each step of an interval is sampled and judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

from engine.capacity.memory import estimate
from engine.core.errors import ConfigError
from engine.forecast.clocks import complete, judged_at
from engine.forecast.decoding import Engines
from engine.forecast.seconds import Judged, Regime, judging_seconds
from engine.forecast.space import Space
from engine.forecast.speed import Speed, speed_of
from engine.models.checks import check_engine_layout
from engine.models.sharding import engine_layout
from engine.run.spec import Spec

SLOTS = (64, 256, 1024)  # requests that an engine decodes together, beside the configuration's
MOST_ASKED = 2_000  # requests of an engine that are replayed to compare layouts; what follows goes on as fast


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """A layout of the engines."""

    gpus: int
    options: Mapping[str, Any]
    ready: Mapping[int | str, tuple[float, ...]]  # of each s, when every step of an interval is judged


class EngineLayouts:
    """The engines' layouts of a space, for some s."""

    def __init__(self, space: Space, intervals: Many[int | str], judged: Judged) -> None:
        self._space = space
        self._intervals = tuple(dict.fromkeys(intervals))
        together = {interval: Regime(interval).of(space.config.schedule).opens(0) for interval in self._intervals}
        self._together = {interval: len(steps) for interval, steps in together.items()}  # steps that are sampled together
        self._judged = judged

    def choices(self) -> Iterator[EngineChoice]:
        """Of every number of GPUs those that an engine fits, by slots that it can fill."""
        space = self._space
        fitting = [tp for tp in space.powers(space.per_node) if self._engine_fits(tp)]
        fitting = sorted({*fitting[:2], *fitting[-1:]})  # the largest answers soonest, the smallest answer most
        slots = sorted({space.config.inference.max_concurrent, *SLOTS})
        for size in space.sizes:
            for tp in fitting:
                whole = size // space.per_node * (space.per_node // tp) + size % space.per_node // tp
                if not whole or size % tp:
                    continue
                seen: set[tuple[int, int]] = set()
                for count in slots:
                    options: dict[str, Any] = {
                        "inference.engines": whole,
                        "inference.tensor_parallel": tp,
                        "inference.max_concurrent": count,
                        "inference.kv_cache": "auto",
                    }
                    spec = space.assembled(space.light(options | {"inference.placement": "disaggregated"}))
                    room = self._room(spec)
                    asked = -(-max(self._together.values()) * space.config.rollouts_per_step // whole)
                    if (min(count, asked), room) in seen:  # an engine is never asked for so many
                        continue
                    seen.add((min(count, asked), room))
                    yield EngineChoice(size, options, self._ready(spec, room))

    def _engine_fits(self, tp: int) -> bool:
        space = self._space
        made = space.light(
            {"inference.tensor_parallel": tp, "inference.kv_cache": "auto", "inference.placement": "disaggregated"}
        )
        try:
            check_engine_layout(space.spec.shape, engine_layout(made.inference))
        except ConfigError:
            return False
        held = estimate(space.assembled(made), space.channel, space.gpu_bytes)
        return all(device.num_bytes <= space.gpu_bytes for device in held.devices if device.name.startswith("engine rank"))

    def _room(self, spec: Spec) -> int:
        assert spec.kv_cache is not None
        return spec.kv_cache.num_bytes(self._space.gpu_bytes) // spec.kv_cache.token_bytes

    def _ready(self, spec: Spec, room: int) -> dict[int | str, tuple[float, ...]]:
        """When every step of an interval has been sampled by the first engine and judged, counted from the sync."""
        space = self._space
        together = self._judged.together
        judged = [judging_seconds(spec, space.constants, work, self._judged.calls) for work in space.works]
        speed = speed_of(spec.shape, spec.config, space.constants)
        alone = [speed.iterations(max(map(max, work.completions)), 1, min(work.prompts)) for work in space.works]
        found: dict[int, tuple[float, ...]] = {}
        shown: dict[int | str, tuple[float, ...]] = {}
        for interval in sorted(self._intervals, key=lambda one: -self._together[one]):  # the others' requests are among these
            count = self._together[interval]
            if count not in found:
                most = MOST_ASKED * spec.config.inference.engines // space.config.rollouts_per_step
                replayed = min(count, max(2, most))
                engines = Engines(spec.config, speed, room, space.works, 1, space.deals)
                engines.open(0.0, range(replayed))
                sampled = [engines.sampled(step) for step in range(replayed)]
                parts = [complete(engines.handed_over(step), together) for step in range(replayed)] if together else []
                later = max((sampled[-1] - sampled[0]) / max(1, replayed - 1), self._full_engine(spec, speed, room))
                until, times = 0.0, []
                for step in range(count):
                    known = min(step, replayed - 1)
                    of_step = (parts[known] if parts else []) or [(sampled[known], 1.0)]
                    longest = alone[step % len(alone)]  # of the step's responses, which another engine may have
                    here = [(when + later * (step - known), share) for when, share in of_step]
                    here[-1] = (max(here[-1][0], longest), here[-1][1])
                    until = judged_at(here, judged[step % len(judged)], until)
                    times.append(until)
                found[count] = tuple(times)
            shown[interval] = found[count]
        return shown

    def _full_engine(self, spec: Spec, speed: Speed, room: int) -> float:
        """Seconds a step of an engine that is never short of requests."""
        work, i = self._space.works[0], spec.config.inference
        requests = sum(map(len, work.completions))
        held = sum(work.prompts) // len(work.prompts) + work.num_sampled // requests // 2  # of a request, half of it sampled
        together = max(1, min(i.max_concurrent, room // held))
        return work.num_sampled / i.engines / together * speed.iterations(1, together, together * held)
