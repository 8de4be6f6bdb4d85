"""The parallel state of a trainer rank: its tensor, pipeline and data-parallel ranks and the process group of each axis. It
opens and closes torch.distributed and megatron's groups, and builds no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.bridge.host_group import HostGroup
from engine.config.options import Trainer
from engine.core.errors import ConfigError
from engine.megatron import cpu_device
from engine.megatron.overlap import close_buffers


@dataclass(frozen=True)
class ParallelState:
    """One trainer rank. Global rank = (pp_rank * dp_size + dp_rank) * tp_size + tp_rank."""

    tp_size: int
    pp_size: int
    dp_size: int
    vpp_size: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    trainer: Trainer
    host: HostGroup  # for every wait for something that is no GPU's work

    @property
    def rank(self) -> int:
        """Global rank."""
        return (self.pp_rank * self.dp_size + self.dp_rank) * self.tp_size + self.tp_rank

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer, and so sees losses and log-probs."""
        return self.pp_rank == self.pp_size - 1

    def close(self) -> None:
        """Destroys megatron's groups and leaves torch.distributed."""
        from megatron.core import parallel_state

        self.host.close()
        close_buffers(self.trainer)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def open_parallel_state(
    trainer: Trainer,
    *,
    rank: int,
    world_size: int,
    store: dist.Store,
    timeout: timedelta,
    seed: int = 0,
    words: dist.Store | None = None,
) -> ParallelState:
    """Joins torch.distributed through `store` (gloo, or NCCL where a GPU is present) and makes megatron's groups.

    Collective over all `world_size` ranks. On a CPU machine it installs the CPU stand-in on the calling thread, the
    only one that may call megatron afterwards. `timeout` bounds every later wait of one rank for another inside a step, and how
    long one may give no sign of life outside. `words`: a connection to the store for the host group alone, the same one where
    not given. Raises ConfigError when the layout does not fill `world_size`.
    """
    if trainer.world_size != world_size:
        raise ConfigError(
            f"trainer.tensor_parallel * pipeline_parallel * data_parallel must equal the number of trainer ranks; "
            f"found {trainer.world_size} and {world_size}: start {trainer.world_size} ranks"
        )
    _sum_in_float32()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        device = torch.device("cuda", 0)  # whoever starts this process puts its own device first
        torch.cuda.set_device(device)
    else:
        device = cpu_device.CPU
        cpu_device.install()
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    told = dist.PrefixStore("host", words if words is not None else store)
    host = HostGroup(told, rank, world_size, patience_seconds=timeout.total_seconds())
    return _make_groups(trainer, device, timeout, seed, host)


def _sum_in_float32() -> None:
    """Of a product of half-precision factors that a GPU computes in parts (split-K) torch lets cuBLAS add the parts in half
    precision, where its heuristic finds that faster; here they are added in float32, whatever the sizes. For torch's own
    products, in this process."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _make_groups(trainer: Trainer, device: torch.device, timeout: timedelta, seed: int, host: HostGroup) -> ParallelState:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        trainer.tensor_parallel,
        trainer.pipeline_parallel,
        trainer.virtual_pipeline if trainer.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        order="tp-cp-ep-dp-pp",
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    parallel = ParallelState(
        tp_size=trainer.tensor_parallel,
        pp_size=trainer.pipeline_parallel,
        dp_size=trainer.data_parallel,
        vpp_size=trainer.virtual_pipeline,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        device=device,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        trainer=trainer,
        host=host,
    )
    assert parallel.rank == dist.get_rank(), (parallel.rank, dist.get_rank())
    return parallel
