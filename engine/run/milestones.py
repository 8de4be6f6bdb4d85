"""What comes between two steps of training: a checkpoint where one is due or the run ends early, and an evaluation. Every rank
takes part, although rank 0 alone has the records and the engines. When an evaluation is due is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.bridge.sender import stream_to_first_rank
from engine.config.load import RunConfig
from engine.core.errors import NumericsError, PreemptedError, SemionError
from engine.megatron.policy import Policy
from engine.megatron.topology import Topology
from engine.models.sharding import export_plan
from engine.observe.telling import activity
from engine.run.agreement import Agreement
from engine.run.checkpoint import Checkpoints, check_prolonged
from engine.run.controller import Controller


class Milestones:
    """The checkpoints and evaluations of a run, as one trainer rank takes part in them."""

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        topology: Topology,
        checkpoints: Checkpoints,
        controller: Controller | None,
        agreement: Agreement,
    ) -> None:
        """`controller` on rank 0, None on every other."""
        self._config, self._policy, self._topology = config, policy, topology
        self._checkpoints, self._controller, self._agreement = checkpoints, controller, agreement
        if controller is not None:
            checkpoints.select(controller.scores(), config)

    def checkpoint(self, step: int) -> None:
        """Saves the state after `step` steps where that is due. Raises what ends the run there: NumericsError for a collapse
        that the guard stops it for, PreemptedError where the command asked. Collective."""
        config, controller = self._config, self._controller
        collapse = None
        if config.guard.action != "off":
            collapse = self._agreement.reason(controller.collapse if controller is not None else None)
        # Nowhere else could a run that was asked to stop be continued.
        stopped = config.schedule.resumable(step) and self._agreement.stop_asked()
        saved = commits(config, step, ends=collapse is not None or stopped)
        if saved:
            records = controller.kept(self._checkpoints.steps()) if controller is not None else None
            weights = full_weights(config, self._policy, self._topology)
            ends = controller.end_ids if controller is not None else ()
            with activity("checkpoint", f"of {step} steps"):
                self._checkpoints.commit(step, self._policy.state(), weights, config, records, ends)
        if end := _early_end(config, step, collapse, stopped=stopped, saved=saved):
            self._close()
            raise end

    def evaluate(self, step: int) -> None:
        """Judges the weights after `step` steps on rank 0 while the others wait. Collective."""
        if self._controller is None:
            self._agreement.listen()
            return
        self._controller.evaluate(step, self._agreement.heartbeat)
        self._checkpoints.select(self._controller.scores(), self._config)
        self._agreement.done()

    def _close(self) -> None:
        """Closes rank 0's records before any rank raises: the first that does has all of them ended. Collective."""
        if self._controller is None:
            self._agreement.listen()
            return
        self._controller.finish()
        self._agreement.done()


def full_weights(config: RunConfig, policy: Policy, topology: Topology) -> Iterator[tuple[str, torch.Tensor]]:
    """The full policy by Hugging Face names, on rank 0; collective, and empty elsewhere."""
    plan = export_plan(policy.shape, policy.layout, policy.dtype, config.sync.bucket_mebibytes << 20)
    return stream_to_first_rank(policy, topology, plan, policy.dtype)


def commits(config: RunConfig, step: int, *, ends: bool) -> bool:
    """Whether the state after `step` steps is saved: when due, and where the run `ends` and can go on from it."""
    return config.checkpoint_due(step) or (ends and config.schedule.resumable(step))


def _early_end(config: RunConfig, step: int, collapse: str | None, *, stopped: bool, saved: bool) -> SemionError | None:
    """Why the run ends after `step` steps although more are asked for; None where it goes on."""
    if collapse is not None:
        state = "saved in a checkpoint" if saved else "not at a sync boundary, so the newest checkpoint stands"
        return NumericsError(f"{collapse} after {step} steps, {state}")
    return PreemptedError(f"asked to stop: saved after {step} steps, --resume auto goes on") if stopped else None


def resume_policy(config: RunConfig, checkpoints: Checkpoints, policy: Policy) -> int:
    """Loads the newest checkpoint into the policy; the step to go on with."""
    step, state = checkpoints.load(config)
    check_prolonged(config, step)
    policy.load_state(state)
    return step
