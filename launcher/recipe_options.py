"""The arguments of the subcommands of `recipe_commands`. Imports no torch."""

import argparse

from launcher.parser import JSON, Parser, add_recipe
from sparse_zero.quantized.names import KINDS


def add_init(commands) -> argparse.ArgumentParser:
    init = commands.add_parser(
        "init",
        help="write a recipe for a data set",
        description="Look at a data set, recognise its form (conversations, prompts, instructions, texts with\n"
        "labels, pairs, preferences, plain text), and write a commented recipe: model, task, columns, lengths,\n"
        "learning rate and the batch for this machine.",
        epilog="examples:\n  sparse-zero init reviews.csv\n  sparse-zero init chats.jsonl --model Qwen/Qwen3-0.6B",
    )
    init.add_argument("data", metavar="DATA", help="a file, a directory or a hub id, as in a recipe's data.path")
    init.add_argument("--model", metavar="MODEL", help="the base model (default: a small one for the task)")
    init.add_argument("--objective", choices=["dpo", "reward"], help="what to train with preferences (default: dpo)")
    init.add_argument("--quantize", choices=KINDS, help="quantise the base model: model.quantization of the recipe")
    init.add_argument("--out", metavar="FILE", help="the recipe to write (default: DATA's name, .yaml)")
    return init


def add_data(commands) -> argparse.ArgumentParser:
    data = commands.add_parser(
        "data",
        help="show what the model will see of a recipe's data",
        description="Print examples as the model gets them, with the tokens that the loss counts in colour, a\n"
        "histogram of lengths, and how many examples are cut, packed and dropped, and why. Loads no weights.",
        epilog="example:\n  sparse-zero data demo.yaml --examples 5",
    )
    add_recipe(data)
    data.add_argument("--examples", type=int, default=2, metavar="N", help="examples to print (default: 2)")
    return data


def add_recipes(commands) -> argparse.ArgumentParser:
    recipes = commands.add_parser(
        "recipes",
        help="list the shipped recipes, or copy one",
        usage="sparse-zero recipes [copy NAME [TO]] [--json]",
        description="List the recipes, DeepSpeed files and batch scripts that are installed with sparse-zero. Every\n"
        "command that needs a recipe finds them by name if the working directory has no such file.",
        epilog="examples:\n  sparse-zero recipes\n  sparse-zero recipes copy demo.yaml my-run.yaml",
    )
    recipes.set_defaults(action="list")
    actions = recipes.add_subparsers(title="subcommand", metavar="copy NAME [TO]", parser_class=Parser)
    copy = actions.add_parser("copy", help="copy a file", description="Copy a shipped file, to change it.")
    copy.set_defaults(action="copy")
    copy.add_argument("name", metavar="NAME", help="a name that `sparse-zero recipes` lists")
    copy.add_argument("to", metavar="TO", nargs="?", help="a new file, or a directory (default: here)")
    copy.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=JSON)
    return recipes


def add_keys(commands) -> argparse.ArgumentParser:
    keys = commands.add_parser(
        "keys",
        help="describe the keys of a recipe",
        description="Print the keys of a recipe with their types, defaults and meanings; with --json, the JSON\n"
        "Schema with which an editor completes and checks recipes.",
        epilog="examples:\n  sparse-zero keys sparse\n  sparse-zero keys launch.master_port",
    )
    keys.add_argument("key", metavar="KEY", nargs="?", help="a section or a key; default: all")
    return keys
