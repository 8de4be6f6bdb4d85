"""One vLLM engine, in the process that makes it: sampling, scoring and the receiving end of a weight sync. It places no
process and knows no other engine.

Calls come one after another. `submit` only queues; `collect` runs the engine until the asked-for requests are done, and
whatever else was submitted is decoded in the same continuous batch. So the batches, and with them every bit of the
result, depend on the order of calls alone and never on timing. `pause` hands back what is not done, with its tokens up to a
decoding step; `go_on` decodes while that step is not known yet, and what it decodes beyond is taken back.
"""

from __future__ import annotations

import os
import time
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.capacity.kv_cache import KvCache
from engine.config.load import RunConfig
from engine.core.arrays import LogProbs, TokenIds
from engine.core.errors import ConfigError, EngineLostError, InferenceError, NumericsError, WeightSyncError
from engine.core.importing import uncollected
from engine.core.types import Completion
from engine.data.ends import end_tokens
from engine.data.templates import policy_tokenizer
from engine.inference.advice import policy_advice
from engine.inference.nvcc import without_nvcc
from engine.inference.process import MODEL_RUNNER, prepare_process
from engine.inference.sampling import Part, SampleRequest
from engine.observe.profiling.phases import Phase, phase
from engine.observe.profiling.recorder import Recorder, profiled_process
from engine.observe.telling import activity

UNCOMPILED = {"TORCH_COMPILE_DISABLE": "1"}  # on a CPU: else a C++ compiler runs before the first token, for one small function
IN_DOUBT = -1  # the version of weights that are not, or not yet, proven to be one
WEIGHTS, KV_CACHE = "weights", "kv_cache"  # vLLM's names of what sleeps and wakes
FORGETTING = 2  # vLLM's level of sleep that keeps nothing: a sync sends every byte again, and proves it


def _num_tokens(state: Any) -> int:
    """Tokens that vLLM has sampled for a request."""
    return len(state.detokenizer.output_token_ids)


def require_finite(log_probs: LogProbs, engine: int, version: int) -> None:
    """NumericsError where the log-probs of sampled tokens are not finite: the weights that sampled them are broken."""
    values = log_probs.array
    wrong = values[~np.isfinite(values)]
    if wrong.size:
        whose = "model.path holds weights" if version == 0 else f"the policy after {version} steps has weights"
        raise NumericsError(
            f"engine {engine}'s log-probs must be finite; found {wrong[0]}: {whose} that are not, or too large for model.dtype:"
            f" look at them, or name another model"
        )


class VllmEngine:
    """vLLM with one Llama, weights of one version, and requests in flight."""

    def __init__(self, config: RunConfig, index: int, kv_cache: KvCache) -> None:
        self._config = config
        self._kv_cache = kv_cache
        self._timeout = config.inference.timeout_seconds
        self._index = index
        self._on_gpu = False
        prepare_process(config)
        try:
            with activity("engine", total=config.inference.engines):
                self._load()
                self._loaded = self._digests_loaded()
        except Exception as error:
            why = " ".join(str(error).split())
            advice = policy_advice(why, config, on_gpu=self._on_gpu)
            raise InferenceError(f"engine {index} could not start from {config.model.path}: {why}{advice}") from error
        self._check_head()
        self._version = 0
        self._asleep: list[str] = []
        self._open: dict[str, tuple[SampleRequest, int]] = {}  # and the version that is to answer it
        self._done: dict[str, Any] = {}
        self._handed_over: set[str] = set()  # of the requests that are being collected
        self._collecting_since = 0.0
        self._num_steps = 0  # decoding steps since the engine was empty
        self._ended: dict[str, int] = {}  # of what is done, after how many of them
        self._arrived: dict[str, tuple[int, array[int]]] = {}  # since `steps_so_far`: see `_note_tokens`
        self._busy_seconds, self._num_sampled = 0.0, 0
        self._recorder: Recorder | None = None

    def _load(self) -> None:
        import torch

        config, path = self._config, self._config.model.path
        self._on_gpu = torch.cuda.is_available()
        on_cpu = not self._on_gpu
        if on_cpu:
            os.environ |= UNCOMPILED
        else:
            os.environ.setdefault(*MODEL_RUNNER)
        with uncollected():  # the engine itself: vllm.LLM beside it brings the servers' modules, a fifth of the import
            from vllm.config import WeightTransferConfig
            from vllm.engine.arg_utils import EngineArgs
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.llm_engine import LLMEngine

            from engine.inference import fp8
            from engine.inference import receiver as receive

        receive.register()
        gpu_bytes = None if on_cpu else torch.cuda.get_device_properties(0).total_memory
        shared = not on_cpu and config.inference.placement == "colocated"
        torch.set_num_threads(config.inference.threads)
        self._tokenizer = policy_tokenizer(config)
        stop = config.sampling.stop
        self._end_ids = [*end_tokens(path, self._tokenizer).stop, *(one for one in stop if isinstance(one, int))]
        self._stop_texts = [one for one in stop if isinstance(one, str)]
        arguments: dict[str, Any] = dict(
            model=path,
            dtype=config.model.dtype,
            load_format=receive.PLAIN_FORMAT if on_cpu and not config.inference.packed_weights else "auto",
            tensor_parallel_size=config.inference.tensor_parallel,
            distributed_executor_backend="mp" if config.inference.tensor_parallel > 1 else None,
            worker_extension_cls=f"{receive.__name__}.{receive.SyncWorker.__name__}",
            max_model_len=config.inference.max_model_tokens,
            max_num_seqs=config.inference.max_concurrent,
            kv_cache_memory_bytes=self._kv_cache.num_bytes(gpu_bytes),
            block_size=32 if on_cpu else None,
            # A chunk of a prompt draws from the sample's generator and takes it back, which a CPU generator cannot.
            enable_chunked_prefill=not on_cpu,
            skip_tokenizer_init=not self._stop_texts,
            disable_log_stats=True,
            weight_transfer_config=WeightTransferConfig(backend=receive.BACKEND),
            # Raw log-probs are those of temperature 1; processed ones those of what is sampled.
            logprobs_mode="raw_logprobs" if config.log_prob_temperature == 1 else "processed_logprobs",
            hf_overrides={} if config.model.head == "model" else {"head_dtype": config.model.head},
            # The share sizes nothing where the KV cache has a size, but it must be free at the start: a trainer may be there.
            **({"enable_sleep_mode": True, "gpu_memory_utilization": 0.01} if shared else {}),
        )
        if config.inference.quantization == "fp8":
            arguments["quantization"] = fp8.FP8_QUANTIZATION
        arguments |= {"enable_prefix_caching": True, "max_num_batched_tokens": config.inference.batched_tokens}
        arguments |= config.inference.vllm  # none of those above, which the configuration refuses
        if on_cpu:
            arguments["enforce_eager"] = True
        else:
            arguments |= without_nvcc(
                config.inference.vllm,
                torch.cuda.get_device_capability(0),
                dtype=config.model.dtype,
                stored=config.inference.stored_dtype,
                tensor_parallel=config.inference.tensor_parallel,
            )
        self._llm = LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
        if on_cpu:
            self._llm.collective_rpc("semion_decode")

    def _digests_loaded(self) -> dict[str, str]:
        """Of FP8 weights that were read from the disk, once they are proven; what a sync brings `receive` tells."""
        if self._config.inference.quantization != "fp8":
            return {}
        answers = self._llm.collective_rpc("semion_quantized")
        if found := [f"worker {rank}: {why}" for rank, (why, _) in enumerate(answers) if why]:
            raise WeightSyncError("; ".join(found))
        return {"quantized": " ".join(digest for _, digest in answers)}

    def _check_head(self) -> None:
        """ConfigError where this vLLM, or its platform, leaves the output layer in another type than model.head asks for."""
        wanted = self._config.model.head
        if wanted == "model":
            return
        found = sorted(set(self._llm.collective_rpc("semion_head_dtype")))
        if found != [wanted]:
            raise ConfigError(
                f"model.head = {wanted!r} needs engines whose output layer is in {wanted}; found {', '.join(found)} in this "
                f"vLLM: set model.head = 'model', for the option means trainer and engines"
            )

    def describe(self) -> dict[str, str]:
        """The machine, the process, the versions of what runs here, what vLLM chose to run with, and the digests of the FP8
        weights that were loaded."""
        import torch
        import vllm

        machine = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        known = {"host": machine, "pid": str(os.getpid()), "vllm": vllm.__version__, "torch": torch.__version__}
        runs: dict[str, str] = self._llm.collective_rpc("semion_runs")[0]
        if not self._on_gpu:
            runs |= {"instructions": torch.backends.cpu.get_cpu_capability()}
        scheduling = self._llm.vllm_config.scheduler_config.async_scheduling
        return known | runs | self._loaded | {"scheduling": "asynchronous" if scheduling else "synchronous"}

    # -- sampling

    def submit(self, requests: Sequence[SampleRequest], version: int) -> None:
        """Queues requests for `version`, the only one that may answer them; the prefix cache is dropped first, so that no
        earlier work changes a bit of theirs. InferenceError when the engine serves another version, or none."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        started = time.monotonic()
        if self._version != version:
            serves = f"no version: {self._doubt()}" if self._version == IN_DOUBT else f"version {self._version}"
            raise InferenceError(f"engine {self._index} must serve version {version} to answer; it serves {serves}")
        if not self._open:
            self._forget_prefixes()
            self._num_steps, self._ended, self._arrived = 0, {}, {}
        for request in requests:
            parameters = SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                min_p=request.min_p,
                max_tokens=request.max_tokens - len(request.sampled.token_ids),
                seed=request.engine_seed,
                logprobs=0,
                flat_logprobs=True,  # lists of numbers, and no object a token
                stop_token_ids=self._end_ids,
                stop=self._stop_texts,
                detokenize=bool(self._stop_texts),  # vLLM looks for them in the text
                skip_special_tokens=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            assert request.request_id not in self._open, request.request_id
            begun = {"prompt_token_ids": [*request.token_ids, *request.sampled.token_ids]}
            self._llm.add_request(request.request_id, begun, parameters)
            self._open[request.request_id] = request, version
        self._busy_seconds += time.monotonic() - started

    def collect(self, request_ids: Sequence[str], num_open: int = 0) -> tuple[list[Completion | None], dict[str, float]]:
        """Decodes until no more than `num_open` of `request_ids` are open, and hands over those that are done: several calls of
        the same requests, of which the last leaves none open, hand them over while they end. What is decoded together is
        the same in one call and in several.

        (In the order of `request_ids` the completions, None for what is open or has been handed over; seconds of work since the
        last call and tokens of what was completed meanwhile, or with sync.in_flight, whose pauses hand over too, of what this
        call hands over, also those sampled before a pause). InferenceError when all calls of these requests take longer than
        inference.timeout_seconds."""
        started = time.monotonic()
        before = self._handed_over
        if not before:
            self._collecting_since = started
        unknown = [request_id for request_id in request_ids if request_id not in self._open and request_id not in before]
        if unknown:
            raise InferenceError(f"engine {self._index} was never given request {unknown[0]}: its submission failed")
        missing = set(request_ids) - before - self._done.keys()
        while len(missing) > num_open:
            missing.difference_update(self._decode())
            if time.monotonic() - self._collecting_since > self._timeout:
                raise InferenceError(
                    f"engine {self._index} did not finish {len(missing)} of {len(request_ids)} requests within "
                    f"inference.timeout_seconds = {self._timeout}: raise it or lower sampling.max_tokens"
                )
        ended = {request_id: self._completion(request_id) for request_id in request_ids if request_id in self._done}
        self._handed_over = before | ended.keys() if num_open else set()
        self._busy_seconds += time.monotonic() - started
        handed_over = sum(len(completion.token_ids) for completion in ended.values())
        num_tokens = handed_over if self._config.sync.in_flight else self._num_sampled
        usage = {"seconds": self._busy_seconds, "tokens": float(num_tokens)}
        self._busy_seconds, self._num_sampled = 0.0, 0
        return [ended.get(request_id) for request_id in request_ids], usage

    def _decode(self) -> list[str]:
        """A decoding step; the requests that it completed."""
        with phase(Phase.DECODE):
            outputs = self._llm.step()
        self._num_steps += 1
        if self._recorder is not None:
            self._recorder.decoded()
        done = [output for output in outputs if output.finished]
        for output in done:
            self._done[output.request_id], self._ended[output.request_id] = output.outputs[0], self._num_steps
            self._num_sampled += len(output.outputs[0].token_ids)
        return [output.request_id for output in done]

    def steps_so_far(self) -> int:
        """Decoding steps since the engine was empty. From now on it can take back what further ones decode."""
        self._arrived = {state.external_req_id: (_num_tokens(state), array("I")) for state in self._states()}
        return self._num_steps

    def go_on(self, seconds: float) -> bool:
        """Decodes about so long; whether anything is left to decode."""
        started = time.monotonic()
        while self._open.keys() - self._done.keys() and time.monotonic() - started < seconds:
            self._decode()
            self._note_tokens()
        self._busy_seconds += time.monotonic() - started
        return bool(self._open.keys() - self._done.keys())

    def _states(self) -> list[Any]:
        """vLLM's of every request that is not done."""
        return list(self._llm.output_processor.request_states.values())

    def _note_tokens(self) -> None:
        """Notes at which decoding step each token came that a request has now and had not before: beside the number that it had
        at `steps_so_far`, the steps of the others, rising."""
        for state in self._states():
            before, steps = self._arrived[state.external_req_id]
            steps.extend([self._num_steps] * (_num_tokens(state) - before - len(steps)))

    def pause(self, num_steps: int) -> list[Part]:
        """Gives up what is open after so many decoding steps, no fewer than `steps_so_far` said, so that the engine is empty;
        what was decoded beyond them is taken back. Returns it in the order of its submission: what was done then as its
        completion, what was not as a request to go on with. Keys and values go: who goes on computes them again with the
        weights of then, for with those of older weights log-probs are not the model's own."""
        started = time.monotonic()
        while self._num_steps < num_steps and self._open.keys() - self._done.keys():
            self._decode()
            self._note_tokens()
        states = {state.external_req_id: state for state in self._states()}
        parts: list[Part] = []
        waiting: list[str] = []
        for request_id in list(self._open):
            if request_id in self._done and self._ended[request_id] <= num_steps:
                parts.append(self._completion(request_id))
                continue
            if done := request_id in self._done:
                output = self._done.pop(request_id)
                sampled, found = output.token_ids, output.logprobs
            else:
                state = states[request_id]
                sampled, found = state.detokenizer.output_token_ids, state.logprobs_processor.logprobs
            (request, version), (before, arrived) = self._open.pop(request_id), self._arrived[request_id]
            count = before + bisect_right(arrived, num_steps)
            token_ids, log_probs = TokenIds.of(sampled), self._log_probs_of(sampled, found, version)
            parts.append(request.paused(token_ids[:count], log_probs[:count], version))
            if done:
                continue
            if token_ids:
                self._llm.abort_request([request_id])  # one by one: of several, vLLM frees the memory in no fixed order
            else:
                waiting.append(request_id)
        self._llm.abort_request(waiting)
        self._arrived = {}
        self._forget_prefixes()
        self._busy_seconds += time.monotonic() - started
        return parts

    def _completion(self, request_id: str) -> Completion:
        (request, version), output = self._open.pop(request_id), self._done.pop(request_id)
        assert version == self._version, (request_id, version, self._version)  # no sync begins while a request is open
        log_probs = self._log_probs_of(output.token_ids, output.logprobs, version)
        sampled = request.sampled.followed_by(TokenIds.of(output.token_ids), log_probs, version)
        return Completion(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            seed=request.seed,
            version=sampled.spans[0][0],
            token_ids=sampled.token_ids,
            log_probs=sampled.log_probs,
            temperature=self._config.log_prob_temperature,
            text=self._tokenizer.decode(sampled.token_ids, skip_special_tokens=True),
            finish_reason="stop" if output.finish_reason == "stop" else "length",
            spans=sampled.spans if self._config.sync.in_flight else (),
        )

    def _log_probs_of(self, token_ids: Sequence[int], found: Any, version: int) -> LogProbs:
        """Those of sampled tokens, of vLLM's flat lists. NumericsError where one is not finite."""
        assert list(found.token_ids) == list(token_ids), "one log-prob a sampled token, and its own"
        log_probs = LogProbs.of(found.logprobs)
        require_finite(log_probs, self._index, version)
        return log_probs

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob, at temperature 1, of each token of each sequence given those before it, but for the first; used to check
        a sync. InferenceError when the engine serves no version, or has requests in flight."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._version == IN_DOUBT or self._open:
            why = self._doubt() if self._version == IN_DOUBT else f"{len(self._open)} requests are in flight"
            raise InferenceError(f"engine {self._index} must serve a version and be idle to score; {why}")
        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        found: dict[str, Any] = {}
        with phase(Phase.ENGINE_LOG_PROBS):
            for index, ids in enumerate(sequences):
                self._llm.add_request(str(index), {"prompt_token_ids": list(ids)}, parameters)
            while len(found) < len(sequences):
                found |= {output.request_id: output.prompt_logprobs for output in self._llm.step() if output.finished}
        return [
            [entry[token].logprob for entry, token in zip(found[str(index)][1:], ids[1:], strict=True)]
            for index, ids in enumerate(sequences)
        ]

    def profile(self, on: bool) -> None:
        """Opens or closes this engine's window of profile.tool. torch's profiler records this process: with
        inference.tensor_parallel > 1 its workers are others, and only what it does itself and its waits for them are seen."""
        if on:
            tool, name = self._config.profile.tool, profiled_process("engine", self._index)
            assert tool != "off"
            self._recorder = Recorder(tool, self._config.run_directory, name, self._capture)
            self._recorder.start()
        elif self._recorder is not None and self._recorder.recording:  # else it was full, or the engine has been replaced
            self._recorder.stop()

    def _capture(self, on: bool) -> None:
        """Tells nsys in the workers, which have the device."""
        self._llm.collective_rpc("semion_capture", args=(on,))

    # -- weight sync

    def receive(self, version: int, call: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        """Receives, places and verifies a whole version on every worker, drops the prefix cache, and serves it; returns
        it, and of each worker the digest of what it then multiplies with where that is not what was sent (FP8). An engine
        that sleeps wakes: its weights before, its KV cache after. Meanwhile, and after a failure, the engine answers no
        request. WeightSyncError says what went wrong; EngineLostError where vLLM was left between two versions that no
        further sync can mend."""
        if self._open:
            raise InferenceError(f"engine {self._index} has {len(self._open)} requests in flight at a weight sync")
        self._version = IN_DOUBT
        self._wake(WEIGHTS)
        with phase(Phase.PLACE):
            answers = self._llm.collective_rpc("semion_receive", args=(call,))
        if found := [(f"worker {rank}: {why}", echo) for rank, (why, echo, _) in enumerate(answers) if why]:
            kind = EngineLostError if self._config.inference.packed_weights else WeightSyncError
            error = kind("; ".join(why for why, _ in found))
            error.echo = all(echo for _, echo in found)
            raise error
        self._wake(KV_CACHE)
        self._forget_prefixes()
        self._version = version
        return version, tuple(digest for *_, digest in answers)

    def _forget_prefixes(self) -> None:
        """Drops what is cached of earlier prompts. EngineLostError where vLLM still holds some of it although nothing is in
        flight: keys and values of other weights would be taken for those of the next."""
        if not self._llm.reset_prefix_cache():
            raise EngineLostError(
                f"engine {self._index} must drop its prefix cache before it samples; found that vLLM holds blocks of it "
                f"though no request is in flight: set inference.vllm.enable_prefix_caching = false if this comes again"
            )

    def sleep(self) -> None:
        """Gives back the memory of weights and KV cache; the engine serves no version before the next `receive`.
        InferenceError with requests in flight."""
        if self._open:
            raise InferenceError(f"engine {self._index} has {len(self._open)} requests in flight and cannot sleep")
        self._version = IN_DOUBT
        self._llm.sleep(level=FORGETTING)
        self._llm.collective_rpc("semion_release")
        self._asleep = [WEIGHTS, KV_CACHE]

    def _wake(self, part: str) -> None:
        if part in self._asleep:
            self._llm.wake_up(tags=[part])
            self._asleep.remove(part)

    def _doubt(self) -> str:
        return "it sleeps until the next weight sync" if WEIGHTS in self._asleep else "its last weight sync failed"
