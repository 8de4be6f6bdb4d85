"""One vLLM engine in a process of its own that is asked what its output layer computes: it samples one answer, and each
token's log-prob is compared with those of a float64 product, and of a bfloat16 one, of the very hidden states and weight that
vLLM's layer was given. Prints the largest distances as JSON. `python tests/e2e/head_probe.py CONFIG`."""

import json
import sys
from typing import Any

import torch

from engine.config.load import load_config
from engine.core.arrays import TokenIds
from engine.inference.sampling import SampleRequest
from engine.inference.vllm_engine import VllmEngine
from engine.run.spec import resolve

PROMPT, NUM_TOKENS, SEED = TokenIds.of(list(b"What is 1+1?")), 24, 3


def main() -> None:
    """One request, so that row i of what the layer was given is what token i was drawn from."""
    config = load_config(sys.argv[1])
    cache = resolve(config, ("engines",), digests=False).kv_cache
    assert cache is not None
    engine = VllmEngine(config, 0, cache)
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(worker: Any) -> None:
        def note(_layer: Any, inputs: tuple[Any, torch.Tensor]) -> None:
            given.append((inputs[1].clone(), inputs[0].weight.clone()))

        worker.model_runner.get_model().logits_processor.register_forward_pre_hook(note)

    engine._llm.collective_rpc(watch)
    request = SampleRequest("0", "p", 0, SEED, PROMPT, config.sampling.temperature, 1.0, NUM_TOKENS)
    engine.submit([request], 0)
    answer = engine.collect(["0"])[0][0]
    assert answer is not None
    hidden = torch.cat([states[-1:] for states, _ in given])
    weight = given[0][1][: len(given[0][1])]
    tokens = torch.tensor(list(answer.token_ids))[:, None]
    assert len(hidden) >= len(tokens) and hidden.dtype == weight.dtype == torch.bfloat16, (hidden.shape, hidden.dtype)
    hidden = hidden[: len(tokens)]
    exact = hidden.double() @ weight.double().t()
    logs = {"exact": exact, "bfloat16": exact.bfloat16().double()}
    size = 260  # the tokenizer's; vLLM pads the weight's rows
    references = {name: logits[:, :size].log_softmax(-1).gather(1, tokens)[:, 0] for name, logits in logs.items()}
    found = torch.tensor(list(answer.log_probs), dtype=torch.float64)
    far = {name: float((found - reference).abs().max()) for name, reference in references.items()}
    head = engine._llm.collective_rpc("semion_head_dtype")
    print(json.dumps({"far": far, "tokens": len(tokens), "head": head, "vllm": engine.describe()["vllm"]}))


if __name__ == "__main__":
    main()
