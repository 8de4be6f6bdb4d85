"""One vLLM engine in a process of its own: samples what the command line says and prints what came, as JSON, in one call and
as the pool asks for it, in several, with how many came in each of these, once more with vLLM's layers in the place of ours, and
what the engine says of itself, with how many passes through the layers were ours.
`python tests/e2e/engine_probe.py CONFIG MASKS...`, each of these a JSON table with top_k or min_p."""

import json
import sys
from typing import Any

from engine.config.load import load_config
from engine.core.arrays import TokenIds
from engine.core.types import Completion
from engine.inference.pool import open_after
from engine.inference.sampling import SampleRequest
from engine.inference.vllm_engine import VllmEngine
from engine.run.spec import resolve

PROMPT, NUM_REQUESTS, NUM_TOKENS = TokenIds.of(list(b"What is 1+1?")), 8, 32


def main() -> None:
    """Samples the same requests for each table."""
    config = load_config(sys.argv[1])
    cache = resolve(config, ("engines",), digests=False).kv_cache
    assert cache is not None
    engine = VllmEngine(config, 0, cache)
    found: dict[str, list[Any]] = {"sampled": [], "in_several_calls": [], "counts": [], "vllm_layers": [], "passes": []}
    for text in sys.argv[2:]:
        masks = json.loads(text)
        requests = [
            SampleRequest(str(i), "p", i, i, PROMPT, config.sampling.temperature, 1.0, NUM_TOKENS, **masks)
            for i in range(NUM_REQUESTS)
        ]
        names = [request.request_id for request in requests]
        engine.submit(requests, 0)
        found["sampled"].append(told(engine.collect(names)[0]))
        engine.submit(requests, 0)
        calls = [told(engine.collect(names, left)[0]) for left in open_after(len(names))]
        found["in_several_calls"].append([next(filter(None, of_request)) for of_request in zip(*calls, strict=True)])
        found["counts"].append([sum(one is not None for one in call) for call in calls])
        model = engine._llm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model.model
        ours, model.forward = model.forward, type(model).forward.__get__(model)
        engine.submit(requests, 0)
        found["vllm_layers"].append(told(engine.collect(names)[0]))
        model.forward = ours
        found["passes"].append(getattr(ours, "num_passes", 0))
    print(json.dumps({"engine": engine.describe()} | found))


def told(done: list[Completion | None]) -> list[Any]:
    """What there is to compare of each."""
    return [one and (list(one.token_ids), list(one.log_probs), one.text, one.finish_reason) for one in done]


if __name__ == "__main__":
    main()
