"""The digest of a matrix of bits: against the reference and against Python's own integers, for every element size, row
stride and place; that pieces add up and faults show; the CUDA kernel thread by thread.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.ops import block_digest, block_digests, column_weights
from tests import reference_ops
from tests.unit.ops import simt

TYPES = [torch.uint8, torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.complex64]
PLACES, SEEDS = st.integers(0, 1 << 40), st.integers(0, 2**64 - 1)


def random_block(num_rows, num_columns, dtype, *, gap=0, seed=0):
    """Random bits [num_rows, num_columns] with a row stride of num_columns + gap."""
    generator = torch.Generator().manual_seed(seed)
    width = num_columns + gap
    room = torch.randint(0, 256, (num_rows * width * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    room = room % 2 if dtype == torch.bool else room
    return room.view(dtype).view(num_rows, width)[:, :num_columns]


@st.composite
def blocks(draw):
    num_columns = draw(st.one_of(st.integers(0, 40), st.sampled_from([4096, 4099, 9000])))
    shape = draw(st.integers(0, 11 if num_columns < 41 else 6)), num_columns
    return random_block(*shape, draw(st.sampled_from(TYPES)), gap=draw(st.integers(0, 3)), seed=draw(st.integers(0, 2**32)))


@given(blocks(), PLACES, st.integers(0, 50), SEEDS)
def test_equals_the_reference(block, row, col, seed):
    """Every type, row stride, place and seed, empty blocks, rows longer than a tile; given weights or none."""
    want = reference_ops.block_digest(block, row=row, col=col, seed=seed)
    found = block_digest(block, row=row, col=col, seed=seed)
    assert found.dtype == torch.int64
    assert found.shape == (1,)
    assert torch.equal(found, want)
    weights = column_weights(col + block.size(1) + 7, "cpu")
    assert torch.equal(block_digest(block, row=row, col=col, seed=seed, columns=weights), want)


def test_weights_and_digest_by_pythons_integers():
    """No torch arithmetic: the published first outputs of splitmix64 from states 0 and 1, and a digest of four numbers."""

    def splitmix(state):
        z = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    assert (splitmix(0), splitmix(1)) == (0xE220A8397B1DCDAF, 0x910A2DEC89025CC1)
    weights = [splitmix(j + 1) | 1 for j in range(9)]
    assert [w % 2**64 for w in column_weights(9, "cpu").tolist()] == weights
    seed, values = 2**64 - 3, [[5, 2**16 - 1], [0, 7]]
    total = 0
    for r, line in enumerate(values):
        for c, value in enumerate(line):
            total += (splitmix(seed ^ splitmix(100 + r)) | 1) * weights[3 + c] * value
    block = torch.tensor(values).to(torch.uint16)
    assert block_digest(block, row=100, col=3, seed=seed).item() % 2**64 == total % 2**64


@given(blocks(), st.integers(0, 2**32), SEEDS)
def test_digests_of_any_cut_add_up(block, cut_seed, seed):
    """A random cut into slices, again and again, each digested at its place."""
    generator = torch.Generator().manual_seed(cut_seed)

    def total(piece, row, col, depth):
        axis = int(torch.randint(0, 2, (), generator=generator))
        if depth == 0 or piece.size(axis) < 2:
            return int(block_digest(piece, row=row, col=col, seed=seed))
        at = int(torch.randint(0, piece.size(axis) + 1, (), generator=generator))
        first, second = piece.split([at, piece.size(axis) - at], axis)
        place = (row + at, col) if axis == 0 else (row, col + at)
        return total(first, row, col, depth - 1) + total(second, *place, depth - 1)

    whole = block_digest(block, row=2, col=1, seed=seed)
    assert (total(block, 2, 1, 4) - int(whole)) % 2**64 == 0


@given(blocks().filter(lambda block: block.numel() and block.dtype != torch.bool), st.data(), SEEDS)
def test_every_flipped_bit_shows(block, data, seed):
    size = block.element_size()
    row, col = data.draw(st.integers(0, block.size(0) - 1)), data.draw(st.integers(0, block.size(1) - 1))
    before = block_digest(block, row=0, col=0, seed=seed)
    spoiled = block.clone()
    spoiled.view(torch.uint8)[row, col * size + data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert not torch.equal(block_digest(spoiled, row=0, col=0, seed=seed), before)


def test_what_changes_places_shows():
    """Two rows, two columns, a block beside its place, a transposed one, two tensors under each other's seed."""
    a, b = random_block(8, 8, torch.bfloat16, seed=1), random_block(8, 8, torch.bfloat16, seed=2)
    swapped = [1, 0, *range(2, 8)]
    found = [block_digest(x, row=0, col=0, seed=3).item() for x in (a, a[swapped], a[:, swapped], a.t().contiguous(), b)]
    found += [block_digest(a, row=row, col=col, seed=seed).item() for row, col, seed in ((1, 0, 3), (0, 1, 3), (0, 0, 4))]
    found += [block_digest(b, row=0, col=0, seed=4).item()]
    assert len(set(found)) == len(found)
    assert (found[0] + found[8]) % 2**64 != (found[4] + found[7]) % 2**64


def test_the_same_whatever_the_threads():
    block = random_block(700, 1001, torch.float32)
    threads = torch.get_num_threads()
    want = reference_ops.block_digest(block, row=0, col=0, seed=1)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(block_digest(block, row=0, col=0, seed=1), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("block", "options", "message"),
    [
        (torch.zeros(3), {}, r"block must have shape \[R, C\]; found \[3\]"),
        (torch.zeros(2, 3).t(), {}, "block must have a column stride of 1; found 3: call .contiguous"),
        (torch.zeros(2, 2, dtype=torch.complex128), {}, "elements of 1, 2, 4 or 8 bytes; found 16"),
        (torch.zeros(2, 2), {"row": -1}, "row must be at least 0; found -1"),
        (torch.zeros(2, 2), {"col": -1}, "col must be at least 0; found -1"),
        (torch.zeros(2, 2), {"columns": torch.zeros(4)}, "columns must be int64; found float32"),
        (torch.zeros(2, 2), {"col": 3, "columns": torch.zeros(4).long()}, r"at least col \+ C = 5 weights; found 4"),
    ],
)
def test_wrong_arguments_are_named_with_rule_and_value(block, options, message):
    with pytest.raises(ValueError, match=message):
        block_digest(block, **{"row": 0, "col": 0, "seed": 0} | options)


def test_many_at_once_equal_each_alone():
    """Blocks of one element size, of any shape; of none; and arguments that do not fit."""
    blocks = [random_block(*shape, torch.bfloat16, seed=shape[0]) for shape in ((3, 40), (1, 7), (0, 4), (20, 0), (9, 33))]
    places = {"rows": [0, 5, 2, 1, 1 << 33], "cols": [0, 2, 9, 0, 5], "seeds": [1, 2**64 - 1, 3, 4, 1]}
    columns = column_weights(50, "cpu")
    found = block_digests(blocks, columns=columns, **places)
    options = [dict(zip(("row", "col", "seed"), place, strict=True)) for place in zip(*places.values(), strict=True)]
    want = [reference_ops.block_digest(block, **option) for block, option in zip(blocks, options, strict=True)]
    assert torch.equal(found, torch.cat(want))
    assert block_digests([], rows=[], cols=[], seeds=[], columns=columns).shape == (0,)
    with pytest.raises(ValueError, match="as many as blocks = 5; found 4, 5 and 5"):
        block_digests(blocks, columns=columns, **places | {"rows": [0] * 4})
    with pytest.raises(ValueError, match="elements of one size; found 2 and 4"):
        block_digests([blocks[0], torch.zeros(1, 1)], rows=[0, 0], cols=[0, 0], seeds=[0, 0], columns=columns)


def on_gpu(kernels, blocks, columns, places):
    """The kernel's digests of blocks [(row, seed) each], and how many launches they took."""
    table = (simt.DigestBlock * len(blocks))()
    for i, (block, (row, seed)) in enumerate(zip(blocks, places, strict=True)):
        sizes = *block.shape, row, seed
        table[i] = simt.DigestBlock(simt.at(block), block.stride(0), simt.at(columns), *sizes)
    digests, before = torch.full((len(blocks),), -1), kernels.simt_num_launches()
    sizes = simt.i64(len(blocks)), simt.i32(blocks[0].element_size())
    assert kernels.semion_block_digests(table, *sizes, simt.at(digests), None) == 0
    return digests, kernels.simt_num_launches() - before


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_cuda_kernel_equals_the_reference(dtype, multiprocessors):
    """In one launch for what lies on 16 byte boundaries and one for what does not: columns that no piece fills and fewer
    than one, rows of no round and of more than a warp weighs at once, several strips, nothing at all; few thread blocks that
    each have several matrices, and many that share one."""
    kernels = simt.load()
    shapes = [
        (1, 300, 0),
        (65, 48, 0),
        (70, 33, 15),
        (3, 4816, 0),
        (0, 5, 0),
        (5, 3, 13),
        (2, 301, 2),
        (131, 16, 0),
        (7, 2064, 16),
        (300, 1, 0),
        (140, 15, 2),
    ]
    blocks = [random_block(*shape[:2], dtype, gap=shape[2], seed=i) for i, shape in enumerate(shapes)]
    columns = column_weights(5000, "cpu")[5:]
    places = [(i << 33, 2**64 - 5 - i) for i in range(len(blocks))]
    launches = []

    def work():
        digests, num_launches = on_gpu(kernels, blocks, columns, places)
        launches.append(num_launches)
        return (digests,)

    kernels.simt_set_multiprocessors(multiprocessors)
    (found,) = simt.in_both_orders(kernels, work)
    kernels.simt_set_multiprocessors(132)
    want = [
        reference_ops.block_digest(block, row=row, col=5, seed=seed) for block, (row, seed) in zip(blocks, places, strict=True)
    ]
    assert torch.equal(found, torch.cat(want))
    assert launches == [2, 2]


def test_cuda_kernel_takes_a_launch_for_every_48_blocks():
    kernels = simt.load()
    blocks = [random_block(1, 16, torch.bfloat16, seed=i) for i in range(100)]
    columns = column_weights(16, "cpu")
    found, num_launches = on_gpu(kernels, blocks, columns, [(0, 1)] * 100)
    want = [reference_ops.block_digest(block, row=0, col=0, seed=1) for block in blocks]
    assert torch.equal(found, torch.cat(want))
    assert kernels.semion_digests_a_launch() == 48
    assert num_launches == 3
