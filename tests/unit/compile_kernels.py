"""Compiles the kernels of sampled_triton for a GPU that need not be there, as a launch would.

Prints as JSON, for each variant, what the machine code takes: registers per thread, bytes of stack (spilled registers),
of shared memory, and how often some instructions occur.
"""

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
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
STRIPS = [(8, 32), (16, 16), (16, 32), (16, 64), (32, 32), (64, 16)]
"""Granularity, and strips of a tile."""
INSTRUCTIONS = ("HMMA", "LDG.E.128", "LDGSTS", "STG.E.128", "LDL", "STL")


def variants() -> list[tuple]:
    """(name, kernel, types of its pointers, arguments known when it is compiled)"""
    listed = []
    for dtype, size in DTYPES.items():
        pointer, tokens = f"*{dtype}", LINE // size
        copied = {"x": pointer, "out": pointer}
        operands = {"rows": pointer, "columns": pointer, "result": "*fp32"}
        positions = {"row_starts": "*i32", "column_index": "*i32"}
        strips = {"block_starts": "*i32", "strip_columns": "*i32"}
        listed += [
            (
                f"tokens_last {dtype}",
                sampled_triton._tokens_last_kernel,
                copied,
                {"TOKENS": tokens, "FEATURES": 64, "stride_X": 1},
            ),
            (
                f"sampled {dtype}",
                sampled_triton._sampled_kernel,
                operands | positions,
                {"POSITIONS": GATHER_TILE, "TOKENS": tokens},
            ),
        ]
        for granularity, tile in STRIPS:
            padded = max(sampled_triton.LEAST_ROWS, granularity)
            constants = {"ROWS": granularity, "PADDED": padded, "STRIPS": tile, "TOKENS": 64, "stride_R": 1}
            name = f"strips {dtype} g={granularity} tile={tile}"
            listed.append((name, sampled_triton._strips_kernel, operands | strips, constants))
    return listed


def resources(kernel: triton.JITFunction, pointers: dict[str, str], constants: dict, capability: int) -> dict:
    """As Triton specialises a launch: sizes are multiples of 16, n is not."""
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i64" if name == "n" else "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and name not in ("n", "row_bits")
    }
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
    counts = {name: len(re.findall(rf"\b{re.escape(name)}", code)) for name in INSTRUCTIONS}
    return {"registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared, **counts}


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"sm_{capability} {name}": resources(*variant, capability)
                for capability in CAPABILITIES
                for name, *variant in variants()
            },
            indent=1,
        )
    )
