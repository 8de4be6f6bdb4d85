"""One process of the pool: reads cases as JSON lines from stdin, answers on the pipe whose number is its argument."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from typing import Any


def main() -> None:
    """Serves until stdin closes, and never outlives the pool, not even when that is killed in the middle of a case."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    import torch

    if os.environ.get("SEMION_TE_STAND_IN"):
        from tests import te_cpu

        te_cpu.install()
    else:
        from engine.megatron.importing import import_trainer

        import_trainer()
    from tests.parallel import cases

    torch.set_num_threads(1)
    answers = os.fdopen(int(sys.argv[1]), "w")
    for line in sys.stdin:
        message: dict[str, Any] = json.loads(line)
        try:
            answer = {"result": cases.run(message["case"], message["place"], message["arguments"])}
        except Exception:
            answers.write(json.dumps({"error": traceback.format_exc()}) + "\n")
            answers.flush()
            raise
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
