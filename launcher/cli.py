"""The arguments of `sparse-zero`, and how it ends: 0, 2 and one line for a user's error, 75 for a run that was
stopped and can go on, 128 + n for signal n.

Nothing is imported here that a subcommand does not need: `--help` must answer at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from launcher import report
from launcher.jobs.sbatch_options import split_words
from sparse_zero.checkpoint.resume import complete_resume_option
from sparse_zero.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `sparse-zero` command line and return its exit status."""
    try:
        arguments = _parse(argv)
        # Imported after the parsing, so that a typing error does not wait for it.
        from launcher import commands

        status = getattr(commands, arguments.command)(arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        report.say_error(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has left; the interpreter's last flush must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    words = complete_resume_option(sys.argv[1:] if argv is None else argv)
    options, words = split_words(words) if words[:1] == ["submit"] else ({}, words)
    arguments, rest = build_parser().parse_known_args(words)
    arguments.sbatch_options = options
    # argparse gives up on positional arguments that follow an option (`train RECIPE --merge key=value`).
    if hasattr(arguments, "overrides"):
        arguments.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        dotted = [word.lstrip("-") for word in rest if "=" in word and "." in word.partition("=")[0]]
        hint = f" (an override has no dashes: {dotted[0]})" if dotted else ""
        arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; each subcommand's namespace has `command` and, as `parser`, its own parser."""
    parser = _Parser(
        prog=report.PROGRAM,
        description="Fine-tune a large model by training a small random subset of its weights, "
        "partitioned over the ranks by DeepSpeed ZeRO.",
        epilog="example:\n  sparse-zero train configs/demo.yaml launch.processes_per_node=2",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (
        _add_train,
        _add_submit,
        _add_evaluate,
        _add_merge,
        _add_combine,
        _add_convert,
        _add_inspect,
        _add_export,
        _add_doctor,
        _add_plan,
        _add_keys,
    ):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print one JSON value on stdout, nothing else")
        command.set_defaults(parser=command)
    return parser


def _add_train(commands) -> argparse.ArgumentParser:
    train = commands.add_parser(
        "train",
        help="start the ranks of a run",
        description="Start the ranks that the recipe's `launch` section asks for, and wait for them.\n"
        "SIGINT, SIGTERM and SIGUSR1 make the ranks save a checkpoint and end, with status 75; a second signal ends\n"
        "them at once. Else the exit status is that of the ranks.",
        epilog="examples:\n"
        "  sparse-zero train configs/demo.yaml training.learning_rate=1e-3 sparse.density=0.01\n"
        "  sparse-zero train configs/demo.yaml --resume\n"
        "  sparse-zero train configs/demo.yaml launch.processes_per_node=2 --dry-run",
    )
    _add_recipe(train)
    train.add_argument("--merge", action="store_true", help="also write the merged model when training has ended")
    train.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="DIR",
        help="go on from this checkpoint; without DIR (or with auto) from the newest complete one of the run, "
        "should there be one",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="print the command that would start the ranks, start nothing"
    )
    return train


def _add_submit(commands) -> argparse.ArgumentParser:
    submit = commands.add_parser(
        "submit",
        help="submit a run as a job of Slurm",
        usage="sparse-zero submit RECIPE [key=value ...] [--merge] [--dry-run] [--json] [--SBATCH-OPTION VALUE ...]",
        description="Write a batch script beside the run, and submit it. Options of sbatch are given by their long\n"
        "names, here or in the recipe's `launch.slurm`; what they leave open, the rest of the recipe says.\n"
        "Before the time limit, and when it is preempted, the job saves a checkpoint and is queued again.",
        epilog="examples:\n"
        "  sparse-zero submit configs/demo.yaml --partition gpu --gres gpu:4 --time 04:00:00\n"
        "  sparse-zero submit configs/demo.yaml training.seed=1 launch.nodes=2 --account=A --exclusive --dry-run",
    )
    _add_recipe(submit)
    submit.add_argument("--merge", action="store_true", help="also write the merged model when training has ended")
    submit.add_argument(
        "--dry-run", action="store_true", help="print the script and the command that would submit it, write nothing"
    )
    return submit


def _add_evaluate(commands) -> argparse.ArgumentParser:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure an adapter on a recipe's evaluation examples",
        description="Measure an adapter on the evaluation examples of a recipe, in this process.",
        epilog="example:\n  sparse-zero evaluate configs/demo.yaml --adapter runs/demo/adapter data.eval_size=500",
    )
    _add_recipe(evaluate)
    evaluate.add_argument("--adapter", required=True, metavar="DIR", help="the adapter's directory")
    return evaluate


def _add_merge(commands) -> argparse.ArgumentParser:
    merge = commands.add_parser(
        "merge",
        help="write base model + adapter as a plain model directory",
        description="Write the base model with the adapter's values in its weights, as a directory that\n"
        "transformers loads without this package.",
        epilog="example:\n  sparse-zero merge runs/demo/adapter merged-model",
    )
    merge.add_argument("adapter", metavar="ADAPTER", help="the adapter's directory")
    merge.add_argument("out", metavar="OUT", help="the directory to write; must not hold anything yet")
    merge.add_argument("--scale", type=float, default=1.0, help="how often the deltas count (default: 1)")
    return merge


def _add_convert(commands) -> argparse.ArgumentParser:
    convert = commands.add_parser(
        "convert",
        help="read and write adapters of other programs",
        description="Read an adapter of any of these formats, or what a fine-tuned model changed in its original,\n"
        "and write it in another. IN is recognised by its files.\n\n"
        "  sparse-zero   our own\n"
        "  sparta        the reference implementation's (peft-sparta)\n"
        "  shira         PEFT's SHiRA\n"
        "  supertuning   PEFT's Super-Tuning",
        epilog="examples:\n"
        "  sparse-zero convert runs/demo/adapter for-peft --to shira\n"
        "  sparse-zero convert fine-tuned-model adapter --base original-model",
    )
    convert.add_argument("adapter", metavar="IN", help="an adapter's directory, or a fine-tuned model's")
    convert.add_argument("out", metavar="OUT", help="the directory to write; must not hold anything yet")
    convert.add_argument("--to", choices=["sparse-zero", "sparta", "shira", "supertuning"], default="sparse-zero")
    _add_base(convert)
    convert.add_argument(
        "--max-density",
        type=_share,
        default=0.5,
        metavar="SHARE",
        help="refuse a fine-tuned model of which a larger share of the scalars differs (default: %(default)s)",
    )
    return convert


def _add_base(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base",
        metavar="DIR_OR_ID",
        help="the base model, where IN does not say it or it lies elsewhere now; the original of a fine-tuned model",
    )


def _share(word: str) -> float:
    try:
        if 0 < float(word) <= 1:
            return float(word)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"a share is above 0 and at most 1, not {word!r}")


def _add_combine(commands) -> argparse.ArgumentParser:
    combine = commands.add_parser(
        "combine",
        help="make one adapter of several",
        description="Write a weighted combination of adapters of one base model as a new adapter.",
        epilog="example:\n  sparse-zero combine runs/a/adapter runs/b/adapter --out both --weights 0.7 0.3",
    )
    combine.add_argument("adapters", metavar="ADAPTER", nargs="+", help="the adapters' directories")
    combine.add_argument(
        "--out", required=True, metavar="DIR", help="the directory to write; must not hold anything yet"
    )
    combine.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each adapter")
    combine.add_argument(
        "--type",
        dest="combination_type",
        choices=("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"),
        default="linear",
        help="how conflicts are settled (default: linear, the weighted sum)",
    )
    combine.add_argument(
        "--density", type=float, default=1.0, help="fraction of each adapter's deltas to keep, not with linear"
    )
    combine.add_argument("--seed", type=int, default=0, help="of dare's random choice")
    return combine


def _add_inspect(commands) -> argparse.ArgumentParser:
    inspect = commands.add_parser(
        "inspect",
        help="say what an adapter holds",
        description="Say what an adapter holds: its base model, its size, and what it changes where and by how much.\n"
        "Also of the formats that `sparse-zero convert` reads.",
        epilog="examples:\n"
        "  sparse-zero inspect runs/demo/adapter --json\n"
        "  sparse-zero inspect fine-tuned-model --base original-model",
    )
    inspect.add_argument("adapter", metavar="IN", help="an adapter's directory, or a fine-tuned model's")
    _add_base(inspect)
    return inspect


def _add_export(commands) -> argparse.ArgumentParser:
    export = commands.add_parser(
        "export",
        help="turn a checkpoint into an adapter",
        description="Assemble an adapter from the shards of a checkpoint, without a GPU and without the base model.",
        epilog="example:\n  sparse-zero export runs/demo/checkpoint-100 adapter",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's directory: its newest one")
    export.add_argument("out", metavar="ADAPTER", help="the directory to write; must not hold anything yet")
    return export


def _add_doctor(commands) -> argparse.ArgumentParser:
    doctor = commands.add_parser(
        "doctor",
        help="examine the hosts, the network and Slurm before a run",
        description="Examine what a recipe's run needs of its hosts, and measure the links between its ranks;\n"
        "without a recipe, of this machine. The exit status is 1 where something would make the run fail.",
        epilog="examples:\n"
        "  sparse-zero doctor\n"
        "  sparse-zero doctor configs/demo.yaml launch.hostfile=hosts --no-ranks",
    )
    _add_recipe(doctor, nargs="?")
    doctor.add_argument("--no-ranks", action="store_true", help="start no ranks, measure no links")
    return doctor


def _add_plan(commands) -> argparse.ArgumentParser:
    plan = commands.add_parser(
        "plan",
        help="say what each rank of a run will hold and send",
        description="Say what each rank of a run will hold and send at each ZeRO stage, and which stages fit an\n"
        "accelerator. Of the model just the configuration is read: `model.name` may be a directory with nothing\n"
        "but a config.json.",
        epilog="examples:\n"
        "  sparse-zero plan configs/demo.yaml --ranks 4\n"
        "  sparse-zero plan configs/causal-lm-chat.yaml --ranks 64 --nodes 8 --gpu-memory H100 --bandwidth 50",
    )
    _add_recipe(plan)
    plan.add_argument("--ranks", type=int, required=True, metavar="N")
    plan.add_argument("--nodes", type=int, default=1, metavar="M", help="that the ranks are on (default: 1)")
    plan.add_argument("--gpu-memory", metavar="GIB_OR_CARD", help="of each rank: GiB, or a card such as H100, A100-40")
    plan.add_argument("--bandwidth", type=float, metavar="GB/S", help="that each rank sends with, in 10^9 bytes/s")
    return plan


def _add_keys(commands) -> argparse.ArgumentParser:
    keys = commands.add_parser(
        "keys",
        help="say what a recipe can hold",
        description="Print the keys of a recipe with their types, defaults and meanings; with --json the JSON\n"
        "Schema, by which an editor completes and checks recipes.",
        epilog="examples:\n  sparse-zero keys sparse\n  sparse-zero keys launch.master_port",
    )
    keys.add_argument("key", metavar="KEY", nargs="?", help="a section or a key of it; left out: all")
    return keys


def _add_recipe(command: argparse.ArgumentParser, nargs: str | None = None) -> None:
    command.add_argument("recipe", metavar="RECIPE", nargs=nargs, help="a YAML recipe, as in configs/")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replace a key of the recipe, as in training.learning_rate=1e-3; values are YAML",
    )


class _Parser(argparse.ArgumentParser):
    """argparse's, with line breaks kept and no guessing of shortened options."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)


class _Version(argparse.Action):
    """argparse's own `version` wants the number beforehand; looking it up would delay every command."""

    def __init__(self, option_strings, dest):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(f"{report.PROGRAM} {version('sparse-zero')}")
        parser.exit()
