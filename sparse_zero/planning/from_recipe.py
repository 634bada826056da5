"""From a recipe to what its run will hold and send: the model's shapes, the budget's counts, the batch, the stages."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sparse_zero.data.models import check_max_length, load_config, max_positions, model_without_values
from sparse_zero.errors import UserError
from sparse_zero.planning.activations import UNKNOWN, Activations, activations
from sparse_zero.planning.arithmetic import Holding, Sizes, Zero, is_offloaded, passing, states, traffic
from sparse_zero.recipe.recipe import Recipe
from sparse_zero.recipe.training import check_training, default_of
from sparse_zero.selection.selector import decide
from sparse_zero.selection.targets import all_targets, find_whole, parameters_of

RESERVED = 0.08
"""Of an accelerator's memory, for its context and libraries, NCCL's buffers and fragmentation: an assumption."""

WRITING_BYTES = 16
"""For each selected scalar of the weight that is being written: its position in 8 bytes and in 4, its value in 4. The
operators of sampled_cpu.py take less."""

MOST_RANKS = 2**20

AUTOMATIC = {
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
"""As in configs/, for the stages that the recipe's own DeepSpeed file is not for."""

HARMLESS = {"stage", "allgather_bucket_size", "round_robin_gradients", "stage3_gather_16bit_weights_on_model_save"}
"""Settings that change neither sizes nor traffic here: gathers of stages 1 and 2 end in the model's own memory."""

OFFLOADED = {"device": "cpu"}
STAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "0": (0, {}),
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "2, offload": (2, {"offload_optimizer": OFFLOADED}),
    "3, offload": (3, {"offload_optimizer": OFFLOADED, "offload_param": OFFLOADED}),
}
"""In the order of preference."""


@dataclass(frozen=True)
class Run:
    """What a recipe says of a run, with the model's shapes."""

    sizes: Sizes
    activations: Activations
    hidden_size: int
    zero: Mapping[str, Any]
    """`zero_optimization` of the recipe's DeepSpeed file."""
    checkpointed: bool
    micro_batch: int
    tokens: int
    micro_batches: int
    backwards: int
    load_bytes: int
    """Of the base as from_pretrained makes it."""
    stored_positions: bool
    transient_bytes: int
    """Of a weight's gradient, and of the writing of its delta."""
    notes: tuple[str, ...]

    @property
    def own_stage(self) -> str:
        """That of the recipe, of STAGES."""
        stage = self.zero.get("stage", 0)
        offloads = any(is_offloaded(self.zero, key) for key in ("offload_optimizer", "offload_param"))
        name = f"{stage}, offload"
        return name if offloads and name in STAGES else str(stage)

    def zero_of(self, name: str) -> Zero:
        """The settings of one of STAGES. A stage that the recipe's file is not for gets what configs/ have."""
        stage, more = STAGES[name]
        given = {key: value for key, value in self.zero.items() if not key.startswith("offload_")}
        if name == self.own_stage:
            settings = dict(self.zero)
        else:
            settings = (given if stage == self.zero.get("stage") else AUTOMATIC | given) | more
        return Zero.of(stage, settings, self.hidden_size, sum(self.sizes.trained))


def read(recipe: Recipe) -> Run:
    """Builds the base on the meta device, from its configuration alone.

    Raises UserError: a model, targets, a budget or a batch that cannot be used.
    """
    check_training(recipe.training)
    micro_batch, micro_batches = _batch(recipe)
    deepspeed = _deepspeed(recipe)
    half, dtype = _dtypes(recipe, deepspeed)
    section = recipe.model
    origin = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    config = load_config(section.name, **origin)
    dtype = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    if section.attn_implementation == "eager":
        config._attn_implementation = "eager"
    held = half or dtype
    model = model_without_values(config, section.task, held, section.trust_remote_code)
    # Whatever the selection: a share of the budget is the expected count of bernoulli's
    sparse = recipe.sparse.model_copy(update={"selection": "stratified"})
    whole_modules = find_whole(model, sparse)
    draws, _ = decide(model, sparse, whole_modules)
    targets = all_targets(model)
    whole = parameters_of(model, whole_modules)
    limit = max_positions(config)
    tokens = recipe.data.max_length or limit
    if tokens is None:
        raise UserError(f"data.max_length: the configuration of {section.name} has no limit: give the tokens")
    check_max_length(tokens, limit)
    if section.task == "sequence-classification" and getattr(model.config, "pad_token_id", None) is None:
        # It is asked for to find the last token; a run takes the tokenizer's
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = 0
    training = recipe.training
    checkpointed = bool(training.get("activation_checkpointing") or training.get("gradient_checkpointing"))
    counts = {draw.name: draw.count for draw in draws}
    sizes = Sizes(
        base=tuple(target.shape.numel() for target in targets.values()),
        selected=tuple(counts.values()),
        whole=tuple(targets[name].shape.numel() for name in whole),
        index_bytes=sum(draw.strip_count * draw.strip_dtype.itemsize for draw in draws if _stores_indices(recipe)),
        scalar_bytes=held.itemsize,
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        forward_only=0 if checkpointed else _forward_only(model),
        layers=tuple(_numel(m) for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and checkpointed),
    )
    passes = 1
    if recipe.rpn is not None:
        passes = recipe.rpn.clean + (recipe.rpn.passes if recipe.rpn.noise != "none" else 0)
    kept = activations(model, [targets[name] for name in counts], whole, micro_batch, tokens)
    return Run(
        sizes,
        kept,
        _hidden_size(config),
        deepspeed.get("zero_optimization", {}),
        checkpointed,
        micro_batch,
        tokens,
        micro_batches,
        micro_batches * passes,
        sum(sizes.base) * dtype.itemsize,
        recipe.sparse.selection.startswith("magnitude"),
        recipe.sparse.transient_mib * 2**20 + WRITING_BYTES * max(counts.values(), default=0),
        (*_notes(recipe, deepspeed, model), *([f"activations are {UNKNOWN}"] if kept.formula == UNKNOWN else [])),
    )


def _stores_indices(recipe: Recipe) -> bool:
    return recipe.sparse.indices == "stored" or recipe.sparse.selection.startswith("magnitude")


def _batch(recipe: Recipe) -> tuple[int, int]:
    found = []
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        value = recipe.training.get(key, default_of(key))
        if value < 1:
            raise UserError(f"training.{key}: {value}: must be at least 1")
        found.append(value)
    if recipe.training.get("auto_find_batch_size"):
        raise UserError("training.auto_find_batch_size: a plan needs a size: give per_device_train_batch_size")
    return found[0], found[1]


def _deepspeed(recipe: Recipe) -> dict[str, Any]:
    given = recipe.training.get("deepspeed") or {}
    if isinstance(given, str):
        try:
            given = json.loads(Path(given).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"training.deepspeed: {given}: not JSON: {error}") from None
    if not isinstance(given, Mapping):
        raise UserError(f"training.deepspeed: {given!r}: must be a file, or what is in one")
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(given.get(key, {}), Mapping):
            raise UserError(f"training.deepspeed: {key}: {given[key]!r}: must have keys of its own")
    stage = given.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"training.deepspeed: zero_optimization.stage: {stage!r}: must be 0, 1, 2 or 3")
    return dict(given)


def _dtypes(recipe: Recipe, deepspeed: Mapping[str, Any]) -> tuple[torch.dtype | None, torch.dtype | None]:
    """What DeepSpeed makes of the model, None where it leaves it, and what is loaded, None where its files say it."""
    is_half = {
        name: deepspeed.get(name, {}).get("enabled") is True or bool(recipe.training.get(name))
        for name in ("bf16", "fp16")
    }
    half = torch.bfloat16 if is_half["bf16"] else torch.float16 if is_half["fp16"] else None
    loaded = recipe.model.dtype or ("bfloat16" if recipe.training.get("bf16") else "float32")
    return half, None if loaded == "auto" else getattr(torch, loaded)


def _hidden_size(config: Any) -> int:
    """As transformers' own "auto" has it."""
    for section in (config, config.get_text_config()):
        if hasattr(section, "hidden_size"):
            return section.hidden_size
        if hasattr(section, "hidden_sizes"):
            return max(section.hidden_sizes)
    raise UserError(f"model.name: the configuration of {config.name_or_path} has no hidden_size")


def _forward_only(model: PreTrainedModel) -> int:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return 0 if tied or embedding is None else embedding.weight.numel()


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _notes(recipe: Recipe, deepspeed: Mapping[str, Any], model: PreTrainedModel) -> list[str]:
    notes = []
    if not deepspeed:
        notes.append("training.deepspeed is not set: as with configs/zero2.json or zero3.json; a run would be DDP")
    if recipe.sparse.selection == "bernoulli":
        notes.append("selection: bernoulli: the expected number of scalars; a draw differs by its square root or so")
    if recipe.model.task == "sequence-classification":
        notes.append(f"the head is of {model.config.num_labels} labels; in a run the data decides")
    if recipe.model.new_tokens:
        notes.append("model.new_tokens: the rows that they may add to the embeddings are not counted")
    if recipe.data.max_length is None:
        notes.append("data.max_length is not set: each sequence is taken to be as long as the model allows")
    zero = deepspeed.get("zero_optimization", {})
    known = HARMLESS | set(Zero.__dataclass_fields__) | {"reduce_scatter", "allgather_partitions"}
    others = sorted(set(zero) - known) + sorted({"communication_data_type", "data_types"} & set(deepspeed))
    notes += [f"training.deepspeed: {key} is not in the plan" for key in others]
    return notes


def holdings(run: Run, zero: Zero, ranks: int) -> list[Holding]:
    """All that a rank holds, at whatever time."""
    kept = run.activations.peak(run.checkpointed)
    formula = run.activations.formula + ("; with gradient checkpointing" if run.checkpointed else "")
    return [
        *states(zero, ranks, run.sizes),
        *passing(zero, ranks, run.sizes),
        Holding("activations", kept - _loss(run), formula, when="backward", exact=False),
        Holding("logits", _loss(run), "12 * b * s * vocabulary, float32", when="backward", exact=False),
        Holding(
            "sampled gradient", run.transient_bytes, "transient_mib + 16 * largest delta", when="backward", exact=False
        ),
    ]


def _loss(run: Run) -> int:
    """The part of the loss in the peak: with checkpointing it is there before a block is recomputed, or it is less."""
    found = run.activations
    return 0 if run.checkpointed and found.loss < max(found.layers, default=0) else found.loss


def device_bytes(run: Run, zero: Zero, ranks: int) -> int:
    """The most that a rank holds at once on its accelerator: in backward, or in the optimizer's step."""
    held = dict.fromkeys(("always", "backward", "step"), 0)
    for each in holdings(run, zero, ranks):
        if each.where == "device":
            held[each.when] += each.bytes
    return held["always"] + max(held["backward"], held["step"])


def host_bytes(run: Run, zero: Zero, ranks: int, ranks_per_node: int) -> int:
    """The most that a node holds in its own memory, but for Python's processes: while the base is loaded, or after.

    At stages 0 to 2 every rank loads the whole base before it goes to the accelerator; at stage 3 the first rank alone
    reads the files.
    """
    loading = run.load_bytes * (1 if zero.stage == 3 else ranks_per_node)
    after = sum(each.bytes for each in states(zero, ranks, run.sizes) if each.where == "host") * ranks_per_node
    return max(loading, after) if zero.stage < 3 else loading + after


def least_ranks(run: Run, zero: Zero, room: float) -> int | None:
    """The smallest number of ranks with which a rank holds at most `room` bytes; None where none is enough."""
    high = 1
    while device_bytes(run, zero, high) > room:
        high *= 2
        if high > MOST_RANKS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if device_bytes(run, zero, middle) <= room else (middle, high)
    return high


def check_ranks(ranks: int, nodes: int, bandwidth: float | None) -> None:
    """Raises UserError: numbers that no run can have."""
    if ranks < 1 or nodes < 1:
        raise UserError(f"--ranks {ranks} --nodes {nodes}: a run has at least 1 rank on 1 node")
    if ranks % nodes:
        raise UserError(f"--ranks {ranks}: cannot be divided evenly among {nodes} nodes: change --ranks or --nodes")
    if bandwidth is not None and not bandwidth > 0:
        raise UserError(f"--bandwidth {bandwidth / 1e9:g}: must be above 0 GB/s")


def plan(run: Run, ranks: int, nodes: int = 1, gpu_bytes: int | None = None, bandwidth: float | None = None) -> dict:
    """Args: bandwidth: bytes a second that a rank sends. Returns: what `sparse-zero plan --json` prints."""
    room = None if gpu_bytes is None else gpu_bytes * (1 - RESERVED)
    stages = [_stage(name, run, ranks, nodes, room, bandwidth) for name in STAGES]
    sizes = run.sizes
    n, total = sum(sizes.trained), sum(sizes.base)
    positions = 4 * sum(sizes.selected) if run.stored_positions else 0
    fitting = [stage["stage"] for stage in stages if stage["fits"]]
    return {
        "parameters": total,
        "trained": n,
        "selected": sum(sizes.selected),
        "trained_whole": sum(sizes.whole),
        "density": n / total,
        "targets": len(sizes.selected),
        "bytes_per_scalar": sizes.scalar_bytes,
        "ranks": ranks,
        "nodes": nodes,
        "micro_batch": run.micro_batch,
        "micro_batches": run.micro_batches,
        "backwards": run.backwards,
        "tokens": run.tokens,
        "gradient_checkpointing": run.checkpointed,
        "activation_bytes": {
            "without_checkpointing": run.activations.peak(False),
            "with_checkpointing": run.activations.peak(True),
            "of_which_logits": run.activations.loss,
        },
        "checkpoint_bytes": 12 * n,
        "adapter_bytes": sizes.scalar_bytes * n + positions,
        "gpu_bytes": gpu_bytes,
        "room_bytes": None if room is None else int(room),
        "recipe_stage": run.own_stage,
        "stage": fitting[0] if fitting else None,
        "stages": stages,
        "notes": list(run.notes),
    }


def _stage(name: str, run: Run, ranks: int, nodes: int, room: float | None, bandwidth: float | None) -> dict:
    zero = run.zero_of(name)
    device = device_bytes(run, zero, ranks)
    transfers = traffic(zero, ranks, run.sizes, run.backwards)
    sent = sum(each.sent_bytes(ranks) for each in transfers)
    return {
        "stage": name,
        "device_bytes": device,
        "host_bytes_per_node": host_bytes(run, zero, ranks, ranks // nodes),
        "sent_bytes_per_step": sent,
        "seconds_per_step": None if bandwidth is None else sent / bandwidth,
        "fits": None if room is None else device <= room,
        "least_ranks": None if room is None else least_ranks(run, zero, room),
        "holds": [asdict(each) for each in holdings(run, zero, ranks) if each.bytes],
        "sends": [
            {
                "operation": each.operation,
                "of": each.of,
                "times": each.times,
                "payload_bytes": each.payload_bytes,
                "sent_bytes": each.sent_bytes(ranks),
                "formula": each.formula,
            }
            for each in transfers
        ],
    }
