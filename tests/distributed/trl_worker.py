"""One rank of TRL's trainers. Each case is trained, and resumed in its middle; OUT/rankN.json gets what was seen."""

import os
from pathlib import Path
from typing import Any

import trl_cases
from trainer_worker import run_each
from transformers import PreTrainedModel

from sparse_zero import load_adapter


def run(case: dict[str, Any], out: Path) -> dict[str, Any]:
    objective, base = case["objective"], Path(case["base"])

    def loaded() -> PreTrainedModel:
        return load_adapter(trl_cases.base_model(base, objective), case["loaded"])

    def trainer() -> Any:
        options = {"rollout_func": trl_cases.rollout} if case.get("is_fixed") else {}
        model = loaded if case.get("loaded") else None
        return trl_cases.trainer(objective, base, out / "run", model, options, **case["training"])

    trained = trainer()
    trained.train()
    trained.save_model(str(out / "adapter"))
    seen = {"losses": trl_cases.losses(trained)}
    if reference := getattr(trained, "ref_model", None):
        seen["reference"] = type(reference).__name__
    if case["training"].get("save_strategy") != "no":
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(out / "run" / "checkpoint-2"))
        resumed.save_model(str(out / "resumed"))
        seen["resumed"] = trl_cases.losses(resumed)
    return seen


def main(cases: str, out: str) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    run_each(run, cases, out)
