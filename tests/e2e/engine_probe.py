"""One vLLM engine in a process of its own: samples what the command line says and prints what came, as JSON, with what the
engine says of itself. `python tests/e2e/engine_probe.py CONFIG MASKS...`, each of these a JSON table with top_k or min_p."""

import json
import sys

from engine.config.load import load_config
from engine.core.arrays import TokenIds
from engine.inference.sampling import SampleRequest
from engine.inference.vllm_engine import VllmEngine
from engine.run.spec import resolve

PROMPT, NUM_REQUESTS, NUM_TOKENS = TokenIds.of(list(b"What is 1+1?")), 8, 32


def main() -> None:
    """Samples the same requests once for each table."""
    config = load_config(sys.argv[1])
    cache = resolve(config, ("engines",), digests=False).kv_cache
    assert cache is not None
    engine = VllmEngine(config, 0, cache)
    found = []
    for text in sys.argv[2:]:
        masks = json.loads(text)
        requests = [
            SampleRequest(str(i), "p", i, i, PROMPT, config.sampling.temperature, 1.0, NUM_TOKENS, **masks)
            for i in range(NUM_REQUESTS)
        ]
        engine.submit(requests, 0)
        done, _ = engine.collect([request.request_id for request in requests])
        found.append([(list(one.token_ids), list(one.log_probs), one.text, one.finish_reason) for one in done])
    print(json.dumps({"engine": engine.describe(), "sampled": found}))


if __name__ == "__main__":
    main()
