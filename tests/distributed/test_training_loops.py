"""A sparse model is trained by plain torch, Accelerate, DeepSpeed and the Trainer alike."""

import json
from pathlib import Path

import dense_reference
import pytest
import tiny
import torch
from loops_worker import BATCH, LEARNING_RATE, STEPS, TASK, WAYS
from ranks import run_ranks
from safetensors.torch import load_file

from sparse_zero import load_adapter, merge_and_unload

pytestmark = pytest.mark.distributed

RANKS = 2


@pytest.fixture(scope="module")
def out(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks have written. They are started as users start a script of their own, and end as it ends."""
    out = tmp_path_factory.mktemp("loops")
    run = run_ranks(RANKS, Path(__file__).with_name("loops_worker.py"), bases[TASK], out)
    assert run.left_over == []
    return out


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[str, list[float]]]:
    """The losses that each rank saw, by way."""
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def reference(bases: dict[str, Path]) -> list[float]:
    batch = RANKS * BATCH
    return dense_reference.train(bases[TASK], TASK, tiny.examples(TASK, STEPS * batch), batch, LEARNING_RATE).losses


# The plain Trainer multiplies the loss, and the gradient, of this model by the number of ranks
@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("plain")])
def test_every_loop_gives_the_losses_of_the_reference(ranks: list, reference: list[float], way: str) -> None:
    losses = [sum(of_ranks) / RANKS for of_ranks in zip(*(rank[way] for rank in ranks), strict=True)]
    assert losses == pytest.approx(reference, abs=1e-4)


def test_ranks_see_different_examples(ranks: list) -> None:
    assert ranks[0]["torch"] != pytest.approx(ranks[1]["torch"], abs=1e-2)


@pytest.mark.parametrize("name", ["plain", "plain2", "plain3"])
def test_a_plain_trainer_saves_the_adapter(bases: dict[str, Path], out: Path, name: str) -> None:
    assert sorted(path.name for path in (out / name).iterdir() if path.suffix in (".json", ".safetensors")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    saved, expected = (load_file(out / each / "adapter_model.safetensors") for each in (name, f"{name}-by-hand"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)
    assert any(value.abs().max() > 0 for key, value in saved.items() if not key.startswith("classifier"))
    load_adapter(tiny.AUTO_CLASS[TASK].from_pretrained(bases[TASK]), out / name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_takes_every_verb(bases: dict[str, Path], out: Path, stage: int) -> None:
    """What was saved through it, put onto the base, is what was merged through it; and not the base."""
    base = tiny.AUTO_CLASS[TASK].from_pretrained(bases[TASK])
    model = tiny.AUTO_CLASS[TASK].from_pretrained(bases[TASK])
    load_adapter(model, out / f"adapter-deepspeed{stage}")
    loaded, merged = merge_and_unload(model).state_dict(), torch.load(out / f"merged-deepspeed{stage}.pt")
    assert loaded.keys() == merged.keys()
    head = {name for name in loaded if name.startswith("classifier")}
    assert all(torch.equal(loaded[name], merged[name]) for name in loaded.keys() - head)
    changed = [name for name, value in base.state_dict().items() if not torch.equal(value, merged[name])]
    assert len(changed) > len(head)
