"""The machine code of the CUDA kernels' inner loops: how many instructions they are, how many loads are under way, and that
nothing in them branches. The counts are what docs/kernels.md says of the kernels' speed on paper. Needs the CUDA toolkit's
nvcc; requirements/common.txt has what reads its code, which is kept in build/ under a digest of its sources.
"""

import os
import re
import shutil
import subprocess
import sysconfig

import pytest

from tests.unit.ops import simt
from tests.unit.ops.test_cuda_row_kernels import load_check_cuda

pytestmark = pytest.mark.slow
ARCHITECTURE = "90"
READERS = f"{sysconfig.get_path('purelib')}/nvidia/cu13/bin:{os.environ['PATH']}"


def disassembled(name):
    """Instructions [(address, text)] of every kernel of one file, by mangled name."""
    nvcc = load_check_cuda().find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine: the CUDA toolkit has it")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    kept = simt.ROOT / "build/simt" / f"{name}-{simt.digest(version, ARCHITECTURE)}.cubin"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        work = kept.with_suffix(f".{os.getpid()}")
        (source,) = simt.ROOT.glob(f"csrc/**/{name}.cu")
        code = f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}"
        subprocess.run([nvcc, "-O3", "-std=c++17", code, "-cubin", str(source), "-o", str(work)], check=True)
        os.replace(work, kept)
    disassembler = shutil.which("cuobjdump", path=READERS)
    assert disassembler is not None, "requirements/common.txt pins nvidia-cuda-cuobjdump: run tools/environment.sh"
    command = [disassembler, "-sass", str(kept)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": READERS}).stdout
    functions = {}
    for part in text.split("Function : ")[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", part)
        functions[part.split("\n", 1)[0].strip()] = [(int(address, 16), line.strip()) for address, line in lines]
    return functions


def operations(lines):
    """What each instruction does, without its predicate and operands."""
    return [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in lines]


def loops(instructions):
    """Operations of every loop that ends in a jump back, the shortest first."""
    found = []
    for address, line in instructions:
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", line)
        if jump and int(jump[1], 16) < address:
            begin = int(jump[1], 16)
            found.append(operations([text for at, text in instructions if begin <= at <= address]))
    return sorted(found, key=len)


def loop_with(name, kernel, count, operation):
    """The shortest loop of this kernel that holds the operation at least `count` times."""
    (instructions,) = [found for symbol, found in disassembled(name).items() if kernel in symbol]
    return next(loop for loop in loops(instructions) if sum(op.startswith(operation) for op in loop) >= count)


BACKWARD = {  # (element, with the entropy): instructions of a round of four vectors at most, elements of it
    "1ELb0": (170, 32), "1ELb1": (235, 32), "2ELb0": (170, 32), "2ELb1": (235, 32), "0ELb0": (75, 16), "0ELb1": (110, 16),
}  # fmt: skip


@pytest.mark.parametrize("kind", BACKWARD)
def test_the_backward_tests_no_element(kind):
    """Four loads before the first use (with the entropy two, and four before the first store), one jump, no comparison but
    the loop's; bf16 took 365 and 524 instructions."""
    most, num_elements = BACKWARD[kind]
    loop = loop_with("log_prob_backward_kernel", f"backward_kernelILNS_7ElementE{kind}E", num_elements, "MUFU.EX2")
    assert sum(op.startswith("MUFU.EX2") for op in loop) == num_elements
    assert len(loop) <= most
    assert sum(op.startswith("BRA") for op in loop) == 1
    assert sum(op.startswith(("ISETP", "FSEL", "BSSY")) for op in loop) <= 2
    loads = [i for i, op in enumerate(loop) if op.startswith("LDG")]
    assert len(loads) == 4
    first_use = min(i for i, op in enumerate(loop) if op.startswith("MUFU"))
    assert sum(i < first_use for i in loads) >= (2 if kind.endswith("1") else 4)
    assert max(loads) < min(i for i, op in enumerate(loop) if op.startswith("STG"))


@pytest.mark.parametrize(("kind", "most"), [("1ELb0", 270), ("1ELb1", 355)])
def test_the_forward_loads_a_round_ahead(kind, most):
    """The largest loop, since each vector may raise the reference in between: 36 exponentials for 32 elements."""
    loop = loop_with("log_prob_parts_kernel", f"12parts_kernelILNS_7ElementE{kind}E", 36, "MUFU.EX2")
    assert len(loop) <= most
    assert sum(op.startswith("LDG") for op in loop) == 4


@pytest.mark.parametrize(("element", "width", "most"), [("t", 8, 210), ("j", 4, 120), ("h", 16, 380)])
def test_the_digest_keeps_four_loads_under_way(element, width, most):
    """Each row's load stands right behind its use, one round before the next."""
    loop = loop_with("digest_kernel", f"digest_kernelI{element}Li{width}E", 4, "LDG.E.EF.128")
    assert sum(op.startswith("LDG") for op in loop) == 4
    assert sum(op.startswith("SHFL") for op in loop) == 8  # two for the 64 bits of a row's weight
    assert len(loop) <= most
