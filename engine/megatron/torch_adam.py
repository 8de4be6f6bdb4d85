"""torch's AdamW as one pass over weights, gradient and moments: on a CPU four times as fast as its operators one by one, and
without the tensors that these make in between. Where a tensor ends inside a vector of the processor its last elements may be
rounded otherwise, so that the bits depend on how a layout cuts it, as those of sums over ranks do.
"""

from __future__ import annotations

from typing import Any

import torch


class TorchAdam(torch.optim.AdamW):
    """`torch.optim.AdamW` with fused=True, made as megatron-core makes the AdamW of another library."""

    def __init__(self, params: Any, *, adam_w_mode: bool = True, **options: Any) -> None:
        assert adam_w_mode, "weight decay apart from the gradient"
        super().__init__(params, **(options | {"fused": True}))
