"""The arguments of `sparse-zero merge`. Imports no torch."""

import argparse

from sparse_zero.quantized.names import KINDS


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
    merge.add_argument("adapter", metavar="ADAPTER", help="the adapter's directory or hub id")
    merge.add_argument("out", metavar="OUT", help="the directory to write; must be empty or not exist")
    merge.add_argument("--revision", metavar="REVISION", help="a branch, tag or commit of the adapter on the hub")
    merge.add_argument("--scale", type=float, default=1.0, help="factor of the adapter's deltas (default: 1)")
    merge.add_argument("--quantize", choices=KINDS, help="write a model that is quantised by bitsandbytes")
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
