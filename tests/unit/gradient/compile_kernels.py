"""Compiles the Triton kernels as a launch would, for GPUs that need not be present.

    python tests/unit/gradient/compile_kernels.py

For each kernel and device, prints the resources of the machine code as JSON: registers per thread, bytes of stack
(spilled registers), bytes of shared memory, and the number of some instructions.
"""

import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rpn import triton_kernels as noise_kernels
from sparse_zero.gradient import triton_kernels, triton_writes
from sparse_zero.gradient.cost import GATHER_TILE, LINE

CAPABILITIES = (80, 90)
STRIPS = [(8, 32), (16, 32), (16, 64), (64, 16)]
"""Pairs of granularity and strips per tile."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INSTRUCTIONS = {"tensor cores": r"HG?MMA", "loads of 16 bytes": r"LDG\S*\.128|LDGSTS\S*\.128"}


def variants() -> list[tuple]:
    """(name, kernel, types of its pointers and 64-bit numbers, compile-time arguments, launch options)"""
    listed = []

    def add(name: str, kernel: triton.JITFunction, pointers: dict, constants: dict, **options: int) -> None:
        listed.append((name, kernel, pointers, constants, options))

    for dtype, size in (("bf16", 2), ("fp32", 4)):
        pointer, tokens = f"*{dtype}", LINE // size
        operands = dict.fromkeys(("first", "second", "out", "below"), pointer)
        constants = {"TOKENS": tokens, "FEATURES": 64, "stride_X": 1, "stride_Y": 1}
        add(f"tokens_last {dtype}", triton_kernels._tokens_last_kernel, operands, constants)
        operands = {"last": pointer, "result": "*fp32", "strip_indices": "*i32"}
        constants = {"POSITIONS": GATHER_TILE, "TOKENS": tokens, "FIRST": False}
        add(f"sampled {dtype}", triton_kernels._sampled_kernel, operands, constants)
        operands = {"matrix": pointer, "base": pointer, "change": "*fp32", "result": "*fp32", "strip_indices": "*i32"}
        for rows in (1, 16):
            constants = {"STRIPS": triton_kernels.TILE_STRIPS, "ROWS": rows}
            known = {"block_starts": "*i32"} if rows > 1 else {}
            constants |= {} if known else {"block_starts": None}
            for name, kernel in (("gather", triton_kernels._gather_kernel), ("write", triton_writes._write_kernel)):
                add(f"{name} {dtype} {rows}", kernel, operands | known, constants)
            pointers = {"table": "*i64", "owners": "*i32"} | operands | known
            constants = {"STRIPS": triton_kernels.TILE_STRIPS, "COLUMNS": 10}
            constants |= {} if known else {"block_starts": None}
            add(f"write_all {dtype} {rows}", triton_writes._write_all_kernel, pointers, constants)
        pointers |= {"columns": "*i64", "indices": "*i32"}
        for name, known in (("some", {}), ("whole", {"indices": None})):
            constants = {"STRIPS": triton_kernels.TILE_STRIPS, "COLUMNS": 11} | known
            add(f"write_all_columns {dtype} {name}", triton_writes._write_all_columns_kernel, pointers, constants)
    of_strips = [*itertools.product(("bf16", "fp32"), STRIPS), ("fp16", STRIPS[0])]
    for dtype, (granularity, tile) in of_strips:
        operands = {"rows": f"*{dtype}", "last": f"*{dtype}", "result": "*fp32"}
        operands |= {"block_starts": "*i32", "strip_indices": "*i32"}
        padded = max(triton_kernels.MIN_ROWS, granularity)
        launch = triton_kernels.strips_launch(tile, padded, 2048, DTYPES[dtype])
        constants = {"ROWS": granularity, "PADDED": padded, "STRIPS": tile, "stride_R": 1, "FIRST": False}
        constants["TOKENS"] = launch.pop("TOKENS")
        add(f"strips {dtype} {granularity} x {tile}", triton_kernels._strips_kernel, operands, constants, **launch)
    constants = {"CHANNELS": noise_kernels.CHANNELS, "OTHERS": noise_kernels.OTHERS}
    operands = {"circles": "*i32", "common_key": "i64"}
    add("circles", noise_kernels._circles_kernel, operands, constants)
    operands = {"circles": "*i32", "distribution": "*fp64"}
    operands |= dict.fromkeys(("rows", "lengths", "starts", "keys"), "*i64")
    for dtype, step in itertools.product(
        ("bf16", "fp32"), (noise_kernels.MOVE, noise_kernels.CLEAR, noise_kernels.ADD)
    ):
        constants = {"STEP": step, "SLOTS": noise_kernels.SLOTS, "BOUNDS": noise_kernels.BOUNDS, "SUM": tl.float32}
        pointers = operands | dict.fromkeys(("values", "result"), f"*{dtype}")
        add(f"move {dtype} {step}", noise_kernels._move_kernel, pointers, constants)
    return listed


def resources(kernel: triton.JITFunction, pointers: dict, constants: dict, options: dict, capability: int) -> dict:
    """Resources of a kernel, compiled as if all sizes and strides except n were multiples of 16."""
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if signature[name] != "constexpr" and name not in ("n", "count", "tiles"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
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
