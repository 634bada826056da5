"""The arguments of the subcommands of `adapter_commands`. Imports no torch."""

import argparse

from launcher.parser import add_recipe, share
from sparse_zero.quantized.names import KINDS

_ADAPTER = "the adapter's directory or hub id"
_IN = "the directory or hub id of an adapter or of a fine-tuned model"
_NEW_DIRECTORY = "the directory to write; must be empty or not exist"


def add_evaluate(commands) -> argparse.ArgumentParser:
    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate an adapter on a recipe's evaluation examples",
        description="Evaluate an adapter on the evaluation examples of a recipe, in this process.",
        epilog="example:\n  sparse-zero evaluate demo.yaml --adapter runs/demo/adapter data.eval_size=500",
    )
    add_recipe(evaluate)
    evaluate.add_argument("--adapter", required=True, metavar="DIR", help=_ADAPTER)
    _add_revision(evaluate)
    return evaluate


def add_merge(commands) -> argparse.ArgumentParser:
    merge = commands.add_parser(
        "merge",
        help="write base model + adapter as a plain model directory",
        description="Write the base model with the adapter merged into its weights, as a directory that transformers\n"
        "loads without this package. A base model that was quantised in training is dequantised to bfloat16, or\n"
        "quantised again with --quantize; the difference to the adapted model is printed.",
        epilog="examples:\n"
        "  sparse-zero merge runs/demo/adapter merged-model\n"
        "  sparse-zero merge runs/smollm2-nf4/adapter merged-nf4 --quantize nf4",
    )
    merge.add_argument("adapter", metavar="ADAPTER", help=_ADAPTER)
    merge.add_argument("out", metavar="OUT", help=_NEW_DIRECTORY)
    _add_revision(merge)
    merge.add_argument("--scale", type=float, default=1.0, help="factor of the adapter's deltas (default: 1)")
    merge.add_argument("--quantize", choices=KINDS, help="write a model that is quantised")
    merge.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="of a quantised model: compare the logits on this text; repeat it for more (default: built-in texts)",
    )
    merge.add_argument("--force", action="store_true", help="merge values that are NaN or infinite, too")
    merge.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that the base model's repository contains (default: refuse such a model)",
    )
    return merge


def add_combine(commands) -> argparse.ArgumentParser:
    combine = commands.add_parser(
        "combine",
        help="combine several adapters into one",
        description="Write a weighted combination of adapters of one base model as a new adapter.",
        epilog="example:\n  sparse-zero combine runs/a/adapter runs/b/adapter --out both --weights 0.7 0.3",
    )
    combine.add_argument("adapters", metavar="ADAPTER", nargs="+", help="the adapters' directories")
    combine.add_argument("--out", required=True, metavar="DIR", help=_NEW_DIRECTORY)
    combine.add_argument("--weights", nargs="+", type=float, metavar="W", help="one weight for each adapter")
    combine.add_argument(
        "--type",
        dest="combination_type",
        choices=("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"),
        default="linear",
        help="how to resolve conflicts (default: linear, the weighted sum)",
    )
    combine.add_argument(
        "--density", type=float, default=1.0, help="fraction of each adapter's deltas to keep; not with linear"
    )
    combine.add_argument("--seed", type=int, default=0, help="seed of dare's random selection (default: 0)")
    return combine


def add_convert(commands) -> argparse.ArgumentParser:
    convert = commands.add_parser(
        "convert",
        help="convert adapters from and to the formats of other programs",
        description="Read an adapter in one of these formats, or the difference between a fine-tuned model and its\n"
        "original, and write it in another. The format of IN is recognised by its files.\n\n"
        "  sparse-zero   this package's format\n"
        "  sparta        the reference implementation (peft-sparta)\n"
        "  shira         PEFT's SHiRA\n"
        "  supertuning   PEFT's Super-Tuning\n"
        "  lora          PEFT's LoRA, exactly; only written, for adapters in few columns\n"
        "  paca          PEFT's PaCA; only read",
        epilog="examples:\n"
        "  sparse-zero convert runs/demo/adapter for-peft --to shira\n"
        "  sparse-zero convert runs/columns/adapter for-vllm --to lora\n"
        "  sparse-zero convert fine-tuned-model adapter --base original-model",
    )
    convert.add_argument("adapter", metavar="IN", help=_IN)
    convert.add_argument("out", metavar="OUT", help=_NEW_DIRECTORY)
    convert.add_argument(
        "--to", choices=["sparse-zero", "sparta", "shira", "supertuning", "lora"], default="sparse-zero"
    )
    _add_base(convert)
    _add_revision(convert)
    convert.add_argument(
        "--max-density",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="fail if a larger share of a fine-tuned model's scalars was changed (default: %(default)s)",
    )
    return convert


def add_inspect(commands) -> argparse.ArgumentParser:
    inspect = commands.add_parser(
        "inspect",
        help="describe an adapter",
        description="Describe an adapter: its base model, its size, which weights it changes and by how much. Reads\n"
        "the formats that `sparse-zero convert` reads.",
        epilog="examples:\n"
        "  sparse-zero inspect runs/demo/adapter --json\n"
        "  sparse-zero inspect fine-tuned-model --base original-model",
    )
    inspect.add_argument("adapter", metavar="IN", help=_IN)
    _add_base(inspect)
    _add_revision(inspect)
    return inspect


def add_export(commands) -> argparse.ArgumentParser:
    export = commands.add_parser(
        "export",
        help="turn a checkpoint into an adapter",
        description="Assemble an adapter from the shards of a checkpoint, without a GPU and without the base model.",
        epilog="example:\n  sparse-zero export runs/demo/checkpoint-100 adapter",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run, for its newest checkpoint")
    export.add_argument("out", metavar="ADAPTER", help=_NEW_DIRECTORY)
    return export


def _add_revision(command: argparse.ArgumentParser) -> None:
    command.add_argument("--revision", metavar="REV", help="a branch, tag or commit of an adapter on the hub")


def _add_base(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base",
        metavar="DIR_OR_ID",
        help="the base model, if IN does not name it or it has moved; the original of a fine-tuned model",
    )
