"""Loss of SmolLM2-135M-Instruct on held-out answers of GSM8K after one epoch: ours, LoRA and full fine-tuning.

    python benchmarks/gsm8k.py --model DIR --gsm8k DIR --method sparse --rate 0.01 --seed 0 --json run.json

--model is a directory or a GGUF file, --gsm8k a directory with train.jsonl and test.jsonl (question, answer). All
methods but `full` train as many scalars: those of a LoRA of rank 4 on all linear layers. AdamW without weight decay,
batches of 32, bfloat16 autocast on float32 weights, warm-up over 1/30 of the steps and then a linear decay, gradients
clipped to 1. The loss is the mean over the tokens of the answers. One run a call: gpu.py knows the grid.
--answers N also answers the first N problems of test.jsonl, greedily and with at most 256 tokens: `exact` is the share
whose number after "####" is the reference's.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

RANK, LENGTH = 4, 320
SEEDS = (0, 1, 2)
METHODS = ("columns", "whole", "sparse", "lora", "full")
_SPARSE_RATES = (1e-2, 3e-2, 1e-1)
RATES = {
    **dict.fromkeys(("columns", "whole", "sparse"), _SPARSE_RATES),
    "lora": (3e-3, 1e-2, 3e-2),
    "full": (1e-4, 3e-4, 1e-3),
}
SETTINGS = {"sparse": {}, "columns": {"columns": 0.1}, "whole": {"columns": "whole"}}
"""Settings of SparseConfig by method."""


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def read_examples(path: Path, tokenizer, limit: int | None) -> list[Example]:
    """The examples of a file that are not longer than LENGTH tokens."""
    found = []
    for line in path.read_text().splitlines()[:limit]:
        row = json.loads(line)
        asked = [{"role": "user", "content": row["question"]}]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(prompt) + len(answer) <= LENGTH:
            found.append(Example(prompt, answer))
    return found


def batched(examples: list[Example], size: int, seed: int | None = None) -> list[list[Example]]:
    """Batches of examples of similar lengths, in an order that the seed gives; None for the given order."""
    order = list(examples)
    if seed is not None:
        random.Random(seed).shuffle(order)
        blocks = [order[start : start + 8 * size] for start in range(0, len(order), 8 * size)]
        order = [example for block in blocks for example in sorted(block, key=len)]
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if seed is not None:
        random.Random(seed + 1).shuffle(batches)
    return batches


def tensors(batch: list[Example], padding: int, device: str) -> dict:
    """input_ids, attention_mask and labels of a batch, (batch, length): only answers have labels."""
    import torch

    size = len(batch), -(-max(map(len, batch)) // 32) * 32
    ids, labels = torch.full(size, padding), torch.full(size, -100)
    mask = torch.zeros(size, dtype=torch.int64)
    for row, example in enumerate(batch):
        ids[row, : len(example)] = torch.tensor(example.prompt + example.answer)
        labels[row, len(example.prompt) : len(example)] = torch.tensor(example.answer)
        mask[row, : len(example)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def mean_loss(model, batches: Iterator[dict], device: str) -> float:
    """The mean loss over all tokens of answers."""
    import torch
    import torch.nn.functional as F

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        for batch in batches:
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch).logits[:, :-1].flatten(0, 1).float()
            total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            count += (labels != -100).sum().item()
    return total / count


def exact_answers(model, tokenizer, path: Path, count: int, device: str) -> float:
    """The share of the first problems that are answered with the reference's number."""
    import torch

    rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    asked = [[{"role": "user", "content": row["question"]}] for row in rows]
    texts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
    model.eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        ids = model.generate(
            **inputs, max_new_tokens=256, do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    pairs = zip(answers, rows, strict=True)
    return sum(final_number(answer) == final_number(row["answer"]) for answer, row in pairs) / len(rows)


def final_number(answer: str) -> str | None:
    """The number after "####", without thousands separators; None if there is none."""
    words = answer.partition("####")[2].split()
    return words[0].replace(",", "").rstrip(".") if words else None


def adapted(model, method: str, seed: int):
    """The model with RANK x (rows + columns) trained scalars for each linear layer; `full`: all scalars."""
    if method == "full":
        return model
    if method == "lora":
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        return peft.get_peft_model(model, config)
    from sparse_zero import SparseConfig, sparsify

    config = SparseConfig(targets="all-linear", rank_equivalent=RANK, seed=seed, **SETTINGS[method])
    return sparsify(model, config)


def train(model, batches: list[dict], rate: float, device: str) -> int:
    """Train for one epoch. Returns: the number of trained scalars."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = device != "cpu" or None
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay(len(batches)))
    model.train()
    for batch in batches:
        with torch.autocast(device, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return sum(parameter.numel() for parameter in parameters)


def decay(steps: int) -> Callable[[int], float]:
    """The factor of the learning rate in each step."""
    warm_up = max(1, steps // 30)
    return lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def load(source: Path):
    """Args: source: a directory, or a GGUF file. Returns: model in float32, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparse_zero.data.gguf import model_path

    directory = model_path(str(source))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.config.use_cache = False
    return model, AutoTokenizer.from_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct: a directory or a GGUF file")
    parser.add_argument("--gsm8k", type=Path, required=True, help="a directory with train.jsonl and test.jsonl")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit", type=int, help="number of examples of each file")
    parser.add_argument("--answers", type=int, default=0, help="problems to answer after training")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--json", type=Path, help="also write the row here")
    arguments = parser.parse_args()
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(arguments.model)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    examples = {part: read_examples(arguments.gsm8k / f"{part}.jsonl", tokenizer, arguments.limit)
                for part in ("train", "test")}  # fmt: skip

    def measured() -> float:
        held_out = (tensors(batch, padding, device) for batch in batched(examples["test"], 64))
        return mean_loss(model, held_out, device)

    model.to(device)
    before = measured()
    torch.manual_seed(arguments.seed)
    model = adapted(model, arguments.method, arguments.seed)
    batches = [
        tensors(batch, padding, device) for batch in batched(examples["train"], arguments.batch, arguments.seed)
    ]
    trained = train(model, batches, arguments.rate, device)
    row = {"method": arguments.method, "rate": arguments.rate, "seed": arguments.seed, "trained": trained}
    row |= {"before": before, "loss": measured()}
    if arguments.answers:
        test = arguments.gsm8k / "test.jsonl"
        row["exact"] = exact_answers(model, tokenizer, test, arguments.answers, device)
    print(json.dumps(row))
    if arguments.json:
        arguments.json.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
