"""Triton's interpreter, for tests of kernels on a machine without a GPU."""

from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def interpret(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Interpret the kernels of some modules in this test, if there is no GPU."""
    if torch.cuda.is_available():
        return
    own = [
        (kernels, name)
        for kernels in modules
        for name, value in vars(kernels).items()
        if isinstance(value, JITFunction)
    ]
    for module, name in [*own, (tl, "sum")]:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            monkeypatch.setattr(module, name, triton.jit(getattr(module, name).fn))

    def widened(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    # The interpreter stores bfloat16 as integers and multiplies these
    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *r: dot(self, widened(a), widened(b), *r))

    def narrowed(self: InterpreterBuilder, x: TensorHandle, to: tl.dtype) -> TensorHandle:
        if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return narrow(self, x, to)
        bits = x.data.view("uint32")
        return TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("uint16"), tl.bfloat16)

    # It truncates to bfloat16, and a GPU rounds
    narrow = InterpreterBuilder.create_fp_trunc
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", narrowed)


BAD_STRIPS = {
    "outside": [3, 7, 10**6],
    "negative": [-(10**6), -1, 7],
    "unsorted": [300, 3, 7],
    "duplicates": [7, 7, 7],
    "one past the end": [3, 7],
}


def bad_strips(name: str, end: int) -> torch.Tensor:
    """Strip indices that do not fit a grid of `end` strips."""
    return torch.tensor([*BAD_STRIPS[name], *([end] if name == "one past the end" else [])]).int().to(DEVICE)


def inside(numel: int, margin: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of zeros, and memory of -1 that it is in the middle of."""
    memory = torch.full((numel + 2 * margin,), -1.0, device=DEVICE)
    memory[margin : margin + numel] = 0
    return memory[margin : margin + numel], memory
