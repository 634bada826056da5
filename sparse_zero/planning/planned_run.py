"""Reads from a recipe what a plan needs: the model's sizes, the selected scalars, the batch, the ZeRO settings."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sparse_zero.data.models import check_max_length, load_config, max_positions, meta_model
from sparse_zero.errors import UserError
from sparse_zero.model.selected_scalars import padded
from sparse_zero.planning.activations import UNKNOWN, Activations, Loss, activations
from sparse_zero.planning.generation import Generation, completion_length, describe_generation
from sparse_zero.planning.memory_and_traffic import ModelSizes, ZeroSettings, is_offloaded
from sparse_zero.planning.quantized_sizes import QuantizedSizes, quantized_sizes
from sparse_zero.recipe.method import refuse_method
from sparse_zero.recipe.objective import GENERATING, PAIRS
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.recipe.training import check_training, default_of
from sparse_zero.selection.rules import Selection
from sparse_zero.selection.selector import select_scalars
from sparse_zero.selection.targets import all_targets, find_modules_to_save, parameter_names

WRITING_BYTES = 16
"""Bytes for each selected scalar of the weight that is being written: an 8-byte and a 4-byte position, and a 4-byte
value. The CPU operators need less."""

AUTOMATIC = {
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
"""The settings of the shipped DeepSpeed files, for stages that the recipe's DeepSpeed file does not configure."""

NEUTRAL = {"stage", "allgather_bucket_size", "round_robin_gradients", "stage3_gather_16bit_weights_on_model_save"}
"""Settings that change neither memory nor traffic here. (Stages 1 and 2 gather into the model's own memory.)"""

OFFLOADED = {"device": "cpu"}
STAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "0": (0, {}),
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "2, offload": (2, {"offload_optimizer": OFFLOADED}),
    "3, offload": (3, {"offload_optimizer": OFFLOADED, "offload_param": OFFLOADED}),
}
"""The ZeRO stages of a plan: stage and additional `zero_optimization` settings, in the order of preference."""


@dataclass(frozen=True)
class PlannedRun:
    """The facts about a run on which a plan is based."""

    sizes: ModelSizes
    parameters: int
    """Scalars of the base model."""
    quantized: QuantizedSizes | None
    """The quantised weights of the base model, if there are any."""
    activations: Activations
    hidden_size: int
    zero: Mapping[str, Any]
    """`zero_optimization` of the recipe's DeepSpeed file."""
    checkpointed: bool
    """Whether the run uses gradient checkpointing."""
    micro_batch: int
    """Examples of a micro-batch on a rank: pairs of sequences for DPO and reward models."""
    tokens: int
    """Tokens of a sequence."""
    micro_batches: int
    """Micro-batches of a step on a rank."""
    backwards: int
    """Backward passes of a step on a rank."""
    load_bytes: int
    """Bytes of the base model as from_pretrained loads it."""
    stored_positions: bool
    """Whether the adapter contains positions."""
    transient_bytes: int
    """Temporary bytes for the gradient of a weight, and for writing its delta."""
    notes: tuple[str, ...]
    """Assumptions of the plan, and what it does not consider."""
    generation: Generation | None = None
    """What GRPO and RLOO need to generate completions."""

    @property
    def own_stage(self) -> str:
        """The key of STAGES that the recipe configures."""
        stage = self.zero.get("stage", 0)
        offloads = any(is_offloaded(self.zero, key) for key in ("offload_optimizer", "offload_param"))
        name = f"{stage}, offload"
        return name if offloads and name in STAGES else str(stage)

    def zero_settings(self, name: str) -> ZeroSettings:
        """The settings of a stage: those of the recipe's DeepSpeed file if it configures that stage, else those of the
        shipped files.

        Args: name: a key of STAGES.
        """
        stage, more = STAGES[name]
        given = {key: value for key, value in self.zero.items() if not key.startswith("offload_")}
        if name == self.own_stage:
            settings = dict(self.zero)
        else:
            settings = (given if stage == self.zero.get("stage") else AUTOMATIC | given) | more
        return ZeroSettings.from_config(stage, settings, self.hidden_size, sum(self.sizes.trained))


def describe_run(recipe: Recipe) -> PlannedRun:
    """Determine the facts about a recipe's run. Only the configuration of the base model is loaded, and the model is
    built on the meta device.

    Raises UserError: the model cannot be built; the targets, the budget or the batch are not valid.
    """
    check_training(recipe.training)
    refuse_method(recipe.training, "plan")
    micro_batch, micro_batches = _batch(recipe)
    deepspeed = _deepspeed(recipe)
    half, dtype = _dtypes(recipe, deepspeed)
    section = recipe.model
    origin = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    config = load_config(section.source, **origin)
    dtype = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    if section.attn_implementation == "eager":
        config._attn_implementation = "eager"
    trained_dtype = half or dtype
    objective = recipe.training.get("objective")
    if objective == "reward":
        config.num_labels = 1
    model = meta_model(config, section.task, trained_dtype, section.trust_remote_code)
    # For any selection: the exact count of stratified is the expected count of bernoulli
    sparse = recipe.sparse.model_copy(update={"selection": "stratified"})
    whole_modules = find_modules_to_save(model, sparse)
    selections, _ = select_scalars(model, sparse, whole_modules)
    targets = all_targets(model)
    whole = parameter_names(model, whole_modules)
    limit = max_positions(config)
    tokens = recipe.data.max_length or limit
    if objective in GENERATING:
        tokens = min(2 * completion_length(recipe.training), limit or 2**31)
    if tokens is None:
        raise UserError(
            f"data.max_length: set it, because the configuration of {section.source} has no maximum length"
        )
    check_max_length(tokens, limit)
    if section.task == "sequence-classification" and getattr(model.config, "pad_token_id", None) is None:
        # The model needs it to find the last token; a run uses the tokenizer's
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = 0
    training = recipe.training
    checkpointed = bool(training.get("activation_checkpointing") or training.get("gradient_checkpointing"))
    counts = {selection.name: selection.count for selection in selections}
    quantized = quantized_sizes(recipe, config, model, trained_dtype)

    def stored(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[int]:
        """Scalars of the model's dtype that parameters fill."""
        packed = {} if quantized is None else quantized.shapes
        width = trained_dtype.itemsize
        return [-(-quantized.packed(n) // width) if n in packed else p.numel() for n, p in parameters]

    blocks = [(n, m) for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer) and checkpointed]
    sizes = ModelSizes(
        base=tuple(stored(model.named_parameters())),
        selected=tuple(counts.values()),
        whole=tuple(targets[name].shape.numel() for name in whole),
        index_bytes=_index_bytes(selections, recipe),
        scalar_bytes=trained_dtype.itemsize,
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        forward_only=0 if checkpointed else _forward_only(model),
        layers=tuple(sum(stored(module.named_parameters(prefix=name))) for name, module in blocks),
        quantized=tuple(count for name, count in counts.items() if quantized and name in quantized.shapes),
        statistics_bytes=quantized.statistics_bytes if quantized else 0,
        dequantized=quantized.largest if quantized else 0,
    )
    passes = 1
    if recipe.rpn is not None:
        passes = recipe.rpn.clean + (recipe.rpn.passes if recipe.rpn.noise != "none" else 0)
    loss: Loss = "chunked" if training.get("chunked_loss") or training.get("use_liger_kernel") else "logits"
    if objective is not None:
        loss = "tiles"
    sparse_weights = {selection: targets[selection.name] for selection in selections}
    sequences = micro_batch * (2 if objective in PAIRS else 1)
    kept = activations(model, sparse_weights, whole, sequences, tokens, loss)
    generation = None
    if objective in GENERATING:
        generation = describe_generation(model, training, micro_batch, micro_batches, tokens)
    notes = _notes(recipe, deepspeed, model)
    notes += quantized.notes if quantized else []
    if kept.formula == UNKNOWN:
        notes.append(f"activations are {UNKNOWN}")
    return PlannedRun(
        sizes=sizes,
        activations=kept,
        hidden_size=_hidden_size(config),
        zero=deepspeed.get("zero_optimization", {}),
        checkpointed=checkpointed,
        micro_batch=micro_batch,
        tokens=tokens,
        micro_batches=micro_batches,
        backwards=micro_batches * passes,
        parameters=sum(target.shape.numel() for target in targets.values()),
        quantized=quantized,
        load_bytes=sum(sizes.base) * (dtype if quantized is None else trained_dtype).itemsize,
        stored_positions=recipe.sparse.stores_positions,
        transient_bytes=recipe.sparse.transient_mib * 2**20 + WRITING_BYTES * max(counts.values(), default=0),
        notes=tuple(notes),
        generation=generation,
    )


def _index_bytes(selections: list[Selection], recipe: Recipe) -> int:
    """Bytes of the stored positions, and of the drawn columns, which layers of a group share."""
    stores = recipe.sparse.indices == "stored" or recipe.sparse.stores_positions
    strips = [s.strip_count * s.strip_dtype.itemsize for s in selections if stores and not s.fills_columns]
    drawn = {s.columns_key: padded(s, torch.empty(s.columns.count, device="meta")) for s in selections if s.columns}
    return sum(strips) + sum(columns.numel() * torch.int64.itemsize for columns in drawn.values())


def _batch(recipe: Recipe) -> tuple[int, int]:
    """Sequences of a micro-batch, and micro-batches of a step."""
    found = []
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        value = recipe.training.get(key, default_of(key))
        if value < 1:
            raise UserError(f"training.{key}: {value}: must be at least 1")
        found.append(value)
    if recipe.training.get("auto_find_batch_size"):
        raise UserError(
            "training.auto_find_batch_size: a plan needs a fixed batch size; set it to false, and set "
            "training.per_device_train_batch_size"
        )
    return found[0], found[1]


def _deepspeed(recipe: Recipe) -> dict[str, Any]:
    given = recipe.training.get("deepspeed") or {}
    if isinstance(given, str):
        try:
            given = json.loads(Path(given).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"training.deepspeed: {given}: not JSON: {error}") from None
    if not isinstance(given, Mapping):
        raise UserError(f"training.deepspeed: {given!r}: must be the path of a DeepSpeed file, or its content")
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(given.get(key, {}), Mapping):
            raise UserError(f"training.deepspeed: {key}: {given[key]!r}: must be a section with keys")
    stage = given.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"training.deepspeed: zero_optimization.stage: {stage!r}: must be 0, 1, 2 or 3")
    return dict(given)


def _dtypes(recipe: Recipe, deepspeed: Mapping[str, Any]) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The half precision to which DeepSpeed casts the model (None: it does not cast), and the dtype in which the model
    is loaded (None: that of its files).
    """
    is_half = {
        name: deepspeed.get(name, {}).get("enabled") is True or bool(recipe.training.get(name))
        for name in ("bf16", "fp16")
    }
    half = torch.bfloat16 if is_half["bf16"] else torch.float16 if is_half["fp16"] else None
    loaded = recipe.model.dtype or ("bfloat16" if recipe.training.get("bf16") else "float32")
    return half, None if loaded == "auto" else getattr(torch, loaded)


def _hidden_size(config: Any) -> int:
    """The size that transformers uses for "auto" in a DeepSpeed configuration."""
    for section in (config, config.get_text_config()):
        if hasattr(section, "hidden_size"):
            return section.hidden_size
        if hasattr(section, "hidden_sizes"):
            return max(section.hidden_sizes)
    raise UserError(f"model.name: the configuration of {config.name_or_path} has no hidden_size")


def _forward_only(model: PreTrainedModel) -> int:
    """Scalars of an input embedding that is not tied to the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return 0 if tied or embedding is None else embedding.weight.numel()


def _notes(recipe: Recipe, deepspeed: Mapping[str, Any], model: PreTrainedModel) -> list[str]:
    notes = []
    if not deepspeed:
        notes.append(
            "training.deepspeed is not set: the plan assumes the shipped zero2.json or zero3.json; a run would use DDP"
        )
    if recipe.sparse.selection == "bernoulli":
        notes.append(
            "sparse.selection: bernoulli: the plan uses the expected number of scalars; the actual number differs by "
            "about its square root"
        )
    if recipe.sparse.uses_gradients:
        targets = "4 bytes / ranks for each scalar of the targets"
        notes.append(
            f"sparse.selection: {recipe.sparse.selection}: the plan does not consider the pass that selects, before "
            f"the training: the whole base model, {targets}, and the gradient of one parameter on each rank"
        )
    objective = recipe.training.get("objective")
    if objective in GENERATING:
        length = completion_length(recipe.training)
        notes.append(f"{objective}: the plan assumes completions of {length} tokens, and prompts as long")
    if objective in ("dpo", *GENERATING):
        notes.append(
            f"{objective}: the reference is the model itself, without a second copy; the plan does not count what "
            "stage 3 sends for it" + (" and for completions" if objective in GENERATING else "")
        )
    if recipe.model.task == "sequence-classification" and objective is None:
        notes.append(
            f"the plan assumes a head with {model.config.num_labels} labels; a run uses the labels of the data"
        )
    if recipe.model.new_tokens:
        notes.append("model.new_tokens: the plan does not count the rows that they may add to the embeddings")
    if recipe.data.max_length is None and objective not in GENERATING:
        notes.append("data.max_length is not set: the plan assumes sequences of the model's maximum length")
    zero = deepspeed.get("zero_optimization", {})
    known = NEUTRAL | set(ZeroSettings.__dataclass_fields__) | {"reduce_scatter", "allgather_partitions"}
    others = sorted(set(zero) - known) + sorted({"communication_data_type", "data_types"} & set(deepspeed))
    notes += [f"training.deepspeed: the plan does not consider {key}" for key in others]
    return notes
