"""What `sparse-zero plan` predicts against what two ranks of the same recipe hold and send."""

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import ForkServer
from recipes import write_recipe
from trainer_cases import zero_config

from sparse_zero.planning.memory_and_traffic import model_states, traffic
from sparse_zero.planning.planned_run import PlannedRun, describe_run
from sparse_zero.recipe.recipe import load_recipe

pytestmark = pytest.mark.distributed

RANKS, MICRO_BATCHES = 2, 2
NUMBERS = 8
"""Bytes up to which a message is a norm or a flag."""

CUT = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
"""So that stage 3 keeps nothing of so small a model whole."""
HOST = {"device": "cpu"}
STAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "0": (0, {}),
    "1": (1, {}),
    "2": (2, {}),
    "2-reduce": (2, {"use_multi_rank_bucket_allreduce": False}),
    "3": (3, {}),
    "3-cut": (3, CUT),
    "3-recomputed": (3, CUT),
    "2-strips": (2, {}),
    "2-regenerated": (2, {}),
    "3-regenerated-strips": (3, CUT),
    "2-offload": (2, {"offload_optimizer": HOST}),
    "3-offload": (3, CUT | {"offload_optimizer": HOST, "offload_param": HOST}),
}
SELECTION: dict[str, dict[str, Any]] = {
    "2-strips": {"granularity": 4},
    "2-regenerated": {"indices": "regenerated"},
    "3-regenerated-strips": {"granularity": 4, "indices": "regenerated"},
}
TRAFFIC_WITHIN = {"3-recomputed": 0.1}
"""A block's last parameter is still there when its backward begins. Of the others the traffic is exact."""

IN_HALF_PRECISION_ALONE = {"2-offload", "3-offload", *SELECTION}
RUNS = [f"{stage}/bfloat16" for stage in STAGES]
RUNS += [f"{stage}/float32" for stage in STAGES if stage not in IN_HALF_PRECISION_ALONE]


@pytest.fixture(scope="module")
def recipes(bases: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, written = tmp_path_factory.mktemp("plan"), {}
    for name in RUNS:
        way, dtype = name.split("/")
        directory = root / f"{way}-{dtype}"
        directory.mkdir()
        stage, settings = STAGES[way]
        config = zero_config(stage, **settings)
        config["comms_logger"] = {"enabled": True, "prof_all": True}
        (directory / "zero.json").write_text(json.dumps(config))
        training = {"deepspeed": "zero.json", "bf16": dtype == "bfloat16", "max_steps": 4, "eval_on_start": False}
        training |= {"gradient_accumulation_steps": MICRO_BATCHES, "per_device_train_batch_size": 2}
        training |= {"activation_checkpointing": way == "3-recomputed"}
        sparse = {"density": 0.05, "targets": "all-linear"} | SELECTION.get(way, {})
        base = bases["causal-lm"]
        recipe = directory / "run.yaml"
        written[name] = write_recipe(recipe, base, "causal-lm", data, sparse=sparse, training=training)
    return written


@pytest.fixture(scope="module")
def measured(
    fork_server: ForkServer, recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    jobs = {
        path.parent.name: [{"count": RANKS, "call": "plan_worker:measure", "arguments": [str(path), str(path.parent)]}]
        for path in recipes.values()
    }
    ends = fork_server.run(jobs, tmp_path_factory.mktemp("ends"))
    assert {name: end[0].get("statuses") for name, end in ends.items()} == dict.fromkeys(jobs, [0] * RANKS), ends
    return {
        name: [json.loads((path.parent / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
        for name, path in recipes.items()
    }


def planned(recipe: Path) -> tuple[PlannedRun, Any]:
    run = describe_run(load_recipe(recipe))
    return run, run.zero_settings(str(run.zero["stage"]))


@pytest.mark.parametrize("name", RUNS)
def test_each_rank_holds_what_was_planned(recipes: dict, measured: dict, name: str) -> None:
    run, zero = planned(recipes[name])
    held = {each.what: each.bytes for each in model_states(zero, RANKS, run.sizes)}
    held["optimizer"] = held.pop("master", 0) + held.pop("moments")
    for rank in measured[name]:
        for kind, size in rank["held"].items():
            assert size == pytest.approx(held.get(kind, 0), rel=0.05), kind
        assert sum(rank["held"].values()) == pytest.approx(sum(held[k] for k in rank["held"] if k in held), rel=0.02)


@pytest.mark.parametrize("name", RUNS)
def test_each_rank_sends_what_was_planned(recipes: dict, measured: dict, name: str) -> None:
    run, zero = planned(recipes[name])
    assert run.backwards == MICRO_BATCHES
    expected: dict[str, int] = {}
    for each in traffic(zero, RANKS, run.sizes, run.backwards):
        expected[each.operation] = expected.get(each.operation, 0) + each.payload_bytes * each.times
    for rank in measured[name]:
        assert _payloads(rank["sent"]) == {
            operation: pytest.approx(size, rel=TRAFFIC_WITHIN.get(name.split("/")[0], 0.01))
            for operation, size in expected.items()
            if size
        }


def _payloads(sent: dict[str, dict[str, int]]) -> dict[str, int]:
    """Bytes by operation. DeepSpeed logs of an all-gather what a rank gives."""
    operations = {
        "all_reduce": ("all-reduce", 1),
        "all_gather_into_tensor": ("all-gather", RANKS),
        "reduce_scatter_tensor": ("reduce-scatter", 1),
        "reduce": ("reduce", 1),
    }
    found: dict[str, int] = {}
    for logged, sizes in sent.items():
        size = sum(int(size) * count for size, count in sizes.items() if int(size) > NUMBERS)
        if size:
            operation, factor = operations[logged]
            found[operation] = factor * size
    return found
