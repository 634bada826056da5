"""One rank of transformers' Trainer with a PeftModel of sparse_zero.peft, and with the sparse model itself."""

import json
import os
import sys
from pathlib import Path

import peft
import tiny
import torch.distributed as dist
from loops_worker import TASK, trainer
from transformers import Trainer

from sparse_zero import SparseConfig, sparsify
from sparse_zero.peft import SparseZeroConfig

STAGES = [None, 2, 3]


def main(base: str, out: str) -> None:
    os.chdir(out)
    dist.init_process_group("gloo")
    losses = {}
    for stage in STAGES:
        model = tiny.AUTO_CLASS[TASK].from_pretrained(base)
        density = tiny.density_of(model, TASK)
        wrapped = peft.get_peft_model(model, SparseZeroConfig(density=density, task_type="SEQ_CLS"))
        losses[f"peft{stage}"] = trainer(wrapped.train(), Trainer, stage, f"peft{stage}")
        model = sparsify(tiny.AUTO_CLASS[TASK].from_pretrained(base), SparseConfig(density=density))
        losses[f"sparse{stage}"] = trainer(model.train(), Trainer, stage, f"sparse{stage}")
    Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
