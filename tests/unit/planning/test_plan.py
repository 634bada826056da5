"""`sparse-zero plan` without ranks: its counts and activations against a real model, its errors, its speed."""

import json
from pathlib import Path

import families
import pytest
import tiny
import torch
from transformers import PreTrainedModel

from launcher.cli import main
from sparse_zero import SparseConfig, sparsify
from sparse_zero.planning.memory_and_traffic import ModelSizes, ZeroSettings, traffic
from sparse_zero.planning.plan import device_bytes, least_ranks, plan
from sparse_zero.planning.planned_run import describe_run
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.selection import columns
from sparse_zero.selection import draws as positions

SHAPES = Path(__file__).parents[3] / "benchmarks" / "shapes"
TOKENS = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    tiny.save_llama(directory)
    return directory


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    """Of a model that has only a config.json."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((base / "config.json").read_text())
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {{name: {tmp_path / 'model'}, task: causal-lm, attn_implementation: eager}}\n"
        f"data: {{path: text, columns: {{text: text}}, max_length: {TOKENS}}}\n"
        "sparse: {density: 0.05, targets: all-linear}\n"
        "training: {per_device_train_batch_size: 3}\n"
    )
    return file


@pytest.mark.parametrize("columns", [1, 0.2, "whole"])
def test_counts_are_those_of_the_sparse_model(base: Path, recipe: Path, columns: float | str) -> None:
    model = tiny.AUTO_CLASS["causal-lm"].from_pretrained(base)
    sparsify(model, SparseConfig(density=0.05, targets="all-linear", columns=columns))
    sizes = describe_run(load_recipe(recipe, [f"sparse.columns={columns}"])).sizes
    weights = model.sparsity.weights.values()
    assert sorted(sizes.selected) == sorted(weight.selection.count for weight in weights)
    assert sum(sizes.base) == model.sparsity.total_parameters
    for weight in weights:
        weight.pattern  # noqa: B018 - stores the positions if they need to be
    buffers = dict(model.named_buffers())
    stored = [name for name in buffers if name.endswith(("weight_strips", "weight_columns"))]
    assert len(stored) == (0 if columns == "whole" else len(weights)) + (0 if columns == 1 else 2 * 3)
    assert sizes.index_bytes == sum(buffers[name].nbytes for name in stored)


@pytest.mark.parametrize("targets", ["all-linear", "[v_proj, o_proj]"])
@pytest.mark.parametrize("columns", [1, 0.5, "whole"])
def test_activations_are_those_that_autograd_saves(
    base: Path, recipe: Path, targets: str, columns: float | str
) -> None:
    settings = [f"sparse.targets={targets}", f"sparse.columns={columns}"]
    run = describe_run(load_recipe(recipe, settings))
    counted = run.activations.peak(checkpointed=False) - run.activations.loss
    model = tiny.AUTO_CLASS["causal-lm"].from_pretrained(base, attn_implementation="eager").train()
    sparsify(model, load_recipe(recipe, settings).sparse)
    assert counted == pytest.approx(saved_by_autograd(model), rel=0.02)


@pytest.mark.parametrize("columns", [1, 0.5, "whole"])
def test_activations_of_experts_are_those_that_autograd_saves(recipe: Path, columns: float | str) -> None:
    sizes = {"hidden_size": 32, "head_dim": 8, "moe_intermediate_size": 24}
    # The kernel of experts runs on the meta device in bfloat16 only
    model = families.tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, **sizes).bfloat16()
    model.config.save_pretrained(recipe.parent / "model")
    settings = ["sparse.targets=[gate_up_proj, down_proj]", "sparse.density=0.02", f"sparse.columns={columns}"]
    run = describe_run(load_recipe(recipe, [*settings, "model.dtype=bfloat16", "training.bf16=true"]))
    assert run.activations.formula == "counted on the meta device"
    model.set_attn_implementation("eager")
    sparsify(model, load_recipe(recipe, settings).sparse)
    counted = run.activations.peak(checkpointed=False) - run.activations.loss
    assert counted == pytest.approx(saved_by_autograd(model), rel=0.02)


def saved_by_autograd(model: PreTrainedModel) -> int:
    """The bytes that the forward of a batch saves for backward, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(3, TOKENS, dtype=torch.int64), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_forward_that_looks_for_padding_is_counted(recipe: Path) -> None:
    config = families.tiny("gpt2").config
    assert config.pad_token_id is not None
    config.save_pretrained(recipe.parent / "model")
    assert describe_run(load_recipe(recipe)).activations.formula == "counted on the meta device"


def test_checkpointing_saves_less(recipe: Path) -> None:
    kept = describe_run(load_recipe(recipe)).activations
    assert len(kept.layers) == 2
    assert kept.inputs == 2 * 3 * TOKENS * 32 * 4
    assert kept.peak(True) == kept.outside + kept.inputs + max(kept.loss, *kept.layers) < kept.peak(False)


@pytest.mark.parametrize("setting", ["chunked_loss", "use_liger_kernel"])
def test_a_loss_in_chunks_has_no_logits(recipe: Path, setting: str) -> None:
    """Three sequences of 16 tokens, 32 hidden units, a vocabulary of 64 tokens, in float32."""
    tokens, hidden, vocabulary = 3 * TOKENS, 32, 64
    whole = describe_run(load_recipe(recipe))
    chunked = describe_run(load_recipe(recipe, [f"training.{setting}=true"]))
    assert whole.activations.loss == 12 * tokens * vocabulary
    assert chunked.activations.loss == 12 * tokens * hidden
    assert chunked.activations.layers == whole.activations.layers
    (logits,) = [each for each in plan(chunked, 1)["stages"][0]["holds"] if each["what"] == "logits"]
    assert (logits["bytes"], logits["formula"]) == (12 * tokens * hidden, "12 * b * s * h, in chunks")
    head = describe_run(load_recipe(recipe, [f"training.{setting}=true", "sparse.targets=[lm_head]"]))
    assert head.activations.loss == 12 * tokens * hidden + 8 * hidden * vocabulary
    assert head.activations.loss_formula == "12 * b * s * h + 8 * h * vocabulary, in chunks"


@pytest.mark.parametrize(
    ("stage", "sent"),
    [
        (0, 1.5 * 4 * 1000),  # 2 * 3/4 of the gradients, once
        (1, (1.5 + 0.75) * 4 * 1000),
        (2, (5 * 1.5 + 0.75) * 4 * 1000),
        (3, (5 * 0.75 + 5 * 0.75 * (10 + 1 + 10 + 1)) * 4 * 1000),
    ],
)
def test_traffic_of_four_ranks(stage: int, sent: float) -> None:
    sizes = ModelSizes(base=(10_000,), selected=(1000,), whole=(), index_bytes=4000, scalar_bytes=4)
    zero = ZeroSettings(stage, stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0)
    assert sum(each.sent_bytes(4) for each in traffic(zero, 4, sizes, backwards=5)) == sent
    assert traffic(zero, 1, sizes, backwards=5) == []


def test_stage_3_does_not_gather_again_what_it_reuses() -> None:
    sizes = ModelSizes(base=(10_000,), selected=(1000,), whole=(), index_bytes=4000, scalar_bytes=4)
    once = ZeroSettings(3, stage3_param_persistence_threshold=0)
    (gathered,) = (each for each in traffic(once, 4, sizes) if each.operation == "all-gather")
    assert gathered.payload_bytes == 4 * 11_000


def test_the_smallest_number_of_ranks_is_the_smallest(recipe: Path) -> None:
    run = describe_run(load_recipe(recipe))
    zero = run.zero_settings("3")
    room = device_bytes(run, zero, 13)
    least = least_ranks(run, zero, room)
    assert device_bytes(run, zero, least) <= room < device_bytes(run, zero, least - 1)
    assert least_ranks(run, zero, device_bytes(run, zero, 10**6) - 10_000) is None


def test_the_lowest_stage_that_fits_is_chosen() -> None:
    run = describe_run(load_recipe(SHAPES / "plan.yaml", [f"model.name={SHAPES / 'llama-3-70b'}"]))
    for name in ("0", "3"):
        size = device_bytes(run, run.zero_settings(name), 8)
        planned = plan(run, 8, gpu_bytes=round(1.01 * size / 0.92))
        assert planned["stage"] == name
        assert plan(run, 8, gpu_bytes=round(0.5 * size))["stage"] != name


def test_a_model_of_405_billion_scalars_is_planned_without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(*_: object) -> None:
        raise AssertionError("drew positions")

    for name in ("stratified_positions", "stratified_strips", "bernoulli_chunks", "by_magnitude"):
        monkeypatch.setattr(positions, name, draws)
    monkeypatch.setattr(columns, "stratified_draw", draws)
    for setting in ("columns=0.1", "selection=bernoulli", "selection=gradient", "selection=magnitude"):
        overrides = [f"model.name={SHAPES / 'llama-3.1-405b'}", f"sparse.{setting}"]
        run = describe_run(load_recipe(SHAPES / "plan.yaml", overrides))
        assert sum(run.sizes.base) == 405_853_388_800
        assert sum(run.sizes.selected) == round(0.01 * 405_853_388_800)
        assert any("the pass that selects" in note for note in run.notes) == (setting == "selection=gradient")
    assert plan(run, 8)["adapter_bytes"] == 6 * sum(run.sizes.selected)  # with magnitude also positions


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "0"], "--ranks 0"),
        (["--ranks", "6", "--nodes", "4"], "4 nodes"),
        (["--ranks", "2", "--gpu-memory", "H10"], "did you mean 'H100'?"),
        (["--ranks", "2", "--gpu-memory", "-1"], "GiB above 0"),
        (["--ranks", "2", "--bandwidth", "0"], "--bandwidth 0"),
        (["--ranks", "2", "sparse.density=0.99"], "lower the density to at most"),
        (["--ranks", "2", "sparse.targets=[nothing]"], "'nothing' matches no module"),
        (["--ranks", "2", "training.per_device_train_batch_size=auto"], "training.per_device_train_batch_size"),
        (["--ranks", "2", "training.per_device_train_batch_size=0"], "must be at least 1"),
        (["--ranks", "2", "training.auto_find_batch_size=true"], "set training.per_device_train_batch_size"),
        (["--ranks", "2", "model.name=nowhere/at/all"], "nowhere/at/all cannot be loaded"),
        (["--ranks", "2", "--gpu-memory", "1e300"], "GiB above 0"),
        (["--ranks", "2", "--gpu-memory", ""], "unknown GPU"),
        (["--ranks", "2", "data.max_length=100000"], "the model supports"),
        (["--ranks", "2", "training.deepspeed=[1]"], "training.deepspeed"),
        (["--ranks", "2", "training.deepspeed={zero_optimization: true}"], "zero_optimization: True"),
        (["--ranks", "2", "training.deepspeed={bf16: true}"], "bf16: True"),
        (["--ranks", "2", "training.deepspeed={zero_optimization: {stage: 4}}"], "stage: 4: must be 0, 1, 2 or 3"),
        (["--ranks", "2", "training.deepspeed={zero_optimization: {stage: true}}"], "stage: True: must be"),
        (
            ["--ranks", "2", "training.deepspeed={zero_optimization: {stage: 2, overlap_comm: auto}}"],
            "zero_optimization.overlap_comm",
        ),
        (
            ["--ranks", "2", "training.deepspeed={zero_optimization: {stage: 2, reduce_bucket_size: null}}"],
            "zero_optimization.reduce_bucket_size",
        ),
    ],
)
def test_an_input_error_is_one_line(recipe: Path, capsys: pytest.CaptureFixture, words: list, said: str) -> None:
    assert main(["plan", str(recipe), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "x"}, "hidden_size"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "The hidden size (30)"),
        ({"intermediate_size": -5}, "cannot be built"),
        ({"num_attention_heads": 0}, "model.name"),
        ({"hidden_act": "none-such"}, "none-such"),
        ({"pad_token_id": 10**6}, "cannot be built"),
    ],
    ids=str,
)
def test_an_invalid_model_configuration_is_one_line(
    recipe: Path, capsys: pytest.CaptureFixture, change: dict, said: str
) -> None:
    file = recipe.parent / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert main(["plan", str(recipe), "--ranks", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


def test_a_classifier_on_a_model_without_a_padding_token(recipe: Path) -> None:
    file = recipe.parent / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": None}))
    overrides = ["model.task=sequence-classification", "data.columns={text: text, label: label}"]
    found = describe_run(load_recipe(recipe, overrides)).activations
    assert found.formula == "counted on the meta device"
    assert found.peak(checkpointed=False) > 0


def test_a_forward_that_fails_without_values_is_estimated(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    from transformers import LlamaForCausalLM

    def fail(*_: object, **__: object) -> None:
        raise ValueError("needs values")

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    assert "Korthikanti" in describe_run(load_recipe(recipe)).activations.formula


@pytest.mark.parametrize(
    ("settings", "own", "offloaded"),
    [
        ("{stage: 1}", "1", (False, False)),
        ("{stage: 2, offload_optimizer: {device: cpu}}", "2, offload", (True, False)),
        ("{stage: 3, offload_optimizer: {device: none}}", "3", (False, False)),
        ("{stage: 3, offload_optimizer: {device: cpu}}", "3, offload", (True, False)),
        ("{stage: 3, offload_optimizer: {device: cpu}, offload_param: {device: cpu}}", "3, offload", (True, True)),
    ],
)
def test_the_recipes_own_settings_are_planned(
    recipe: Path, settings: str, own: str, offloaded: tuple[bool, bool]
) -> None:
    run = describe_run(load_recipe(recipe, [f"training.deepspeed={{zero_optimization: {settings}}}"]))
    zero = run.zero_settings(own)
    assert plan(run, 2)["recipe_stage"] == own
    assert (zero.offload_optimizer, zero.offload_param) == offloaded
    # Not the recipe's own settings
    if own != "3, offload":
        assert run.zero_settings("3, offload").offload_param


def test_the_command_prints_a_table_and_json(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["plan", str(recipe), "--ranks", "8", "--nodes", "2", "--gpu-memory", "H100", "--bandwidth", "10"]
    assert main([*words, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in planned["stages"]] == ["0", "1", "2", "3", "2, offload", "3, offload"]
    assert planned["stage"] == "0"
    stage_0 = planned["stages"][0]
    assert stage_0["seconds_per_step"] == stage_0["sent_bytes_per_step"] / 10e9
    assert main(words) == 0
    assert "stage 0 is the lowest that fits" in capsys.readouterr().out
