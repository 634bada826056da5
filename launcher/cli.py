"""The arguments and exit statuses of `sparse-zero`.

Exit statuses: 0; 2, with one line, for an error of the user; 75 if a run was stopped and can be resumed; 128 + n for
signal n. Libraries that only some subcommands need are not imported here: `--help` must answer at once.
"""

import argparse
import atexit
import gc
import importlib
import os
import sys
from collections.abc import Sequence

from launcher import report
from launcher.adapter_options import add_combine, add_convert, add_evaluate, add_export, add_inspect, add_merge
from launcher.answering_options import add_chat, add_generate
from launcher.comparison.options import add_compare
from launcher.jobs.sbatch_options import split_words
from launcher.parser import JSON, Parser, Version
from launcher.recipe_options import add_data, add_init, add_keys, add_recipes
from launcher.run_options import add_check, add_doctor, add_plan, add_submit, add_train
from sparse_zero.checkpoint.resume import complete_resume_option
from sparse_zero.errors import UserError
from sparse_zero.quantized.quiet_imports import silence_imports

_COMMANDS = {
    "launcher.run_commands": (add_train, add_submit, add_check, add_doctor, add_plan),
    "launcher.recipe_commands": (add_init, add_data, add_recipes, add_keys),
    "launcher.adapter_commands": (add_evaluate, add_merge, add_combine, add_convert, add_inspect, add_export),
    "launcher.comparison.command": (add_compare,),
    "launcher.answering": (add_chat, add_generate),
}
"""The modules of the subcommands, each with what adds the arguments of its subcommands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `sparse-zero` command line and return its exit status."""
    if argv is None:
        # Searches of all objects for garbage would find none, and are a quarter of the time of torch's import.
        gc.set_threshold(*gc.get_threshold()[:2], 1000)
        atexit.register(gc.freeze)
    try:
        arguments = _parse(argv)
        silence_imports()
        # After the parsing: a wrong argument must not wait for these imports.
        status = getattr(importlib.import_module(arguments.module), arguments.command)(arguments)
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
    """The parser of all subcommands. A parsed namespace has `command`, `parser`, the subcommand's own parser, and
    `module`, the name of the module that has a function `command`."""
    parser = Parser(
        prog=report.PROGRAM,
        description="Fine-tune a large model by training a small random subset of its weights, "
        "partitioned over the ranks by DeepSpeed ZeRO.",
        epilog="example:\n  sparse-zero train demo.yaml launch.processes_per_node=2",
    )
    parser.add_argument("--version", action=Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for module, additions in _COMMANDS.items():
        for add in additions:
            command = add(commands)
            command.add_argument("--json", action="store_true", help=JSON)
            command.set_defaults(parser=command, module=module)
    return parser
