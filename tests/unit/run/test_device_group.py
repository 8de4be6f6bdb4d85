"""Which collectives go over the trainer's own groups, NCCL's on GPUs: those of a step's arithmetic and of tensors that every
rank has ready. Whoever waits in one holds its GPU busy, so every wait for rollouts, rewards, evaluations, engines, files or a
stop goes over the host group (engine/bridge/host_group.py), which this file does not list. A new call must be named here, with
why nobody can wait in it for anything but another rank's arithmetic.
"""

from __future__ import annotations

import ast

from tests.unit.test_layers import SOURCES

CALLS = {
    *(
        "barrier",
        "broadcast",
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "reduce",
        "gather",
    ),
    *("scatter", "send", "recv", "isend", "irecv", "all_to_all", "all_to_all_single", "monitored_barrier", "new_group"),
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "batch_isend_irecv"),
}
ALLOWED = {
    ("ops/lm_head.py", "all_reduce"): "the gradient of a chunk of hidden states, in the backward of a step",
    (
        "ops/token_log_probs.py",
        "all_gather_into_tensor",
    ): "log-probs of a vocabulary's shards, in the forward of a step",
    ("ops/token_log_probs.py", "all_reduce"): "sums over a vocabulary's shards of what weighs pairs, in the same forward",
    ("megatron/gathering.py", "gather"): "weights for the files of a checkpoint or export, on all ranks at once",
    ("megatron/policy.py", "all_reduce"): "the sums of a step's metrics, after its backward",
    (
        "megatron/spread.py",
        "all_gather",
    ): "of groups that several ranks have, what their loss looks at, once all have scored",
    ("megatron/scatter.py", "scatter"): "the shares of a step's sequences, once rank 0 has told that it has them",
    ("megatron/scatter.py", "broadcast"): "their sizes, and a share inside a model replica",
}


def calls() -> set[tuple[str, str]]:
    """(file, collective) of every call of torch.distributed's in engine/, but on a transport's own group, and of what measures
    a machine in processes of its own."""
    found = set()
    for path, tree in SOURCES.items():
        if path == "forecast/measuring.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
                owner = ast.unparse(node.func.value)
                if owner in ("dist", "torch.distributed", "distributed"):
                    found.add((path, node.func.attr))
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "dist.barrier":
                found.add((path, "barrier"))  # passed on to be called elsewhere
    return found


def test_every_collective_on_the_trainers_groups_is_named_and_why() -> None:
    assert calls() == set(ALLOWED)


def test_megatrons_groups_have_no_deadline_for_anything_outside() -> None:
    """The timeout of the groups is how long a rank may take longer than another inside a step, and nothing is added to it for
    engines or rewards."""
    (call,) = [
        node
        for node in ast.walk(SOURCES["run/rank.py"])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "open_parallel_state"
    ]
    (timeout,) = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "timeout"]
    assert timeout == "timedelta(seconds=trainer.timeout_seconds)"
