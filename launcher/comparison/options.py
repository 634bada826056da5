"""The arguments of `sparse-zero compare`. Imports no torch."""

import argparse

from sparse_zero.recipe.method import BUDGETS


def add_compare(commands) -> argparse.ArgumentParser:
    compare = commands.add_parser(
        "compare",
        help="train a recipe with several methods, and compare them",
        description="Train a recipe with several methods, learning rates and seeds, one run after another, and write\n"
        "compare.json, compare.md and compare.png. The rate of each method is chosen on the evaluation examples; the\n"
        "figures are of test examples: data.test_split or data.test_size, else half of the evaluation examples.\n\n"
        "METHOD is one of\n"
        "  sparse   the recipe as it is\n"
        "  columns  sparse, with whole random columns\n"
        "  lora     PEFT's LoRA on the same layers\n"
        "  dora     PEFT's DoRA on the same layers\n"
        "  full     every weight\n"
        "  head     the head only\n"
        "or a variant of your own: NAME='key=value key=value ...', overrides of the recipe.",
        epilog="examples:\n"
        "  sparse-zero compare demo.yaml --methods sparse lora full --seeds 3\n"
        "  sparse-zero compare demo.yaml --rates 1e-3,3e-3,1e-2 full=3e-5,1e-4,3e-4\n"
        "  sparse-zero compare demo.yaml --methods sparse wide='sparse.density=0.1' --out runs/densities",
    )
    compare.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a shipped recipe (`sparse-zero recipes`)")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe in every run")
    compare.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="what to compare (default: sparse lora full)",
    )
    compare.add_argument("--seeds", type=int, metavar="N", help="runs at the chosen rate (default: 3)")
    compare.add_argument(
        "--rates",
        nargs="+",
        metavar="RATES",
        default=[],
        help="learning rates to choose from, as 1e-3,3e-3 for all methods or NAME=1e-5,1e-4 for one (default: the "
        "recipe's for sparse runs, and the default of each other method)",
    )
    compare.add_argument(
        "--budget",
        choices=BUDGETS,
        help="the rank of LoRA and DoRA. same (default): as many trained scalars as the sparse run; equal-rank: the "
        "number of drawn columns, else the recipe's training.lora.r",
    )
    compare.add_argument(
        "--text",
        metavar="FILE",
        help="a text on which to measure what a language model has forgotten (default: a shipped one)",
    )
    compare.add_argument("--out", metavar="DIR", help="the directory to write (default: runs/RECIPE-compare)")
    compare.add_argument(
        "--resume",
        action="store_true",
        help="go on: runs that are done stay, others resume from their checkpoints; methods, rates and seeds that are "
        "given are added to those of before",
    )
    return compare
