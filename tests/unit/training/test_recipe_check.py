"""Mistakes in a recipe end in one line that names the key, before data or weights are loaded."""

import json
import re
from pathlib import Path

import pytest
from families import tiny

from launcher import cli
from sparse_zero.data import models, quantization, splits
from sparse_zero.training import build

RECIPE = """
model: {name: model, task: causal-lm}
data: {path: d.jsonl, columns: {text: text}, eval_size: 8}
sparse: {density: 0.02}
training: {max_steps: 2, save_strategy: "no", report_to: none}
launch: {launcher: local}
"""

ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 2},
}
DEEPSPEED = {
    "right": {},
    "batch": {"train_micro_batch_size_per_gpu": 16},
    "stage": {"zero_optimization": {"stage": 4}},
    "bucket": {"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}},
    "key": {"zero_optimization": {"stage": 2, "overlap_com": True}},
    "section": {"zero_optimisation": {"stage": 2}},
    "fp16": {"fp16": {"enabled": True}},
}

QUANTIZED = {
    "packed": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "d.jsonl").write_text(
        "".join(json.dumps({"text": "hello " * (1 + row % 5)}) + "\n" for row in range(40))
    )
    (folder / "r.yaml").write_text(RECIPE)
    for name, changes in DEEPSPEED.items():
        (folder / f"{name}.json").write_text(json.dumps(ZERO | changes))
    tiny("llama").save_pretrained(folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    for name, given in QUANTIZED.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config | {"quantization_config": given}))
    (folder / "run" / "adapter").mkdir(parents=True)
    (folder / "run" / "adapter" / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def check(folder, monkeypatch, capsys):
    """Runs a command line where neither data nor weights can be loaded. Returns the status and the output."""
    monkeypatch.chdir(folder)

    def forbidden(*args, **kwargs):
        raise AssertionError("data or weights were loaded")

    monkeypatch.setattr(build, "load_model", forbidden)
    monkeypatch.setattr(build, "load_parts", forbidden)
    monkeypatch.setattr(models, "load_model", forbidden)
    monkeypatch.setattr(splits, "load_parts", forbidden)

    def check(*words: str) -> tuple[int, str]:
        try:
            status = cli.main(words)
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return check


MISTAKES = [
    ("training.lr=1e-3", "unknown key 'lr' in section 'training'; did you mean 'learning_rate'?"),
    ("training.batch_size=4", "did you mean 'per_device_train_batch_size'?"),
    ("training.learning_rat=1e-3", "did you mean 'learning_rate'?"),
    ("training.max_length=512", "did you mean 'data.max_length'?"),
    ("training.learning_rate=fast", "training.learning_rate: input should be a valid number, not 'fast'"),
    ("training.learning_rate=-1", "training.learning_rate: -1: must be at least 0"),
    ("training.per_device_train_batch_size=0", "training.per_device_train_batch_size: 0: must be at least 1"),
    ("training.gradient_accumulation_steps=0", "training.gradient_accumulation_steps: 0: must be at least 1"),
    ("training.weight_decay=-0.1", "training.weight_decay: -0.1: must be at least 0"),
    ("training.dataloader_num_workers=-1", "training.dataloader_num_workers: -1: must be at least 0"),
    ("training.seed=-1", "training.seed: -1: a seed is at least 0"),
    ("training.seed=4294967296", "training.seed: 4294967296: a seed is at least 0 and below 2**32"),
    ("training.save_strategy=steps training.save_steps=0", "training.save_steps: 0: must be above 0"),
    ("training.eval_strategy=stepz", "stepz is not a valid IntervalStrategy"),
    ("training.bf16=true training.fp16=true", "At most one of fp16 and bf16"),
    ("training.optim=adamww", "adamww is not a valid OptimizerNames"),
    ("training.optim=lomo", "training.optim: You need to install `lomo_optim`"),
    ("training.lr_scheduler_type=cosin", "cosin is not a valid SchedulerType"),
    ("training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_type: cosine_with_min_lr: One of min_lr"),
    ("training.chunked_loss=true training.label_smoothing_factor=0.1", "label_smoothing_factor needs the logits"),
    ("training.chunked_loss=true training.fp16=true", "training.chunked_loss: the sum of the losses of a batch does"),
    ("training.chunked_loss=true training.use_liger_kernel=true", "use_liger_kernel computes the loss in chunks"),
    ("training.metric_for_best_model=rouge", "training.metric_for_best_model: no metric 'rouge'"),
    ("training.metric_for_best_model=perplexit", "did you mean 'perplexity'?"),
    ("training.batch_eval_metrics=true", "training.batch_eval_metrics: the metrics need all examples"),
    ("training.report_to=wnb", "training.report_to: unknown tracker 'wnb'; did you mean 'wandb'?"),
    ("training.report_to=comet_ml", "training.report_to: the package of 'comet_ml' is not installed"),
    ("training.deepspeed=none.json", "none.json"),
    ("training.deepspeed=batch.json", "train_micro_batch_size_per_gpu=16 vs training.per_device_train_batch_size=8"),
    ("training.deepspeed=stage.json", "training.deepspeed: zero_optimization.stage: 4: must be 0, 1, 2 or 3"),
    ("training.deepspeed=bucket.json", "training.deepspeed: zero_optimization.reduce_bucket_size: input should be"),
    ("training.deepspeed=key.json", "training.deepspeed: zero_optimization.overlap_com: extra inputs"),
    ("training.deepspeed=section.json", "DeepSpeed has no key 'zero_optimisation'; did you mean 'zero_optimization'?"),
    ("training.deepspeed=fp16.json", "fp16.enabled=True vs training.fp16"),
    ("training.fsdp=full_shard", "training.fsdp: DeepSpeed partitions sparse models"),
    ("training.resume_from_checkpoint=x", "training.resume_from_checkpoint: pass it on the command line: --resume"),
    ("training.gradient_checkpointing_kwargs={use_reentrent: false}", "did you mean 'use_reentrant'?"),
    ("training.torch_compile=true training.torch_compile_backend=inducter", "no backend 'inducter'; known: "),
    ("training.num_train_epochs=0 training.max_steps=-1", "training.num_train_epochs: 0 epochs have no step"),
    ("model.attn_implementation=flash_attention_2", "model.attn_implementation: flash_attention_2: FlashAttention2"),
    ("model.attn_implementation=sdp", 'model.attn_implementation: sdp: Specified `attn_implementation="sdp"` is not'),
    ("model.name=packed", "model.name: packed is quantised by gptq, in whose weights no scalars can be trained"),
    ("model.name=nf4 model.quantization=int8", "model.quantization: nf4 is quantised already, to nf4: leave it out"),
    (
        "model.name=torchao training.deepspeed=zero3.json",
        "model.name: torchao is quantised in a way that this run cannot use (int8_weight_only: ZeRO stage 3 cannot",
    ),
    (
        "model.quantization=int8_weight_only training.deepspeed=zero3.json",
        "model.quantization: int8_weight_only: ZeRO stage 3 cannot partition torchao's weights: use stage 2, or load",
    ),
    ("model.quantization=awq", "model.quantization.kind: must be nf4, fp4, int8 or int8_weight_only, not 'awq'"),
    (
        "model.quantization={kind: nf4, bnb_4bit_quant_storage: float32} training.deepspeed=right.json "
        "training.bf16=true",
        "model.quantization.bnb_4bit_quant_storage: float32: DeepSpeed would convert the packed bits to bfloat16",
    ),
    ("model.tokeniser=x", "unknown key 'tokeniser' in section 'model'; did you mean 'tokenizer'?"),
    ("sparse.targets=[v_prj]", "sparse.targets: 'v_prj' matches no module or parameter; similar names: v_proj"),
    ("sparse.density=0.9", "sparse.density: 0.9 requires"),
    ("sparse.density=1.5", "sparse.density: input should be less than or equal to 1, not 1.5"),
    ("sparse.exclude_modules=[lm_haed]", "exclude_modules"),
    ("data.columns={prompt: text}", "data.columns: `prompt` and `completion` go together"),
    ("data.packing=yes_please", "data.packing"),
]


ELSEWHERE = [
    ("model.name=nowhere/at-all", "model.name: nowhere/at-all cannot be loaded"),
    ("data.path=c.jsonl", "data.path: no such file 'c.jsonl'; did you mean 'd.jsonl'?"),
    ("data.path=json data.data_files=[e.jsonl]", "data.data_files: no such file 'e.jsonl'"),
]
"""What another machine may have."""

CASES = [*((False, *case) for case in MISTAKES), *((True, *case) for case in ELSEWHERE)]


@pytest.mark.parametrize(("is_elsewhere", "overrides", "message"), CASES, ids=[case[1] for case in CASES])
@pytest.mark.parametrize("command", ["check", "train --dry-run"])
def test_a_mistake_is_one_line_with_status_2(command, is_elsewhere, overrides, message, check):
    name, *options = command.split()
    status, printed = check(name, "r.yaml", *re.split(r" (?=\w+\.\w+=)", overrides), *options)
    lines = [line for line in printed.splitlines() if line.startswith("sparse-zero: ")]
    assert len(lines) == 1, printed
    assert message in lines[0]
    assert "Traceback" not in printed
    is_refused = not (is_elsewhere and options)
    assert (status, "error:" in lines[0]) == (2 if is_refused else 0, is_refused), printed


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.deepspeed=right.json"],
        ["training.metric_for_best_model=eval_loss", "training.eval_strategy=steps"],
        ["training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_kwargs={min_lr: 1e-5}"],
        ["model.attn_implementation=eager", "training.bf16=true"],
        ["sparse.selection=magnitude", "training.report_to=tensorboard"],
        ["model.quantization={kind: nf4, bnb_4bit_use_double_quant: true}", "training.deepspeed=zero3.json"],
        ["model.quantization=int8", "training.deepspeed=zero3.json"],
        ["model.quantization=int8_weight_only"],
        ["model.name=nf4", "training.deepspeed=zero3.json"],
    ],
)
def test_a_right_recipe_is_said_to_be_right(overrides, check):
    status, printed = check("check", "r.yaml", *overrides)
    assert (status, "no mistake found" in printed) == (0, True), printed


@pytest.mark.parametrize("overrides", [["model.quantization=nf4"], ["model.name=nf4"]])
def test_a_quantised_base_without_bitsandbytes(overrides, check, monkeypatch):
    find_spec = quantization.importlib.util.find_spec
    monkeypatch.setattr(
        quantization.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name)
    )
    status, printed = check("check", "r.yaml", *overrides)
    assert status == 2
    assert "nf4 needs the package bitsandbytes: pip install 'sparse-zero[quantization]'" in printed


def test_close_calls_on_the_command_line(check):
    assert "unknown: 'trian'; did you mean 'train'?" in check("trian", "r.yaml")[1]
    status, printed = check("merge", "run", "out")
    assert (status, "run: is the directory of a run; its adapter is run/adapter" in printed) == (2, True)
