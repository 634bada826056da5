"""Saved base models, and adapters trained on them with PEFT and peft-sparta."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import torch
from families import TASKS, VOCABULARY, tiny
from peft import ShiraConfig, SupertuningConfig, get_peft_model
from peft_sparta import SpaRTA
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

CAUSAL, CLASSIFIER = "causal-lm", "sequence-classification"
SPARTA_FROZEN = ["embed_tokens", "q_proj", "k_proj", "mlp", "norm", "lm_head"]


def save_base(directory: Path, family: str, task: str, **settings: object) -> Path:
    """Save a random model and a tokenizer with the same vocabulary size."""
    tiny(family, task, **settings).save_pretrained(directory)
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), pad_token="w0", eos_token="w2"
    )
    tokenizer.save_pretrained(directory)
    return directory


def open_base(directory: Path, task: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return TASKS[task].from_pretrained(directory, dtype=dtype).eval()


def tokens(count: int = 4, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(3, vocabulary, (count, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    return model(input_ids=tokens()).logits


def train(model: nn.Module, task: str, steps: int = 3) -> None:
    """Train a few steps with a learning rate that changes all trainable scalars."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    batch = tokens()
    labels = batch[:, 0] % 2 if task == CLASSIFIER else batch
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()


def peft_adapter(base: Path, out: Path, task: str, method: str, **settings: object) -> nn.Module:
    """Train with PEFT and save to `out`. Returns: the PEFT model."""
    bert = task == CLASSIFIER
    config = {"shira": ShiraConfig, "supertuning": SupertuningConfig}[method](
        target_modules=["value", "attention.output.dense"] if bert else ["v_proj", "o_proj", "down_proj"],
        modules_to_save=["classifier"] if bert else None,
        task_type="SEQ_CLS" if bert else "CAUSAL_LM",
        **({"r": 2, "random_seed": 3} if method == "shira" else {"sparsity": 0.9}) | settings,
    )
    model = get_peft_model(open_base(base, task), config)
    train(model, task)
    model.save_pretrained(out)
    return model


def sparta_adapter(
    base: Path, out: Path, task: str, dtype: torch.dtype = torch.float32, sparsity: float = 0.9, **settings: object
) -> SpaRTA:
    """Train with the reference and save to `out` as its trainer does. Returns: the reference's model."""
    inner = open_base(base, task)
    if task == CLASSIFIER:
        inner.config.problem_type = "single_label_classification"
    torch.manual_seed(5)
    model = SpaRTA(inner, sparsity, **{"frozen_modules": SPARTA_FROZEN} | settings)
    train(model, task)
    save_sparta(model, out, dtype)
    return model


def save_sparta(model: SpaRTA, out: Path, dtype: torch.dtype = torch.float32) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for delta in model.deltas.values():
        delta.data = delta.data.to(dtype)
    with contextlib.redirect_stdout(io.StringIO()):
        model.save(out, merged=False)
    if hasattr(model.model, "score"):
        save_file({"head": model.get_init_param(model.model.score.weight)}, out / "head_init.safetensors")
    model.eval()


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])
