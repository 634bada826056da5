"""What a training step sends, allocates and writes on each of three ranks, at every ZeRO stage."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
from ranks import ForkServer

pytestmark = pytest.mark.distributed

RANKS, SCALAR = 3, 4
CUT = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
"""So that a weight is given back between forward and backward, as in a model of billions."""
CASES: dict[str, dict[str, Any]] = {
    "0": {"zero": {"stage": 0}},
    "1": {"zero": {"stage": 1}},
    "2": {"zero": {"stage": 2}},
    "2-overlaps": {"zero": {"stage": 2, "overlap_comm": True}},
    "2-of-a-user": {"zero": {"stage": 2, "reduce_bucket_size": 150}},
    "3": {"zero": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "3-cut": {"zero": {"stage": 3, "stage3_param_persistence_threshold": 0, **CUT}},
    "3-persistent": {"zero": {"stage": 3, "stage3_param_persistence_threshold": 100}},
    "0-accumulates": {"zero": {"stage": 0}, "micro_batches": 2},
    "1-accumulates": {"zero": {"stage": 1}, "micro_batches": 2},
    "2-accumulates": {"zero": {"stage": 2}, "micro_batches": 2},
    "3-accumulates": {"zero": {"stage": 3, "stage3_param_persistence_threshold": 0, **CUT}, "micro_batches": 2},
}
TASK = "causal-lm"
TRAINED = sum(tiny.selected_counts(TASK).values())
WEIGHTS = len(tiny.selected_counts(TASK))

FORWARD_ONLY = {
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
}
"""What no gradient passes on its way to the first delta, in the value projection of the first layer."""

NUMBERS = 8
"""Bytes up to which a message is a norm."""


def _stage(name: str) -> int:
    return int(name[0])


def _micro_batches(name: str) -> int:
    return CASES[name].get("micro_batches", 1)


@pytest.fixture(scope="module")
def ranks(
    fork_server: ForkServer, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each rank counts in a step, by case."""
    out = tmp_path_factory.mktemp("steps")
    (out / "cases.json").write_text(json.dumps(CASES))
    fork_server.call(RANKS, "step_worker:main", [bases[TASK], out / "cases.json", out], out)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def sent(messages: dict[str, dict[str, int]]) -> float:
    """Bytes that a rank sends, by ring algorithms. The logger has the whole tensor, but of an all-gather a share."""
    shares = {
        "all_reduce": 2 * (RANKS - 1) / RANKS,
        "reduce_scatter_tensor": (RANKS - 1) / RANKS,
        "all_gather_into_tensor": RANKS - 1,
    }
    return sum(
        shares[operation] * int(size) * count
        for operation, sizes in messages.items()
        for size, count in sizes.items()
        if int(size) > NUMBERS
    )


def gathered(name: str, parameters: dict[str, list]) -> int:
    """Scalars that stage 3 puts together in a step, with what fills up the last rank's share of each parameter."""
    whole = {key: RANKS * math.ceil(size / RANKS) for key, (size, *_) in parameters.items()}
    kept = {key for key, (*_, is_persistent) in parameters.items() if is_persistent}
    once = sum(size for key, size in whole.items() if key not in kept)
    again = once - sum(whole[key] for key in FORWARD_ONLY - kept) if CUT.items() <= CASES[name]["zero"].items() else 0
    # What is persistent is put together once more after each update, frozen or not
    return _micro_batches(name) * (once + again) + sum(whole[key] for key in kept)


@pytest.mark.parametrize("name", CASES)
def test_a_rank_sends_what_the_formula_says(ranks: list, name: str) -> None:
    ring = (RANKS - 1) / RANKS * SCALAR
    for rank in ranks:
        parameters = rank[name]["parameters"]
        reduced = sum(RANKS * math.ceil(size / RANKS) for size, trains, _ in parameters.values() if trains)
        assert TRAINED % RANKS == 0
        assert sent(rank[name]["sent"]) == pytest.approx(
            {
                0: 2 * ring * TRAINED,
                1: 2 * ring * TRAINED + ring * TRAINED,
                2: _micro_batches(name) * 2 * ring * TRAINED + ring * TRAINED,
                3: _micro_batches(name) * ring * reduced + ring * gathered(name, parameters),
            }[_stage(name)],
            rel=1e-12,
        )


def test_what_stage_3_keeps_whole_is_some_of_both_kinds(ranks: list) -> None:
    kept = {trains for _, trains, is_persistent in ranks[0]["3-persistent"]["parameters"].values() if is_persistent}
    assert kept == {True, False}


@pytest.mark.parametrize("name", [name for name in CASES if _stage(name)])
def test_buckets_are_no_larger_than_the_gradient(ranks: list, name: str) -> None:
    size = CASES[name]["zero"].get("reduce_bucket_size", TRAINED)
    copies = 2 if CASES[name]["zero"].get("overlap_comm") else 1
    for rank in ranks:
        assert rank[name]["bucket_size"] == size
        assert rank[name]["buckets"] == copies * size * SCALAR


@pytest.mark.parametrize("name", CASES)
def test_deltas_are_written_once_into_each_copy_of_a_weight(ranks: list, name: str) -> None:
    # A copy is gathered again for the backward, except of the first weight, whose input needs no gradient
    twice = WEIGHTS + WEIGHTS - 1
    writes = {"3-cut": [twice], "3-accumulates": [twice] * 2}
    # At stage 0 the optimizer has the deltas themselves: they are written when it has stepped
    writes |= {"0-accumulates": [0, WEIGHTS]}
    # The other copies stay from forward to backward, and below stage 3 from one optimizer step to the next
    once = [WEIGHTS] + [0] * (_micro_batches(name) - 1)
    for rank in ranks:
        assert rank[name]["writes"] == writes.get(name, once)
