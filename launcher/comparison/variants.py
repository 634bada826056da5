"""What a comparison runs: methods and variants as overrides of a recipe, with their rates and seeds. No torch."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.recipe.learning_rate import OTHER_METHODS, default_learning_rate
from sparse_zero.recipe.method import LOW_RANK, METHODS, SPARSE, is_plain, method_of
from sparse_zero.recipe.recipe import SHIPPED_TEXT, Recipe, load_recipe

COLUMNS = "columns"
KNOWN = (SPARSE, COLUMNS, *METHODS[1:])
"""The names that --methods knows."""

TRAINER_SEED = 42
"""The Trainer's own `seed`."""


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    overrides: tuple[str, ...]
    """Of the recipe, besides those of all runs."""
    recipe: Recipe
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One training run of a comparison."""

    variant: str
    rate: float
    seed: int
    directory: Path
    overrides: tuple[str, ...]
    """All overrides of the recipe."""

    @property
    def title(self) -> str:
        return f"{self.variant} rate {self.rate:g} seed {self.seed}"


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    path: str
    """The recipe, as it was given."""
    shared: tuple[str, ...]
    """The overrides of all runs."""
    recipe: Recipe
    """With these overrides."""
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    out: Path

    def run(self, variant: Variant, rate: float, seed: int) -> Run:
        """The run of a variant. The first seed is the recipe's own."""
        directory = self.out / variant.name / f"rate-{rate:g}" / f"seed-{seed}"
        given = [f"training.learning_rate={rate!r}", f"training.seed={seed}"]
        if not is_plain(variant.recipe.training):
            given.append(f"sparse.seed={variant.recipe.sparse.seed + seed - self.seeds[0]}")
        given.append(_path_override("training.output_dir", directory))
        return Run(variant.name, rate, seed, directory, (*self.shared, *variant.overrides, *given))

    @property
    def run_count(self) -> int:
        return sum(len(variant.rates) + len(self.seeds) - 1 for variant in self.variants)


def directory_of(path: str, out: str | None) -> Path:
    """The directory of the comparison of a recipe. Args: out: what --out says."""
    return Path(out).expanduser() if out else Path("runs", f"{Path(path).stem}-compare")


def _path_override(key: str, path: Path) -> str:
    """An override with a path, in quotes if YAML would read it as something else."""
    try:
        is_plain_text = yaml.safe_load(f"{path}") == str(path)
    except yaml.YAMLError:
        is_plain_text = False
    return f"{key}={path if is_plain_text else json.dumps(str(path))}"


def describe(
    path: str,
    overrides: Sequence[str],
    methods: Sequence[str],
    rates: Sequence[str],
    seeds: int,
    budget: str | None,
    text: str | None,
    out: str | None,
) -> Comparison:
    """From the arguments of the command to what it runs.

    Raises UserError: an unknown method, a variant or a rate that cannot be read, or a recipe that is not valid.
    """
    # `--methods sparse lora training.seed=1`: argparse takes the override for another method, or rate
    misplaced = [word for word in (*methods, *rates) if "." in word.partition("=")[0] and "=" in word]
    methods, rates = ([word for word in words if word not in misplaced] for words in (methods, rates))
    overrides = [*overrides, *misplaced]
    _check_output_dir(overrides)
    recipe = load_recipe(path, overrides)
    if (objective := recipe.training.get("objective")) is not None:
        raise UserError(f"compare: not for training.objective: {objective}")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be at least 1")
    if not methods:
        raise UserError(f"--methods: name one or more of {', '.join(KNOWN)}, or NAME='key=value ...'")
    shared = [*overrides, *_parts(recipe, text)]
    recipe = load_recipe(path, shared)
    named = [_variant(word, recipe, budget) for word in methods]
    for index, (name, _) in enumerate(named):
        if name in [other for other, _ in named[:index]]:
            raise UserError(f"--methods: '{name}' stands there twice; give the variants different names")
    of_all, of_one = _rates(rates, [name for name, _ in named])
    variants = []
    for name, given in named:
        own = load_recipe(path, [*shared, *given])
        chosen = of_one.get(name) or of_all or (_own_rate(own, given),)
        variants.append(Variant(name, tuple(given), own, chosen))
    first = int(recipe.training.get("seed", TRAINER_SEED))
    of_runs = tuple(range(first, first + seeds))
    return Comparison(path, tuple(shared), recipe, tuple(variants), of_runs, directory_of(path, out))


def _parts(recipe: Recipe, text: str | None) -> list[str]:
    """The overrides that give each run test examples and a text."""
    data, given = recipe.data, []
    if data.test_split and data.test_split == data.eval_split:
        raise UserError(
            f"data.test_split: '{data.test_split}' is data.eval_split too; rates must not be chosen on test examples"
        )
    if not data.test_split and not data.test_size:
        if isinstance(data.eval_size, int) and data.eval_size < 2:
            raise UserError(f"data.eval_size: {data.eval_size} leaves no example for the test; make it 2 or more")
        given.append("data.test_size=0.5")
    if recipe.model.task == "causal-lm":
        if text is not None:
            file = Path(text).expanduser()
            if file.is_file() and not file.read_bytes().strip():
                raise UserError(f"--text {text}: is empty; give a text of a few pages")
            given.append(_path_override("data.forgetting", file.resolve()))
        elif recipe.data.forgetting is None:
            given.append(f"data.forgetting={SHIPPED_TEXT}")
    elif text is not None:
        raise UserError(f"--text: forgetting is not defined for {recipe.model.task}: leave the text out")
    return given


def _variant(word: str, recipe: Recipe, budget: str | None) -> tuple[str, list[str]]:
    """The name and the overrides of a word of --methods."""
    name, is_own, given = word.partition("=")
    if not is_own:
        if name not in KNOWN:
            hint = did_you_mean(name, KNOWN) or f"; known: {', '.join(KNOWN)}, or NAME='key=value ...'"
            raise UserError(f"--methods: unknown method '{name}'{hint}")
        return name, _overrides_of_method(name, recipe, budget)
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        raise UserError(f"--methods: '{name}' cannot name a variant: use letters, digits, - and _")
    if name in KNOWN:
        raise UserError(f"--methods: '{name}' is a method; give the variant '{word}' another name")
    try:
        words = shlex.split(given)
    except ValueError:
        words = []
    if not words or not all("." in each.partition("=")[0] and "=" in each for each in words):
        raise UserError(f"--methods: '{word}': write NAME='section.key=value section.key=value ...'")
    if "training.seed" in _keys(words):
        raise UserError(f"--methods: '{name}': training.seed is another in each run; give --seeds, or sparse.seed")
    _check_output_dir(words)
    return name, words


def _keys(overrides: Sequence[str]) -> list[str]:
    return [word.partition("=")[0] for word in overrides]


def _check_output_dir(overrides: Sequence[str]) -> None:
    if "training.output_dir" in _keys(overrides):
        raise UserError("training.output_dir: each run has a directory of its own; name that of all with --out")


def _overrides_of_method(name: str, recipe: Recipe, budget: str | None) -> list[str]:
    training, method = recipe.training, SPARSE if name == COLUMNS else name
    given = [f"training.method={method}"] if method != method_of(training) else []
    if method not in LOW_RANK:
        given += [f"training.{key}=null" for key in ("lora", "budget") if training.get(key) is not None]
    elif budget is not None:
        given.append(f"training.budget={budget}")
    elif training.get("budget") is None and not {"r", "target_modules"} & {*(training.get("lora") or {})}:
        given.append("training.budget=same")
    if name == COLUMNS:
        given.append("sparse.columns=whole")
        given += ["sparse.granularity=1"] if recipe.sparse.granularity != 1 else []
        given += ["sparse.selection=stratified"] if recipe.sparse.selection != "stratified" else []
    return given


def _own_rate(recipe: Recipe, overrides: Sequence[str]) -> float:
    """The rate of a variant without --rates. The recipe's own rate is meant for its own method."""
    training, task = recipe.training, recipe.model.task
    is_own = "training.method" not in _keys(overrides) or "training.learning_rate" in _keys(overrides)
    if is_own and "learning_rate" in training:
        return _rate(str(training["learning_rate"]), "training.learning_rate")
    if is_plain(training):
        return OTHER_METHODS[task][method_of(training)]
    return default_learning_rate(task, recipe.sparse.model_density)


def _rates(words: Sequence[str], names: Sequence[str]) -> tuple[tuple[float, ...], Mapping[str, tuple[float, ...]]]:
    """The rates of --rates: of all methods, and of single ones."""
    of_all: tuple[float, ...] = ()
    of_one: dict[str, tuple[float, ...]] = {}
    for word in words:
        name, is_of_one, given = word.rpartition("=")
        # `1e-3, 3e-3` are two words, the first with a comma at its end
        found = [_rate(each, "--rates") for each in (given.removesuffix(",") or ",").split(",")]
        if not is_of_one:
            of_all = tuple(dict.fromkeys([*of_all, *found]))
        elif name in names:
            of_one[name] = tuple(dict.fromkeys([*of_one.get(name, ()), *found]))
        else:
            raise UserError(f"--rates: '{name}' is not among the methods{did_you_mean(name, names)}")
    return of_all, of_one


def _rate(word: str, where: str) -> float:
    try:
        rate = float(word)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise UserError(f"{where}: '{word}' is not a learning rate: write numbers above 0, as in 1e-3,3e-3")
    return rate
