"""Timing in turns: a temporary slowdown of the machine affects all methods, and ratios are taken within a round."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

KNOWN_BFLOAT16_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
}
"""Peak FLOP/s without sparsity, from the data sheets."""

WARM_UP = 2


def in_turns(
    methods: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """The seconds of each call in each round. The order is random in each round.

    Returns: (rounds,) for each method, without the rounds that warm up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for round_number in range(-warm_up, rounds):
        for name in random.Random(round_number).sample(list(methods), len(methods)):
            synchronize(device)
            started = time.perf_counter()
            methods[name]()
            synchronize(device)
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles of the ratios in all rounds."""
    ratios = [mine / other for mine, other in zip(times, others, strict=True)]
    if len(ratios) == 1:
        return dict.fromkeys(("median", "lower", "upper"), ratios[0])
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper}


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def peak_flops(dtype: torch.dtype, device: str, size: int | None = None) -> tuple[float, str]:
    """The machine's peak FLOP/s, and its source: a data sheet, or the fastest of ten products of two square
    matrices.
    """
    if device != "cpu" and dtype == torch.bfloat16 and torch.cuda.get_device_name() in KNOWN_BFLOAT16_FLOPS:
        return KNOWN_BFLOAT16_FLOPS[torch.cuda.get_device_name()], "data sheet"
    size = size or (2048 if device == "cpu" else 8192)
    matrix = torch.randn(size, size, device=device).to(dtype)
    seconds = in_turns({"product": lambda: matrix @ matrix}, 10, device)["product"]
    return 2 * size**3 / min(seconds), f"product of {size} x {size}"
