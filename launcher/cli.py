"""The arguments and exit statuses of `sparse-zero`.

Exit statuses: 0; 2, with one line, for an error of the user; 75 if a run was stopped and can be resumed; 128 + n for
signal n. Libraries that only some subcommands need are not imported here: `--help` must answer at once.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from launcher import report
from launcher.answering_options import add_chat, add_generate
from launcher.comparison.options import add_compare
from launcher.jobs.sbatch_options import split_words
from launcher.parser import Parser, Version, share
from sparse_zero.checkpoint.resume import RESETS, complete_resume_option, split_resets
from sparse_zero.errors import UserError

_HOMES = {
    **dict.fromkeys(("chat", "generate"), "launcher.answering"),
    "compare": "launcher.comparison.command",
}
"""The modules of the subcommands that are not in `commands`."""

_JSON = "print one JSON value on stdout, and nothing else"
_ADAPTER = "the adapter's directory or hub id"
_IN = "the directory or hub id of an adapter or of a fine-tuned model"
_NEW_DIRECTORY = "the directory to write; must be empty or not exist"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `sparse-zero` command line and return its exit status."""
    try:
        arguments = _parse(argv)
        # After the parsing: a wrong argument must not wait for these imports.
        home = importlib.import_module(_HOMES.get(arguments.command, "launcher.commands"))
        status = getattr(home, arguments.command)(arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        report.say_error(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has exited; without this, Python's last flush of stdout prints an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    words = complete_resume_option(words) if words[:1] == ["train"] else words
    options, words = split_words(words) if words[:1] == ["submit"] else ({}, words)
    arguments, rest = build_parser().parse_known_args(words)
    arguments.sbatch_options = options
    # argparse does not parse positional arguments after an option (`train RECIPE --merge key=value`).
    if hasattr(arguments, "overrides"):
        arguments.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        dotted = [word.lstrip("-") for word in rest if "=" in word and "." in word.partition("=")[0]]
        hint = f" (write an override without dashes: {dotted[0]})" if dotted else ""
        arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands. A parsed namespace has `command` and `parser`, the subcommand's own parser."""
    parser = Parser(
        prog=report.PROGRAM,
        description="Fine-tune a large model by training a small random subset of its weights, "
        "partitioned over the ranks by DeepSpeed ZeRO.",
        epilog="example:\n  sparse-zero train demo.yaml launch.processes_per_node=2",
    )
    parser.add_argument("--version", action=Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for add in (
        _add_train,
        _add_submit,
        _add_init,
        _add_data,
        _add_check,
        _add_evaluate,
        add_compare,
        add_chat,
        add_generate,
        _add_merge,
        _add_combine,
        _add_convert,
        _add_inspect,
        _add_export,
        _add_doctor,
        _add_plan,
        _add_recipes,
        _add_keys,
    ):
        command = add(commands)
        command.add_argument("--json", action="store_true", help=_JSON)
        command.set_defaults(parser=command)
    return parser


def _add_train(commands) -> argparse.ArgumentParser:
    train = commands.add_parser(
        "train",
        help="start the ranks of a run",
        description="Start the ranks that the recipe's `launch` section describes, and wait for them.\n"
        "SIGINT, SIGTERM and SIGUSR1 make the ranks save a checkpoint and exit with status 75; a second\n"
        "signal kills them. Otherwise the exit status is that of the ranks.",
        epilog="examples:\n"
        "  sparse-zero train demo.yaml training.learning_rate=1e-3 sparse.density=0.01\n"
        "  sparse-zero train demo.yaml --resume\n"
        "  sparse-zero train demo.yaml training.learning_rate=1e-4 --resume --reset learning_rate\n"
        "  sparse-zero train demo.yaml launch.processes_per_node=2 --dry-run",
    )
    _add_recipe(train)
    train.add_argument("--merge", action="store_true", help="also write the merged model after training")
    train.add_argument(
        "--find-rate",
        action="store_true",
        help="instead of training, try five learning rates on a few steps each and say which one has the lowest loss",
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="DIR",
        help="resume from this checkpoint; without DIR (or with auto) from the run's newest complete checkpoint, "
        "if there is one",
    )
    train.add_argument(
        "--reset",
        type=split_resets,
        action="extend",
        default=[],
        metavar="NAMES",
        help=f"with --resume: take these from the recipe instead of from the checkpoint ({', '.join(RESETS)})",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="print the command that would start the ranks, and start nothing"
    )
    return train


def _add_submit(commands) -> argparse.ArgumentParser:
    submit = commands.add_parser(
        "submit",
        help="submit a run as a Slurm job",
        usage="sparse-zero submit RECIPE [key=value ...] [--merge] [--dry-run] [--json] [--SBATCH-OPTION VALUE ...]",
        description="Write a batch script to the run's directory, and submit it. Give options of sbatch by\n"
        "their long names, here or in the recipe's `launch.slurm`; the others follow from the recipe.\n"
        "Before the time limit, and when it is preempted, the job saves a checkpoint and is requeued.",
        epilog="examples:\n"
        "  sparse-zero submit demo.yaml --partition gpu --gres gpu:4 --time 04:00:00\n"
        "  sparse-zero submit demo.yaml training.seed=1 launch.nodes=2 --account=A --exclusive --dry-run",
    )
    _add_recipe(submit)
    submit.add_argument("--merge", action="store_true", help="also write the merged model after training")
    submit.add_argument(
        "--dry-run", action="store_true", help="print the script and the command to submit it, and write nothing"
    )
    return submit


def _add_init(commands) -> argparse.ArgumentParser:
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
    init.add_argument("--out", metavar="FILE", help="the recipe to write (default: DATA's name, .yaml)")
    return init


def _add_data(commands) -> argparse.ArgumentParser:
    data = commands.add_parser(
        "data",
        help="show what the model will see of a recipe's data",
        description="Print examples as the model gets them, with the tokens that the loss counts in colour, a\n"
        "histogram of lengths, and how many examples are cut, packed and dropped, and why. Loads no weights.",
        epilog="example:\n  sparse-zero data demo.yaml --examples 5",
    )
    _add_recipe(data)
    data.add_argument("--examples", type=int, default=2, metavar="N", help="examples to print (default: 2)")
    return data


def _add_check(commands) -> argparse.ArgumentParser:
    check = commands.add_parser(
        "check",
        help="check a recipe without loading data or weights",
        description="Ask the libraries that will read the recipe whether its settings are right: the Trainer's\n"
        "arguments, DeepSpeed's file, trackers, the attention kernel, names of metrics, data files, and the targets\n"
        "and the budget on the model's configuration. `train` and `train --dry-run` do the same first.",
        epilog="example:\n  sparse-zero check demo.yaml sparse.targets=[v_proj]",
    )
    _add_recipe(check)
    return check


def _add_evaluate(commands) -> argparse.ArgumentParser:
    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate an adapter on a recipe's evaluation examples",
        description="Evaluate an adapter on the evaluation examples of a recipe, in this process.",
        epilog="example:\n  sparse-zero evaluate demo.yaml --adapter runs/demo/adapter data.eval_size=500",
    )
    _add_recipe(evaluate)
    evaluate.add_argument("--adapter", required=True, metavar="DIR", help=_ADAPTER)
    _add_revision(evaluate)
    return evaluate


def _add_merge(commands) -> argparse.ArgumentParser:
    merge = commands.add_parser(
        "merge",
        help="write base model + adapter as a plain model directory",
        description="Write the base model with the adapter merged into its weights, as a directory that transformers\n"
        "loads without this package.",
        epilog="example:\n  sparse-zero merge runs/demo/adapter merged-model",
    )
    merge.add_argument("adapter", metavar="ADAPTER", help=_ADAPTER)
    merge.add_argument("out", metavar="OUT", help=_NEW_DIRECTORY)
    _add_revision(merge)
    merge.add_argument("--scale", type=float, default=1.0, help="factor of the adapter's deltas (default: 1)")
    merge.add_argument("--force", action="store_true", help="merge values that are NaN or infinite, too")
    merge.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that the base model's repository contains (default: refuse such a model)",
    )
    return merge


def _add_convert(commands) -> argparse.ArgumentParser:
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


def _add_revision(command: argparse.ArgumentParser) -> None:
    command.add_argument("--revision", metavar="REV", help="a branch, tag or commit of an adapter on the hub")


def _add_base(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base",
        metavar="DIR_OR_ID",
        help="the base model, if IN does not name it or it has moved; the original of a fine-tuned model",
    )


def _add_combine(commands) -> argparse.ArgumentParser:
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


def _add_inspect(commands) -> argparse.ArgumentParser:
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


def _add_export(commands) -> argparse.ArgumentParser:
    export = commands.add_parser(
        "export",
        help="turn a checkpoint into an adapter",
        description="Assemble an adapter from the shards of a checkpoint, without a GPU and without the base model.",
        epilog="example:\n  sparse-zero export runs/demo/checkpoint-100 adapter",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run, for its newest checkpoint")
    export.add_argument("out", metavar="ADAPTER", help=_NEW_DIRECTORY)
    return export


def _add_doctor(commands) -> argparse.ArgumentParser:
    doctor = commands.add_parser(
        "doctor",
        help="check the hosts, the network and Slurm before a run",
        description="Check that the hosts have everything that a recipe's run needs, and measure the links between\n"
        "its ranks; without a recipe, check this machine. The exit status is 1 if the run would fail.",
        epilog="examples:\n  sparse-zero doctor\n  sparse-zero doctor demo.yaml launch.hostfile=hosts --no-ranks",
    )
    _add_recipe(doctor, nargs="?")
    doctor.add_argument("--no-ranks", action="store_true", help="do not start ranks to measure their links")
    return doctor


def _add_plan(commands) -> argparse.ArgumentParser:
    plan = commands.add_parser(
        "plan",
        help="predict the memory and the communication of each rank",
        description="Predict the memory and the communication of each rank at each ZeRO stage, and which stages\n"
        "fit an accelerator. Only the model's configuration is read: `model.name` may be a directory\n"
        "that contains nothing but a config.json.",
        epilog="examples:\n"
        "  sparse-zero plan demo.yaml --ranks 4\n"
        "  sparse-zero plan causal-lm-chat.yaml --ranks 64 --nodes 8 --gpu-memory H100 --bandwidth 50",
    )
    _add_recipe(plan)
    plan.add_argument("--ranks", type=int, required=True, metavar="N", help="the number of ranks")
    plan.add_argument("--nodes", type=int, default=1, metavar="M", help="the number of nodes (default: 1)")
    plan.add_argument(
        "--gpu-memory", metavar="GIB_OR_CARD", help="memory per rank: GiB, or a card: H100, A100-40, ..."
    )
    plan.add_argument("--bandwidth", type=float, metavar="GB/S", help="send bandwidth per rank, in 10^9 bytes/s")
    return plan


def _add_recipes(commands) -> argparse.ArgumentParser:
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
    copy.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=_JSON)
    return recipes


def _add_keys(commands) -> argparse.ArgumentParser:
    keys = commands.add_parser(
        "keys",
        help="describe the keys of a recipe",
        description="Print the keys of a recipe with their types, defaults and meanings; with --json, the JSON\n"
        "Schema with which an editor completes and checks recipes.",
        epilog="examples:\n  sparse-zero keys sparse\n  sparse-zero keys launch.master_port",
    )
    keys.add_argument("key", metavar="KEY", nargs="?", help="a section or a key; default: all")
    return keys


def _add_recipe(command: argparse.ArgumentParser, nargs: str | None = None) -> None:
    command.add_argument(
        "recipe", metavar="RECIPE", nargs=nargs, help="a YAML file, or a shipped recipe (`sparse-zero recipes`)"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the recipe, as in training.learning_rate=1e-3; values are YAML",
    )
