"""Arguments of vLLM against the source of the installed one, and of one that is written here."""

import re
import subprocess
import sys

import pytest

from engine.inference import arguments
from engine.inference.arguments import argument_faults

GOOD = {
    "enforce_eager": True,
    "attention_backend": "flash_attn",
    "cudagraph_capture_sizes": [1, 2, 4],
    "kv_cache_dtype": "fp8",
    "max_num_batched_tokens": 16384,
    "scheduling_policy": "priority",
    "async_scheduling": False,
    "compilation_config": {"cudagraph_mode": "PIECEWISE"},
    "attention_config": {"backend": "TRITON_ATTN"},
    "enable_prefix_caching": False,
}
WRONG = [
    ("enforce_eagr", True, "is no argument of the installed vLLM .*did you mean inference.vllm.enforce_eager?"),
    ("enforce_eager", "yes", "must be true or false in .*found 'yes'"),
    ("async_scheduling", 1, "must be true or false in .*found 1"),
    ("max_num_batched_tokens", True, "must be a whole number in .*found True"),
    ("stream_interval", 1.5, "must be a whole number in .*found 1.5"),
    ("scheduling_policy", "fifo", "must be fcfs or priority in .*found 'fifo'"),
    ("kv_cache_dtype", "fp9", "must be fp8 or another .*write 'fp8'"),
    ("attention_backend", "FLASH_ATN", "must be FLASH_ATTN or another .*write 'FLASH_ATTN'"),
    ("cudagraph_capture_sizes", ["a"], "must be a list of which each is a whole number"),
    ("cudagraph_capture_sizes", 8, "must be a list in .*found 8"),
    ("compilation_config", {"cudagraph_mod": 1}, r"compilation_config\.cudagraph_mod is no argument .*\.cudagraph_mode\?"),
]


def test_arguments_that_the_installed_vllm_has():
    assert list(argument_faults(GOOD)) == [] == list(argument_faults({}))


@pytest.mark.parametrize(("name", "value", "said"), WRONG, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(WRONG)])
def test_a_wrong_argument_is_told_with_what_is_near(name, value, said):
    (fault,) = argument_faults({name: value})
    assert str(fault).startswith(f"inference.vllm.{name}")
    assert re.search(said, str(fault)), str(fault)


def test_vllm_is_not_imported():
    code = "import sys; from engine.inference.arguments import argument_faults as f; f({}); print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_what_cannot_be_read_is_left_to_vllm(tmp_path, monkeypatch):
    (tmp_path / "vllm" / "engine").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / "vllm" / "other.py").write_text(
        "from typing import Literal\nRound = Literal['a', Inner]\nInner = Literal['b']\n"
    )
    (tmp_path / "vllm" / "engine" / "arg_utils.py").write_text(
        "from ..other import Round\nfrom elsewhere import Strange\n"
        "class Base:\n    old: int\n"
        "class EngineArgs(Base):\n    new: 'Strange | None'\n    round: Round\n    _hidden: int\n"
        "    size: Optional[float] = None\n"
    )

    class Found:
        origin = str(tmp_path / "vllm" / "__init__.py")

    monkeypatch.setattr(arguments, "find_spec", lambda name: Found)
    assert list(argument_faults({"old": 1, "new": object(), "round": "b", "size": 1})) == []
    found = [str(fault) for fault in argument_faults({"old": "1", "round": "c", "_hidden": 1, "size": "1"})]
    assert len(found) == 4 and "a whole number" in found[0] and "a or b" in found[1] and "no argument" in found[2]
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    assert list(argument_faults({"nonsense": 1})) == []
