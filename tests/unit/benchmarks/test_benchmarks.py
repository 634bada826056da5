"""The benchmarks of speed and memory: equal budgets, correct counting, and the files that they write."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import granularity
import many_ranks
import memory
import methods
import one_rank
import scaling
import step_time
import tables
import turns
from allocations import Meter

MIB = 2**20
TOKENS = 16


@pytest.fixture(autouse=True)
def shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.SHAPES, "tiny", (128, 2, 4, 2, 192, 64, True))


def tiny(dtype: torch.dtype = torch.float32, targets: str = "all-linear") -> tuple:
    base = methods.llama(methods.llama_config("tiny"), dtype)
    budget = methods.Budget.of(base, methods.TARGETS[targets], 0.1)
    return base, budget, torch.randint(64, (1, TOKENS), generator=torch.Generator().manual_seed(1))


# ---- the methods


@pytest.mark.parametrize("targets", methods.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [name for name in methods.METHODS if name != "frozen"])
def test_a_method_trains_the_budget_and_leaves_the_shared_weights_alone(method, dtype, targets):
    base, budget, ids = tiny(dtype, targets)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = methods.prepare(method, base, budget)
    trainable = sum(parameter.numel() for parameter in methods.trained_parameters(model))
    wanted, slack = budget.scalars, 0.0
    if method == "full":
        wanted = budget.model_scalars
    elif method == "peft-sparta":  # four deviations of a binomial
        slack = 4 * wanted**0.5
    elif method == "dora":
        slack = max(map(sum, budget.shapes.values()))
    elif method in ("sparse-16", "supertuning"):
        slack = 16 * len(budget.shapes)
    elif method == "whole":  # half a column of gate and up
        slack = max(rows for rows, _ in budget.shapes.values())
    assert abs(trainable - wanted) <= slack
    step = methods.training_step(model, ids)
    losses = [step().item() for _ in range(4)]
    assert losses[-1] < losses[0] - 1e-3
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())


def test_the_floor_computes_the_models_own_loss_through_all_layers():
    base, budget, ids = tiny()
    model = methods.prepare("frozen", base, budget)
    seen = []
    handle = model.model.layers[0].register_full_backward_hook(lambda module, into, out: seen.append(into[0]))
    loss = methods.loss_of_frozen(model, ids)
    loss.backward()
    handle.remove()
    assert seen[0].abs().sum() > 0
    torch.testing.assert_close(loss, base(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("method", ["frozen", "full"])
def test_model_flops_are_those_that_torch_counts(method):
    base, budget, ids = tiny()
    base.set_attn_implementation("eager")
    step = methods.training_step(methods.prepare(method, base, budget), ids)
    with FlopCounterMode(display=False) as counter:
        step()
    formula = methods.flops_of_step(base.config, TOKENS, weight_gradients=method == "full")
    assert counter.get_total_flops() == pytest.approx(formula, rel=2e-3)


def test_the_shapes_have_their_sizes():
    for name, size in {"llama-120m": 124e6, "llama-350m": 360e6, "llama-1b": 1.236e9, "llama-7b": 6.74e9}.items():
        model = methods.llama(methods.llama_config(name), device="meta")
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(size, rel=0.01)


# ---- timing


def test_each_round_has_an_order_of_its_own_and_every_method_once():
    calls = []
    names = ["a", "b", "c", "d"]
    seconds = turns.in_turns({name: lambda name=name: calls.append(name) for name in names}, rounds=40)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(names, 40)
    rounds = [calls[start : start + 4] for start in range(0, len(calls), 4)]
    assert len(rounds) == 40 + turns.WARM_UP
    assert all(sorted(each) == names for each in rounds)
    followed = {(one, two) for each in rounds for one, two in itertools.pairwise(each)}
    assert len(followed) == 12


def test_ratios_are_taken_within_a_round():
    assert turns.ratio([2, 40, 6], [1, 10, 1]) == {"median": 4, "lower": 3, "upper": 5}
    assert turns.ratio([3], [2]) == {"median": 1.5, "lower": 1.5, "upper": 1.5}


def test_groups_always_have_the_floor_and_ours():
    assert list(step_time.groups(["frozen", "sparse", "lora", "dora", "full"], 2)) == [
        ["frozen", "sparse", "lora", "dora"],
        ["frozen", "sparse", "full"],
    ]
    assert list(step_time.groups(["frozen", "sparse"], None)) == [["frozen", "sparse"]]


def test_a_setting_is_measured_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(step_time, "peak_flops", lambda dtype, device: (1e12, "nowhere"))
    setting = step_time.Setting("tiny", "all-linear", "float32", TOKENS, 0.1, "targets", 2, "cpu")
    result = step_time.measure(setting, ["frozen", "sparse", "lora", "full"], together=1)
    rows = result["methods"]
    assert list(rows) == ["frozen", "sparse", "lora", "full"]
    lora = rows["lora"]
    assert lora["trainable"] == lora["budget"] == rows["sparse"]["trainable"]
    assert lora["last_loss"] < lora["first_loss"]
    assert rows["frozen"]["last_loss"] == rows["frozen"]["first_loss"]
    assert set(rows["sparse"]) == {*rows["frozen"]} < {*lora} == {*rows["frozen"], "sparse_over"}
    tables.write(tmp_path / "out.json", [result], step_time.page, step_time.plot)
    assert json.loads((tmp_path / "out.json").read_text()) == [result]
    assert f"| lora   | {lora['trainable']:>9,} |" in (tmp_path / "out.md").read_text()


def test_the_goals_are_judged_by_the_medians():
    def result(targets, **medians):
        figures = {name: {"median": value} for name, value in medians.items()}
        methods = {"sparse": {"over_frozen": figures["frozen"]}, "lora": {"sparse_over": figures["lora"]}}
        return {"setting": {"targets": targets}, "methods": methods}

    assert step_time.goal_results(result("value-output", frozen=1.06, lora=0.9)) == ["/ frozen <= 1.05: missed"]
    assert step_time.goal_results(result("all-linear", frozen=1.06, lora=0.98)) == [
        "/ frozen <= 1.10: met",
        "/ lora <= 0.97: missed",
    ]


# ---- memory


def test_the_meter_counts_what_is_held_and_what_is_not():
    with Meter() as meter:
        with meter.mark("before"):
            kept = torch.empty(MIB)
        with meter.mark("within"):
            also = torch.empty(MIB // 2)
            moment = torch.empty(2 * MIB)
            del moment
        with meter.mark("operator"):
            (kept + 1).sum()
    within, (operator,) = meter.spans("within")[0], meter.spans("operator")
    assert meter.spans("before")[0].last == 4 * MIB
    assert (within.first, within.peak, within.last) == (4 * MIB, 14 * MIB, 6 * MIB)
    assert within.transient == 8 * MIB
    assert operator.transient == pytest.approx(4 * MIB, abs=4096)
    assert meter.whole.last == 6 * MIB == 4 * (kept.numel() + also.numel())


INDEX_BYTES = {"sparse": None, "lora": 0, "shira": 8, "supertuning": 4, "peft-sparta": 8, "full": 0}
"""Bytes of indices per scalar: two int32 or one. None: ours, whose representation may change."""


@pytest.mark.parametrize("method", INDEX_BYTES)
def test_what_a_rank_holds_is_what_one_counts_by_hand(method):
    arguments = argparse.Namespace(
        method=method, way="plain", model="tiny", targets="all-linear", dtype="float32", density=0.1, tokens=TOKENS,
        device="cpu",
    )  # fmt: skip
    figures = one_rank.measure(arguments)
    base, _, _ = tiny()
    n = figures["scalars"]
    assert figures["weights"] == 4 * sum(p.numel() for p in base.parameters())
    assert figures["trained"] == (0 if method == "full" else 4 * n)
    assert figures["optimizer"] == 8 * n
    assert figures["originals"] == (4 * n if method in ("sparse", "peft-sparta") else 0)
    if INDEX_BYTES[method] is not None:
        assert figures["indices"] == INDEX_BYTES[method] * n
    # inv_freq of the rotary embedding, AdamW's counts of its steps: nothing of the size of a weight is overlooked
    assert 0 <= figures["other"] < 2048
    assert figures["peak"] > sum(figures[part] for part in ("weights", "trained", "optimizer", "activations"))
    assert (figures["gradient_transient"] is not None) == (method == "sparse")


def test_a_transient_gradient_is_seen(monkeypatch):
    from sparse_zero.model import layers

    honest = layers.SparseLinear.delta_gradient

    def wasteful(*arguments):
        torch.empty(3 * MIB)
        return honest(*arguments)

    monkeypatch.setattr(layers.SparseLinear, "delta_gradient", staticmethod(wasteful))
    arguments = argparse.Namespace(
        method="sparse", way="plain", model="tiny", targets="value-output", dtype="float32", density=0.1,
        tokens=TOKENS, device="cpu",
    )  # fmt: skip
    assert one_rank.measure(arguments)["gradient_transient"] == pytest.approx(12 * MIB, rel=0.01)


def rank_row(method: str = "sparse", way: str = "zero2", count: int = 2, n: int = 1000) -> dict:
    figures = dict.fromkeys(memory.PARTS, 8 * n) | {
        "scalars": n,
        "peak": 9 * n,
        "resident": n,
        "optimizer_seconds": 0.001,
    }
    figures |= {"optimizer": 12 * n // count, "trained": 4 * n, "indices": 4 * n, "originals": 2 * n}
    figures["gradient_transient"] = 32 * MIB
    return {"method": method, "way": way, "count": count, "ranks": [figures] * count}


def test_memory_pages_show_the_promises_and_what_did_not_run(tmp_path):
    failed = {"method": "shira", "way": "ddp", "count": 2, "failure": "TypeError: no"}
    options = {"model": "tiny", "targets": "all-linear", "dtype": "float32", "tokens": 1, "density": 0.1}
    result = {"options": options, "machine": "m", "torch": "t", "runs": [failed]}
    tables.write(tmp_path / "failed.json", [result], memory.page, memory.plot)
    result["runs"].insert(0, rank_row())
    assert memory.checks(rank_row()) == [
        "sparse",
        "2",
        "zero2",
        "1.0000",
        "10.00",
        "4.00, 4.00, 2.00",
        "32.0 MiB, 50%",
    ]
    tables.write(tmp_path / "memory.json", [result], memory.page, memory.plot)
    assert "- shira, 2 ranks, ddp: TypeError: no" in (tmp_path / "memory.md").read_text()


def test_runs_on_one_rank_are_plain_and_the_floor_needs_no_others():
    runs = memory.planned(["frozen", "sparse", "dora"], [1, 4])
    assert runs[:3] == [("frozen", "plain", 1), ("sparse", "plain", 1), ("dora", "plain", 1)]
    assert runs[3:] == [("sparse", "zero2", 4), ("sparse", "zero3", 4), ("dora", "ddp", 4)]


def test_the_first_exception_of_a_rank_is_named():
    printed = "x\n[rank1]: Traceback\n[rank1]:   raise\n[rank1]: TypeError: no recurse\ntorch.x.ChildFailedError: \n"
    assert many_ranks.failure_of(printed) == "TypeError: no recurse"
    assert many_ranks.failure_of("fine") is None


def test_scaling_over_density_and_its_page(tmp_path):
    arguments = argparse.Namespace(
        model="tiny", targets="all-linear", dtype="float32", density=0.01, tokens=TOKENS, rounds=1, device="cpu",
        tokens_of_rank=TOKENS,
    )  # fmt: skip
    rows = scaling.over_density(arguments)
    size = methods.Budget.of(tiny()[0], "all-linear", 0.1).target_scalars
    for row in rows:
        assert row["trainable"] == pytest.approx(row["density"] * size, abs=14)
    results = [
        {"what": "density", "settings": vars(arguments), "machine": "m", "rows": rows},
        {"what": "ranks", "settings": vars(arguments), "machine": "m", "rows": [rank_row(), rank_row(count=4)]},
    ]
    tables.write(tmp_path / "scaling.json", results, scaling.page, scaling.plot)
    assert "1.0000" in (tmp_path / "scaling.md").read_text()


# ---- strips


def test_accuracy_goes_on_with_what_is_missing_at_the_best_rate_of_each(tmp_path, monkeypatch):
    cache, met = tmp_path / "runs.jsonl", []
    good = {1: 3e-3, 8: 3e-3, 16: 1e-2, 32: 1e-2, 64: 1e-3}

    def measured(run, device, strip):
        if len(met) in (3, 17):
            met.append(None)
            raise KeyboardInterrupt
        met.append((strip, run.split, run.learning_rate, run.seed))
        accuracy = 0.5 + 0.2 * (run.learning_rate == good[strip]) + 0.01 * run.seed
        return {**vars(run), "trainable": 8, "accuracy": accuracy, "loss": 0.5, "cpu_seconds": 1.0}

    monkeypatch.setattr(granularity, "train_and_measure", measured)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            granularity.add_missing_runs(cache, "cpu")
    granularity.add_missing_runs(cache, "cpu")
    runs = [run for run in met if run]
    assert len(runs) == len(set(runs)) == 5 * 3 + 5 * 5
    assert {run[1] for run in runs[:15]} == {"validation"}
    tested = [run for run in runs if run[1] == "test"]
    assert tested[:5] == [(strip, "test", rate, 0) for strip, rate in good.items()]
    assert {(strip, rate) for strip, _, rate, _ in tested} == set(good.items())
    found, examples = granularity.accuracies(cache)
    assert {strip: list(scores) for strip, scores in found.items()} == {strip: [0, 1, 2, 3, 4] for strip in good}
    assert found[16][3] == pytest.approx(0.73)
    assert {strip: row["learning_rate"] for strip, row in examples.items()} == good
    assert "0.003" in granularity._accuracy_section(cache)
