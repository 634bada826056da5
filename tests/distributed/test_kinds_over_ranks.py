"""Every kind of parameter and way to select on two ranks, ZeRO 2 and 3, against masked dense training in one process;
and several adapters on a base that is partitioned."""

from pathlib import Path
from typing import Any

import kinds
import pytest
import tiny
import torch
import torch.nn.functional as F
from ranks import ForkServer
from torch import nn
from trainer_cases import case, run_cases, zero_config
from transformers import AutoModelForCausalLM

from sparse_zero import SparseConfig, load_adapter, merge_and_unload, sparsify
from sparse_zero.adapters.files import read_adapter

pytestmark = pytest.mark.distributed

RANKS, TASK, EXAMPLES = 2, "causal-lm", 40
# Nothing that is gathered stays for its next use, so that what does stay is seen.
AT_ONCE = dict.fromkeys(
    ["stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"], 0
)
STAGES = {"zero2": zero_config(2), "zero3": zero_config(3, **AT_ONCE)}
OFFLOAD = {"device": "cpu", "pin_memory": False}
OTHER_WAYS = {
    "ddp": {},
    "zero0": {"deepspeed": zero_config(0)},
    "zero1": {"deepspeed": zero_config(1), "gradient_checkpointing": True},
    "zero2-offload": {"deepspeed": zero_config(2, offload_optimizer=OFFLOAD)},
    "zero3-offload": {"deepspeed": zero_config(3, offload_optimizer=OFFLOAD, offload_param=OFFLOAD, **AT_ONCE)},
}
"""For drawn columns, which keep a part of a layer's input."""
DRAWN = ["columns", "columns-whole"]
TIED = ["embedding", "tokens", "columns-tied"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kinds")
    kinds.save_base(directory / "untied", tied=False)
    kinds.save_base(directory / "tied", tied=True)
    return directory


def base_of(out: Path, kind: str) -> Path:
    return out / ("tied" if kind in TIED else "untied")


@pytest.fixture(scope="module")
def ranks(fork_server: ForkServer, out: Path) -> list[dict[str, Any]]:
    cases = [
        case(f"{kind}-{stage}", TASK, base_of(out, kind), EXAMPLES, deepspeed=config, **kinds.TRAINING)
        | {"sparse": settings, "experts": kinds.EXPERTS.get(kind, "grouped_mm")}
        for kind, settings in kinds.KINDS.items()
        for stage, config in STAGES.items()
    ]
    cases += [
        case(f"{kind}-{way}", TASK, base_of(out, kind), EXAMPLES, **kinds.TRAINING, **settings)
        | {"sparse": kinds.KINDS[kind], "experts": "grouped_mm"}
        for kind in DRAWN
        for way, settings in OTHER_WAYS.items()
    ]
    adapters = {kind: str(out / f"{kind}-zero2" / "adapter") for kind in kinds.KINDS if kind not in TIED}
    cases.append(case("adapters", TASK, out / "untied", 8, deepspeed=STAGES["zero3"]) | {"adapters": adapters})
    return run_cases(fork_server, RANKS, cases, out, worker="kinds_worker")


def plain(out: Path, kind: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(base_of(out, kind)).train()


def token_loss(model: nn.Module, examples: list[dict]) -> torch.Tensor:
    """The mean over all counted tokens of a batch, written out."""
    ids, labels = (torch.tensor([example[key] for example in examples]) for key in ("input_ids", "labels"))
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def masked_training(out: Path, kind: str) -> list[float]:
    """Dense gradients, AdamW on the selected scalars' changes and on what is trained in full."""
    model = plain(out, kind)
    settings = kinds.KINDS[kind]
    chosen = sparsify(plain(out, kind), SparseConfig(**settings), batches=kinds.batches_of(settings)).sparsity
    positions = {name: weight.flat_positions() for name, weight in chosen.weights.items()}
    weights = dict(model.named_parameters())
    pretrained = {name: weights[name].detach().flatten()[flat].clone() for name, flat in positions.items()}
    changes = {name: torch.zeros(flat.numel(), requires_grad=True) for name, flat in positions.items()}
    trained = changes | {name: weights[name] for name in chosen.whole}
    # As in the Trainer, norms and biases do not decay.
    groups = [
        {"params": [p for n, p in trained.items() if ("norm" in n or "bias" in n) == plain], "weight_decay": decay}
        for plain, decay in ((False, kinds.TRAINING["weight_decay"]), (True, 0.0))
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=kinds.TRAINING["learning_rate"])
    examples, losses = tiny.examples(TASK, EXAMPLES), []
    for step in range(kinds.TRAINING["max_steps"]):
        model.zero_grad()
        loss = token_loss(model, examples[step * 8 : step * 8 + 8])
        loss.backward()
        losses.append(loss.item())
        for name, flat in positions.items():
            changes[name].grad = weights[name].grad.flatten()[flat]
        optimizer.step()
        with torch.no_grad():
            for name, flat in positions.items():
                weights[name].view(-1)[flat] = pretrained[name] + changes[name]
    return losses


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        *((kind, stage) for kind in kinds.KINDS if kind != "dropout" for stage in STAGES),
        *((kind, way) for kind in DRAWN for way in OTHER_WAYS),
    ],
)
def test_losses_are_those_of_masked_dense_training(ranks: list, out: Path, kind: str, stage: str) -> None:
    expected = masked_training(out, kind)
    assert expected[0] - expected[-1] > 1e-2, "too little training for a comparison"
    for rank in ranks:
        assert rank[f"{kind}-{stage}"]["losses"] == pytest.approx(expected, abs=1e-4)


def test_dropout_is_the_same_on_every_rank_and_at_every_stage(ranks: list, out: Path) -> None:
    losses = [rank[f"dropout-{stage}"]["losses"] for rank in ranks for stage in STAGES]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-4)
    without = masked_training(out, "dropout")
    assert losses[0][0] == pytest.approx(without[0], abs=1e-4), "nothing to drop yet"
    assert abs(losses[0][-1] - without[-1]) > 1e-3


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_no_gathered_copy_outlives_the_forward(ranks: list, kind: str) -> None:
    for rank in ranks:
        copies = rank[f"{kind}-zero3"]["copies"]
        assert copies["made"] > 0
        assert copies["kept"] == 0


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_disabling_gives_the_base_model(ranks: list, out: Path, kind: str, stage: str) -> None:
    model = plain(out, kind).eval()
    examples = tiny.examples(TASK, 8)
    with torch.no_grad():
        base = [token_loss(model, examples[i : i + 4]).item() for i in (0, 4)]
    for rank in ranks:
        seen = rank[f"{kind}-{stage}"]
        assert seen["disabled"] == pytest.approx(sum(base) / 2, abs=0.05)
        assert seen["adapted"][0] == pytest.approx(seen["adapted"][1], abs=1e-6)
        assert abs(seen["adapted"][0] - seen["disabled"]) > 1e-3


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_both_stages_save_the_same_adapter(ranks: list, out: Path, kind: str) -> None:
    one, other = (read_adapter(out / f"{kind}-{stage}" / "adapter") for stage in STAGES)
    assert one.config.tensors == other.config.tensors
    assert one.config.base_fingerprint == other.config.base_fingerprint
    for part in ("deltas", "whole", "rows"):
        torch.testing.assert_close(getattr(one, part), getattr(other, part), rtol=0, atol=2e-4)


@pytest.mark.parametrize("rank", range(RANKS))
def test_switching_merging_and_unmerging_on_a_partitioned_base(ranks: list, out: Path, rank: int) -> None:
    seen = ranks[rank]["adapters"]
    assert seen["partitioned"] > 0
    assert seen["changed"] == [], "unload gives the base model's weights back"


@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS if kind not in TIED])
def test_merging_on_a_partitioned_base_equals_merging_in_one_process(ranks: list, out: Path, kind: str) -> None:
    merged = merge_and_unload(load_adapter(plain(out, kind), out / f"{kind}-zero2" / "adapter"))
    expected = {name: p.detach() for name, p in merged.named_parameters()}
    base = dict(plain(out, kind).named_parameters())
    assert any(not torch.equal(expected[name], base[name]) for name in expected)
    torch.testing.assert_close(torch.load(out / f"adapters-{kind}.pt"), expected, rtol=0, atol=0)
