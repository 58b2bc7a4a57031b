"""Kernels compiled for a card that need not be there, and what the machine code says of them."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {90: 232448, 80: 101376}
"""Bytes a program may have: 227 KB on Hopper; 99 KB, what the smallest cards of the sm80 table have."""
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


@dataclass(frozen=True)
class Machine:
    """registers a thread, bytes of stack a thread and of shared memory a program, and the instructions."""

    registers: int
    stack: int
    shared: int
    ptx: str
    sass: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{re.escape(instruction)}\b", self.sass))

    @property
    def spills(self) -> int:
        return self.stack + self.count("STL") + self.count("LDL")


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], *, warps: int, stages: int, capability: int = 90
) -> Machine:
    """kernel for sm_<capability>.  types: of the arguments ("*bf16", "i32", "tensordesc<bf16[64,64]>"); every other
    argument is one of the constants.  Pointers are taken to be aligned to 16 bytes, as tensors are.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, sass = (_cuobjdump(what, file.name) for what in ("-res-usage", "-sass"))
    registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK"))
    return Machine(registers, stack, made.metadata.shared, made.asm["ptx"], sass)


def _cuobjdump(what: str, path: str) -> str:
    return subprocess.run([CUOBJDUMP, what, path], capture_output=True, text=True, check=True).stdout
