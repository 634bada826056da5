"""Triton's interpreter, for tests of kernels on a machine without a GPU."""

from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction


def interpret(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType) -> None:
    """Interpret the kernels of a module in this test, if there is no GPU."""
    if torch.cuda.is_available():
        return
    own = [(kernels, name) for name, value in vars(kernels).items() if isinstance(value, JITFunction)]
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
