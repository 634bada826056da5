"""The Trainer of the methods that train parameters of a plain model: LoRA, DoRA, full fine-tuning, the head only.

It is SparseTrainer for another kind of model: the same loop, losses, stop requests, progress, and sharded checkpoints
from which a run resumes exactly on any number of ranks.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_zero.checkpoint.directory import Checkpoint
from sparse_zero.checkpoint.export import buffer_entries, read_buffers
from sparse_zero.checkpoint.listing import MANIFEST_NAME
from sparse_zero.checkpoint.shards import Entry
from sparse_zero.errors import UserError
from sparse_zero.model.fingerprint import differing_parameters
from sparse_zero.model.sparsity import set_values
from sparse_zero.model.wrappers import unwrap
from sparse_zero.recipe.method import LOW_RANK
from sparse_zero.training.low_rank import save_low_rank, trained_names
from sparse_zero.training.plain_methods import Trained
from sparse_zero.training.trainer import SparseTrainer
from sparse_zero.zero.parameters import full_numel, gathered, is_partitioned, wait_for_prefetch


class PlainTrainer(SparseTrainer):
    """Trains what `apply_method` made trainable. It saves an adapter of PEFT, or a model directory."""

    def __init__(self, trained: Trained, *args: Any, **kwargs: Any) -> None:
        """Args: trained: the model; *args, **kwargs: as in SparseTrainer, after the model."""
        self.trained = trained
        super().__init__(trained.model, *args, **kwargs)

    def _check_model(self, model: nn.Module) -> None:
        """Any model will do."""

    # What a checkpoint contains

    def _trained_parameters(self) -> dict[str, nn.Parameter]:
        parameters = dict(unwrap(self.model).named_parameters())
        return {name: parameters[name] for name in trained_names(self.model)}

    def _buffer_names(self) -> list[str]:
        """The buffers that training changes: all that a state dict contains, if the whole model trains."""
        inner = unwrap(self.model)
        return sorted({*dict(inner.named_buffers())} & {*inner.state_dict()}) if self.trained.method == "full" else []

    def _fixed_entries(self) -> list[Entry]:
        return buffer_entries(self.model, self._buffer_names())

    def _read_buffers(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        return read_buffers(checkpoint, self.model, self._buffer_names())

    def _put_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        set_values(unwrap(self.model), buffers)

    def _write_deltas(self) -> None:
        """There are none."""

    def _forwards(self) -> int:
        return 0

    def _set_forwards(self, count: int) -> None:
        """Nothing is random in a forward of its own."""

    def _adapter_description(self) -> dict[str, Any]:
        settings = json.loads(json.dumps(self.trained.settings, default=str))
        return {"method": self.trained.method, "settings": settings, "base_fingerprint": self.trained.fingerprint}

    def _check_selection(self, checkpoint: Checkpoint) -> None:
        if not self.is_world_process_zero():
            return
        saved, here, place = checkpoint.manifest.adapter, self._adapter_description(), checkpoint.directory
        if saved.get("method") != here["method"]:
            raise UserError(
                f"{place}: is of training.method: {saved.get('method', 'sparse')}, not {here['method']}: resume with "
                "the method with which the run was started"
            )
        if saved.get("settings") != here["settings"]:
            raise UserError(
                f"{place}: was saved with other settings of training.method: {here['method']}: resume with the "
                "section `training.lora` and the targets with which the run was started"
            )
        prints = saved.get("base_fingerprint")
        if not isinstance(prints, dict):
            raise UserError(f"{place / MANIFEST_NAME}: damaged: adapter has no base_fingerprint")
        if different := differing_parameters(prints, here["base_fingerprint"]):
            raise UserError(
                f"{place}: was saved with a base model whose weights differ in '{different[0]}': resume with the base "
                "model with which the run was started"
            )

    # Results

    def count_parameters(self) -> tuple[int, int]:
        return sum(full_numel(p) for p in self._trained_parameters().values()), self.trained.total_parameters

    def method_facts(self) -> dict[str, Any]:
        return {"method": self.trained.method, **self.trained.facts}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write PEFT's adapter, or the model. A collective call.

        Args: output_dir: the directory; None: the Trainer's output directory.
        """
        output_dir = output_dir or self.args.output_dir
        if self.trained.method in LOW_RANK:
            names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            names += [name for name, _ in self.model.named_buffers() if ".modules_to_save." in name]
            state = self._state(names) if self._is_partitioned else None
            if self.args.should_save:
                save_low_rank(self.model, output_dir, state)
        else:
            self._save_whole(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_whole(self, output_dir: str) -> None:
        model = unwrap(self.model)
        # Tied parameters stand in a state dict under each of their names
        state = self._state([*model.state_dict()]) if self._is_partitioned else None
        if self.args.should_save:
            model.save_pretrained(output_dir, state_dict=state)
            self.processing_class.save_pretrained(output_dir)

    @property
    def _is_partitioned(self) -> bool:
        return any(is_partitioned(parameter) for parameter in self.model.parameters())

    def _state(self, names: list[str]) -> dict[str, torch.Tensor]:
        """The complete values by name, on the CPU; empty on ranks that do not save."""
        wait_for_prefetch(self.model)
        model = self.model if self.trained.method in LOW_RANK else unwrap(self.model)
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        known: dict[int, torch.Tensor] = {}
        state = {}
        for name in names:
            tensor = tensors[name]
            if id(tensor) not in known:
                with gathered([tensor]):
                    known[id(tensor)] = tensor.detach().to("cpu", copy=True) if self.args.should_save else tensor
            state[name] = known[id(tensor)]
        return state if self.args.should_save else {}

    def save_result(self, output: Path, facts: dict[str, Any]) -> dict[str, str]:
        key = "adapter" if self.trained.method in LOW_RANK else "model"
        self.save_model(str(output / key))
        return {key: str(output / key)}
