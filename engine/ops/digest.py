"""A digest of a matrix of bits that adds up: digests of the slices of a tensor sum to the tensor's own, however it is
sliced and whoever holds the slices. It finds faults; it is no defence against an adversary. No gradient passes.

Shape legend: R rows and C columns of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def block_digest(block: torch.Tensor, *, row: int, col: int, seed: int, columns: torch.Tensor | None = None) -> torch.Tensor:
    """Digest [1] (int64, on the block's device) of block [R, C], which lies at (row, col) of the tensor that `seed` names.

    The sum over r and c of Rw(seed, row + r) * Cw(col + c) * v(r, c) modulo 2**64, where v(r, c) are the bits of an
    element as an unsigned integer, Cw(j) = splitmix64(j + 1) | 1 and Rw(seed, i) = splitmix64(seed ^ splitmix64(i)) | 1
    (splitmix64: Steele, Lea and Flood, 2014). Digests of disjoint blocks add up, as int64, to that of their union; a
    change of one element always shows, because both weights are odd. Elements, rows, columns or tensors that change places
    show but for a small chance, largest where they differ in their highest bit alone (x and -x): some 2**-32 for 4 bytes,
    2**-48 for 2, and none for 8, where two such flips always cancel.

    The block has any type of 1, 2, 4 or 8 bytes, any row stride, and adjacent columns. `seed` counts modulo 2**64.
    `columns` are column_weights of the whole tensor or more, to be kept by a caller who has many blocks of one width;
    without them they are computed. Raises ValueError naming argument, rule and value for a wrong shape, type or place.
    """
    if columns is None:
        columns = column_weights(col + (block.size(1) if block.dim() == 2 else 0), block.device)
    return block_digests([block], rows=[row], cols=[col], seeds=[seed], columns=columns)


def block_digests(
    blocks: Sequence[torch.Tensor],
    *,
    rows: Sequence[int],
    cols: Sequence[int],
    seeds: Sequence[int],
    columns: torch.Tensor,
) -> torch.Tensor:
    """Digests [N] of N blocks with elements of one size, each as block_digest has it; on the device of `columns`. On a GPU
    they are one launch for every 48 blocks, whatever their sizes."""
    digests: torch.Tensor = torch.ops.semion.block_digests(blocks, columns, rows, cols, [signed(seed) for seed in seeds])
    return digests


def column_weights(num_columns: int, device: torch.device | str) -> torch.Tensor:
    """The weights Cw(0) to Cw(num_columns - 1) [num_columns], int64."""
    return splitmix64(torch.arange(1, max(0, num_columns) + 1, dtype=torch.int64, device=device)) | 1


def splitmix64(state: torch.Tensor) -> torch.Tensor:
    """One step of splitmix64 from each state, int64 that wraps modulo 2**64: the addition, then the finalizer."""
    z = state + signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def signed(value: int) -> int:
    """The number in [-2**63, 2**63) that equals value modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """z / 2**bits as if z were unsigned."""
    return z >> bits & (1 << (64 - bits)) - 1
