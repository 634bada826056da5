"""A run's recipe: YAML with the sections model, data, sparse, rpn, training and launch. Imports no torch.

recipe = load_recipe("demo.yaml", ["training.learning_rate=1e-3"])
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rpn.config import RPNConfig, file_of
from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.recipe.launch import LaunchSection
from sparse_zero.recipe.lookup import find_named_file, find_recipe
from sparse_zero.recipe.method import check_method
from sparse_zero.recipe.objective import check_objective, reward_files, task_of_objective, with_reward_files
from sparse_zero.recipe.quantization import Quantization
from sparse_zero.selection.config import SparseConfig

Task = Literal["sequence-classification", "causal-lm"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Example = Literal["text", "pair", "prompt-completion", "messages"]

SHIPPED_TEXT = "shipped"
"""The `data.forgetting` that is a text of this package."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSection(Section):
    """The base model, and the task to train it for."""

    name: str
    """A hub id, a local directory, or package://PACKAGE/PATH, a directory in an installed package. It may be a GGUF
    file: a path, package://PACKAGE/FILE.gguf, or ORGANISATION/REPOSITORY/FILE.gguf on the hub."""
    gguf_file: str | None = None
    """A GGUF file in the repository or directory `name`."""
    task: Task = "sequence-classification"
    """The head and the loss of the model."""
    problem_type: ProblemType | None = None
    """What a classifier's labels are, as in transformers' config. None: lists are several classes of a text, numbers
    with fractions are regression, and everything else is one class."""
    revision: str | None = None
    """A branch, tag or commit of the hub."""
    tokenizer: str | None = None
    """A hub id or directory of the tokenizer. None: that of `name`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """The dtype of the base model. None: bfloat16 if `training.bf16` and `training.deepspeed`
    are set, else float32."""
    quantization: Quantization | None = None
    """nf4, fp4 or int8: quantise the linear layers of the base model while it is loaded. None: no, or as its
    checkpoint is."""
    attn_implementation: str | None = None
    """As in transformers' from_pretrained: eager, sdpa, flash_attention_2, ..."""
    new_tokens: list[str] = []
    """Tokens to add to the tokenizer. Their embeddings are trained in full."""
    trust_remote_code: bool = False
    """Whether to run Python code that comes with the model, as in transformers' from_pretrained."""

    @field_validator("gguf_file")
    @classmethod
    def _is_gguf(cls, file: str | None) -> str | None:
        if file is not None and not file.endswith(".gguf"):
            raise ValueError("a GGUF file's name ends in .gguf")
        return file

    @property
    def source(self) -> str:
        """`name`, with the GGUF file if it is another key."""
        return f"{self.name.rstrip('/')}/{self.gguf_file}" if self.gguf_file else self.name


class Columns(Section):
    """The column of each part of an example."""

    text: str | None = None
    """The text to classify, or to continue."""
    text_pair: str | None = None
    """The second text of a pair to classify."""
    label: str | None = None
    """The class of a text (a name or an integer), a list of its classes, or a number."""
    prompt: str | list[str] | None = None
    """The prompt, which has no loss. Several columns (instruction and input) are joined by an empty line; those
    without a value are left out."""
    completion: str | None = None
    """What the model is to write after the prompt."""
    messages: str | None = None
    """A conversation: a list of {role, content} or {from, value}. The loss is on the assistant's turns."""
    chosen: str | None = None
    """The better of two answers, for `training.objective: dpo` and `reward`: a text or a conversation."""
    rejected: str | None = None
    """The worse answer."""
    tools: str | None = None
    """The tools of a conversation for the chat template: a list of JSON schemas, or a JSON string of it."""


class DataSection(Section):
    """The examples. `path`, `name`, `data_files` and `revision` are arguments of datasets.load_dataset."""

    path: str
    """A hub id, a directory, a file or a pattern of files (.csv, .tsv, .json, .jsonl, .ndjson, .parquet, .arrow, .txt;
    also compressed), or package://PACKAGE/PATH, a file in an installed package."""
    name: str | None = None
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    revision: str | None = None
    columns: Columns
    filter: dict[str, Any] = {}
    """Column -> the value, or list of values, of the rows to keep."""
    train_split: str = "train"
    eval_split: str | None = None
    """None: evaluation examples are held out from the training split."""
    test_split: str | None = None
    """A split on which the trained model is evaluated once, at the end. None: see `test_size`."""
    train_size: int | float | None = Field(None, gt=0)
    """The number of training examples (an integer), or their fraction (a float below 1). None: all."""
    eval_size: int | float | None = Field(None, gt=0)
    """The number or fraction of evaluation examples. None: all; a tenth of the training split if held out."""
    test_size: int | float | None = Field(None, gt=0)
    """The number or fraction of test examples. Without `test_split` they are taken out of the evaluation examples.
    None: all of `test_split`, or no test."""
    forgetting: str | None = None
    """A text file on which the loss of a language model is measured before and after training: what it has forgotten.
    shipped: a text of this package."""
    split_seed: int = Field(0, ge=0)
    """Seeds the choice of the examples, and `augment`."""
    max_length: int | None = Field(None, gt=0)
    """The number of tokens after which an example is truncated. None: the model's limit."""
    packing: bool = False
    """Whether to pack several examples into a sequence of max_length. Each attends only to itself. Causal language
    models only."""
    augment: Literal["eda", "aeda"] | None = None
    """Train on changed copies of the texts too. eda: synonyms of WordNet replace or join words, or words change places
    or are left out (arXiv 1901.11196; English). aeda: punctuation marks are inserted (arXiv 2108.13230). Sequence
    classification of single texts only."""
    augment_copies: int = Field(1, ge=1)
    """The number of changed copies of each training example."""

    @property
    def example(self) -> Example:
        """The kind of example that `columns` describes."""
        if self.columns.messages:
            return "messages"
        if self.columns.prompt:
            return "prompt-completion"
        return "pair" if self.columns.text_pair else "text"


class Recipe(Section):
    """A training run."""

    model: ModelSection
    data: DataSection
    sparse: SparseConfig = SparseConfig()
    rpn: RPNConfig | None = None
    training: dict[str, Any] = {}
    """The arguments of transformers.TrainingArguments, under the same names, `async_save`: whether to write
    checkpoints in the background, and `chunked_loss`: whether to compute the loss of a causal language model without
    its logits. `objective`: sft, dpo, reward, grpo or rloo trains with TRL; `trl` has the settings of TRL's
    configuration, and `reward_funcs` the reward functions of grpo and rloo. `method`: sparse, lora, dora, full or
    head; `lora` has PEFT's LoraConfig, and `budget`, same or equal-rank, chooses its rank by the `sparse` section."""
    launch: LaunchSection = LaunchSection()

    @property
    def files(self) -> dict[str, str]:
        """The files that the recipe names, by key: a DeepSpeed configuration, and those of functions."""
        deepspeed, noise = self.training.get("deepspeed"), file_of(self.rpn.noise) if self.rpn else None
        text = None if self.data.forgetting == SHIPPED_TEXT else self.data.forgetting
        named = {"training.deepspeed": deepspeed, "rpn.noise": noise, "data.forgetting": text}
        named = {key: name for key, name in named.items() if isinstance(name, str)}
        return named | reward_files(self.training)

    def with_files(self, paths: Mapping[str, str]) -> "Recipe":
        """A copy that names other files. Args: paths: by the keys of `files`."""
        training, rpn, data = with_reward_files(self.training, paths), self.rpn, self.data
        if "training.deepspeed" in paths:
            training = training | {"deepspeed": paths["training.deepspeed"]}
        if rpn is not None and "rpn.noise" in paths:
            function = rpn.noise.rpartition(":")[2]
            rpn = rpn.model_copy(update={"noise": f"{paths['rpn.noise']}:{function}"})
        if "data.forgetting" in paths:
            data = data.model_copy(update={"forgetting": paths["data.forgetting"]})
        return self.model_copy(update={"training": training, "rpn": rpn, "data": data})

    def with_contents(self) -> "Recipe":
        """A copy with the contents of its files instead of their paths, for checksums.

        Raises UserError: a file cannot be read as text.
        """
        contents = {}
        for key, name in self.files.items():
            try:
                contents[key] = Path(name).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{key}: {name}: cannot be read as text ({error})") from None
        return self.with_files(contents)

    @model_validator(mode="before")
    @classmethod
    def _objective_sets_the_task(cls, recipe: Any) -> Any:
        task, model = task_of_objective(recipe), recipe.get("model") if isinstance(recipe, dict) else None
        if task is not None and isinstance(model, dict) and "task" not in model:
            return recipe | {"model": model | {"task": task}}
        return recipe

    @model_validator(mode="after")
    def _columns_fit_the_task(self) -> "Recipe":
        columns = self.data.columns
        check_objective(self)
        check_method(self)
        if self.training.get("objective") is not None:
            pass
        elif self.model.task == "sequence-classification":
            if not (columns.text and columns.label):
                raise ValueError("data.columns: sequence classification needs the columns `text` and `label`")
        elif bool(columns.prompt) != bool(columns.completion):
            raise ValueError("data.columns: `prompt` and `completion` go together")
        elif sum(map(bool, (columns.text, columns.prompt, columns.messages))) != 1:
            raise ValueError("data.columns: a causal LM needs one of `text`, `prompt` + `completion`, `messages`")
        if columns.tools and not columns.messages:
            raise ValueError("data.columns.tools: tools belong to conversations; set data.columns.messages")
        if self.data.augment is not None and not (
            self.model.task == "sequence-classification"
            and columns.text
            and not columns.text_pair
            and self.training.get("objective") is None
        ):
            raise ValueError(f"data.augment: {self.data.augment} is for sequence classification of single texts only")
        if self.model.problem_type and self.model.task != "sequence-classification":
            raise ValueError("model.problem_type: only sequence classification has one")
        if self.data.forgetting and self.model.task != "causal-lm":
            raise ValueError("data.forgetting: only causal language models have a loss on a text; leave it out")
        if self.training.get("objective") is not None:
            for key in ("test_split", "test_size", "forgetting"):
                if getattr(self.data, key) is not None:
                    raise ValueError(f"data.{key}: not together with training.objective; leave it out")
        if self.data.packing and self.model.task != "causal-lm":
            raise ValueError("data.packing: only causal language models can be packed")
        if self.training.get("chunked_loss") and self.model.task != "causal-lm":
            raise ValueError("training.chunked_loss: only causal language models have such a loss; set it to false")
        return self


def _suffix(key: str) -> str:
    """The suffix of a file that a recipe names."""
    return {"training.deepspeed": ".json", "data.forgetting": ".txt"}.get(key, ".py")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides.

    `training.output_dir` defaults to runs/NAME, where NAME is the recipe's file name or `training.run_name`. The files
    that it names are looked up next to the recipe, then in the working directory, and a
    DeepSpeed file then among the shipped ones.

    Args:
        path: a file, or the name of a shipped recipe if there is no such file.
        overrides: `section.key=value`; values are YAML.

    Raises:
        UserError: there is no such file, it is not YAML, a key is unknown (the message names the nearest known one), a
            value is out of range, or a file that the recipe names does not exist.
    """
    file = find_recipe(path)
    raw = _read_yaml(file, path)
    for override in overrides or []:
        _apply_override(raw, override)
    try:
        # A section whose keys are all commented out reads as null
        recipe = Recipe.model_validate({key: value for key, value in raw.items() if value is not None})
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from None
    training = dict(recipe.training)
    name = training.setdefault("run_name", file.stem)
    training["output_dir"] = os.path.expanduser(str(training.get("output_dir") or Path("runs", str(name))))
    recipe = recipe.model_copy(update={"training": training})
    try:
        found = {key: str(find_named_file(key, name, file, _suffix(key))) for key, name in recipe.files.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return recipe.with_files(found)


def _read_yaml(file: Path, shown: str | Path) -> dict[str, Any]:
    """Args: shown: names the file in messages."""
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{shown}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{shown}: a recipe is a mapping with the sections {', '.join(Recipe.model_fields)}")
    return raw


class _Loader(yaml.SafeLoader):
    """SafeLoader without two rules of YAML 1.1: 1e-3 is a number although it has no dot, and 12:00:00 is a string, not
    a number of base 60.
    """


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_BASE_60 = ("tag:yaml.org,2002:str", re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?$"))
for _first in "-+0123456789":
    # Before SafeLoader's own resolvers: the first match wins.
    _Loader.yaml_implicit_resolvers[_first].insert(0, _BASE_60)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    *parents, leaf = key.strip().split(".")
    if not (equals and leaf and all(parents)):
        raise UserError(f"override '{override}': write section.key=value, as in training.learning_rate=1e-3")
    node = raw
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"override '{override}': {parent} is a value, not a section")
    try:
        node[leaf] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"override '{override}': '{value}' is not YAML") from None


def explain(error: ValidationError, schema: type[BaseModel] = Recipe) -> str:
    """The first error of a validation in one line: the key, the problem, and the nearest known key."""
    first, *others = error.errors()
    *parents, last = map(str, first["loc"]) if first["loc"] else ("",)
    section, keys = _follow(schema, [*parents, last])
    if first["type"] == "extra_forbidden":
        place = f"in section '{'.'.join(parents)}'" if parents else "at the top level"
        hint = did_you_mean(last, section.model_fields) or f"; known: {', '.join(section.model_fields)}"
        return f"unknown key '{last}' {place}{hint}"
    alternatives = [
        other["msg"].removeprefix("Input should be ")
        for other in others
        if other["msg"].startswith("Input should be ") and _follow(schema, [*map(str, other["loc"])])[1] == keys
    ]
    message = " or ".join([first["msg"].removeprefix("Value error, "), *alternatives])
    if first["type"] == "missing":
        return f"{'.'.join([*keys, last] if last not in keys else keys)} is missing"
    given = first.get("input")
    is_shown = isinstance(given, str | int | float) and keys[:2] != ["launch", "environment"]  # may be a secret
    shown = f", not {given!r}" if is_shown else ""
    return f"{'.'.join(keys)}: {message[0].lower()}{message[1:]}{shown}" if keys else message


def _follow(schema: type[BaseModel], location: list[str]) -> tuple[type[BaseModel], list[str]]:
    """The innermost section of an error's location, and the keys of the location without pydantic's tags of unions."""
    keys: list[str] = []
    for part in location:
        if part not in schema.model_fields:
            break
        keys.append(part)
        annotation = schema.model_fields[part].annotation
        sections = [c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, BaseModel)]
        if not sections:
            break
        schema = sections[0]
    return schema, keys
