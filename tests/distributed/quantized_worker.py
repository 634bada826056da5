"""One rank of SparseTrainer runs whose base model is quantised; see trainer_worker."""

from pathlib import Path
from typing import Any

import deepspeed
import tiny
import torch
from torchao.quantization import Int8WeightOnlyConfig
from trainer_worker import TrainingArguments, WatchedTrainer, run_each, settings_of
from transformers import BitsAndBytesConfig, TorchAoConfig

from sparse_zero import SparseConfig, sparsify
from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.zero.parameters import gathered, optimizer_bytes

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "int8_weight_only": {},
}


def run(case: dict[str, Any], out: Path) -> dict[str, Any]:
    arguments = TrainingArguments(**settings_of(case, out))
    if arguments.deepspeed:
        deepspeed.init_distributed(verbose=False)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    settings = dict(KINDS[case["kind"]])
    if "load_in_4bit" in settings:
        storage = getattr(torch, case.get("storage", str(dtype).removeprefix("torch.")))
        settings |= {"bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": storage}
    if case["kind"] == "int8_weight_only":
        config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    else:
        config = BitsAndBytesConfig(**settings)
    model = tiny.AUTO_CLASS[case["task"]].from_pretrained(case["base"], quantization_config=config, dtype=dtype)
    before = {name: layer.packed.clone() for name, layer in quantized_layers(model)}
    sparsify(model, SparseConfig(**{"targets": "all-linear", "density": 0.02} | case["sparse"]))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trainer = WatchedTrainer(model, arguments, train_dataset=tiny.examples(case["task"], case["examples"]))
    trainer.train(resume_from_checkpoint=case.get("resume"))
    parameters = {name: layer.module._parameters["weight"] for name, layer in quantized_layers(model)}
    held = {name: getattr(parameter, "ds_tensor", parameter) for name, parameter in parameters.items()}
    held = {name: getattr(tensor, "qdata", tensor) for name, tensor in held.items()}
    held = {name: tensor.numel() * tensor.element_size() for name, tensor in held.items()}
    # bitsandbytes' second reference to an 8-bit weight
    states = [vars(layer.module.state) for _, layer in quantized_layers(model) if hasattr(layer.module, "state")]
    others = {state["CB"].data_ptr(): state["CB"].nbytes for state in states if state.get("CB") is not None}
    for parameter in parameters.values():
        others.pop(getattr(parameter, "qdata", parameter).data_ptr(), None)
    changed = []
    for name, layer in quantized_layers(model):
        with gathered([parameters[name]]):
            if not torch.equal(layer.packed, before[name]):
                changed.append(name)
    trainer.save_model(str(out / "adapter"))
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "trained": trained,
        "optimizer_bytes": optimizer_bytes(trainer.optimizer),
        "packed_bytes": sum(layer.packed_bytes for _, layer in quantized_layers(model)),
        "held_bytes": sum(held.values()) + sum(others.values()),
        "statistics_bytes": sum(layer.statistics_bytes for _, layer in quantized_layers(model)),
        "changed": changed,
        "frozen_with_gradient": sorted(trainer.frozen_with_gradient),
    }


def main(cases: str, out: str) -> None:
    run_each(run, cases, out)
