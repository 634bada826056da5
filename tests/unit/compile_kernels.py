"""Compiles the kernels of sampled_triton for GPUs that need not be there, as a launch would.

    python tests/unit/compile_kernels.py

Prints as JSON, for each kernel and device, what the machine code takes: registers of a thread, bytes of stack (spilled
registers), bytes of shared memory, and how often some instructions occur.
"""

import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_zero import sampled_triton
from sparse_zero.sampled_cost import GATHER_TILE, LINE

CAPABILITIES = (80, 90)
STRIPS = [(8, 32), (16, 32), (16, 64), (64, 16)]
"""Granularity, and strips of a tile."""
INSTRUCTIONS = {"tensor cores": r"HG?MMA", "loads of 16 bytes": r"LDG\S*\.128|LDGSTS\S*\.128"}


def variants() -> list[tuple]:
    """(name, kernel, types of its pointers, arguments that are known when it is compiled)"""
    listed = []
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        pointer, tokens = f"*{dtype}", LINE // size
        operands = {"rows": pointer, "columns": pointer, "result": "*fp32"}
        pattern = dict.fromkeys(("row_starts", "column_index", "block_starts", "strip_columns"), "*i32")
        constants = {"TOKENS": tokens, "FEATURES": 64, "stride_X": 1}
        listed.append(
            (f"tokens_last {dtype}", sampled_triton._tokens_last_kernel, {"x": pointer, "out": pointer}, constants)
        )
        constants = {"POSITIONS": GATHER_TILE, "TOKENS": tokens}
        listed.append((f"sampled {dtype}", sampled_triton._sampled_kernel, operands | pattern, constants))
    for dtype, (granularity, tile) in itertools.product(("bf16", "fp16", "fp32"), STRIPS):
        operands = {"rows": f"*{dtype}", "columns": f"*{dtype}", "result": "*fp32"}
        padded = max(sampled_triton.LEAST_ROWS, granularity)
        constants = {"ROWS": granularity, "PADDED": padded, "STRIPS": tile, "TOKENS": 64, "stride_R": 1}
        name = f"strips {dtype} {granularity} x {tile}"
        listed.append((name, sampled_triton._strips_kernel, operands | pattern, constants))
    return listed


def resources(kernel: triton.JITFunction, pointers: dict[str, str], constants: dict, capability: int) -> dict:
    """With what Triton's launcher would have found out: all sizes and strides are multiples of 16, but n is not."""
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if signature[name] != "constexpr" and name not in ("n", "row_bits"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    counts = {name: len(re.findall(rf"\b(?:{pattern})", code)) for name, pattern in INSTRUCTIONS.items()}
    return {"registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared, **counts}


if __name__ == "__main__":
    every = {f"sm_{c} {name}": resources(*variant, c) for c in CAPABILITIES for name, *variant in variants()}
    print(json.dumps(every, indent=1))
