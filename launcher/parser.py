"""How the command line is parsed: argparse with some more help. Imports no torch."""

import argparse

from launcher import report
from sparse_zero.errors import did_you_mean

JSON = "print one JSON value on stdout, and nothing else"


class Parser(argparse.ArgumentParser):
    """argparse's parser, which keeps line breaks in descriptions and does not accept abbreviated options."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def _check_value(self, action, value):
        """Names the command that was probably meant, which argparse does from Python 3.14 on."""
        choices = list(action.choices or ())
        if isinstance(value, str) and choices and value not in choices:
            known = f"; known: {', '.join(map(str, choices))}"
            raise argparse.ArgumentError(action, f"unknown: '{value}'{did_you_mean(value, choices) or known}")
        super()._check_value(action, value)


class Version(argparse.Action):
    """Looks up the version only if asked; argparse's own action would delay every command."""

    def __init__(self, option_strings, dest):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(f"{report.PROGRAM} {version('sparse-zero')}")
        parser.exit()


def share(word: str) -> float:
    """An argument that is a share of a whole."""
    try:
        if 0 < float(word) <= 1:
            return float(word)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"a share must be above 0 and at most 1, not {word!r}")


def add_recipe(command: argparse.ArgumentParser, nargs: str | None = None) -> None:
    command.add_argument(
        "recipe", metavar="RECIPE", nargs=nargs, help="a YAML file, or a shipped recipe (`sparse-zero recipes`)"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the recipe, as in training.learning_rate=1e-3; values are YAML",
    )
