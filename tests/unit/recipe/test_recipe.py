import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sparse_zero.errors import UserError
from sparse_zero.recipe.recipe import Recipe, load_recipe

CONFIGS = Path(__file__).parents[3] / "configs"
CLASSIFIER = {
    "model": {"name": "some/model"},
    "data": {"path": "some.csv", "columns": {"text": "sentence", "label": "label"}},
}


@pytest.fixture
def write(tmp_path):
    """Writes a recipe: text, or the sections of a classifier updated with some of one's own; returns its path."""

    def write(content: str | dict) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(CLASSIFIER | content))
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sections_and_their_defaults(write):
    recipe = load_recipe(write({"sparse": {"density": 0.02}, "training": {"learning_rate": 0.1}}))
    assert recipe.model.name == "some/model"
    assert recipe.model.task == "sequence-classification"
    assert recipe.data.columns.text == "sentence"
    assert recipe.sparse.density == 0.02
    assert recipe.sparse.targets is None
    assert recipe.rpn is None
    assert recipe.training["learning_rate"] == 0.1
    assert recipe.launch.processes_per_node == "auto"


def test_the_output_goes_to_a_directory_of_the_recipes_name(write):
    path = write({})
    assert load_recipe(path).training["output_dir"] == "runs/recipe"
    assert load_recipe(path, ["training.run_name=mine"]).training["output_dir"] == "runs/mine"
    assert load_recipe(path, ["training.output_dir=here"]).training["output_dir"] == "here"
    assert load_recipe(path, ["training.output_dir=~/here"]).training["output_dir"] == str(Path.home() / "here")


# Unknown keys and values out of range


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sprase.density=0.1", "unknown key 'sprase' at the top level; did you mean 'sparse'?"),
        ("model.nmae=x", "unknown key 'nmae' in section 'model'; did you mean 'name'?"),
        ("data.trainsize=5", "unknown key 'trainsize' in section 'data'; did you mean 'train_size'?"),
        ("data.columns.txt=a", "unknown key 'txt' in section 'data.columns'; did you mean 'text'?"),
        ("sparse.densty=0.1", "unknown key 'densty' in section 'sparse'; did you mean 'density'?"),
        ("rpn.probabilty=0.1", "unknown key 'probabilty' in section 'rpn'; did you mean 'probability'?"),
        (
            "launch.procesess_per_node=2",
            "unknown key 'procesess_per_node' in section 'launch'; did you mean 'processes_per_node'?",
        ),
        ("zzz=1", "unknown key 'zzz' at the top level; known: model, data, sparse, rpn, training, launch"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(write, override, expected):
    path = write({})
    assert refusal(path, override) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sparse.density=0", "sparse.density: input should be greater than 0, not 0"),
        ("sparse.density=1.5", "sparse.density: input should be less than or equal to 1, not 1.5"),
        ("sparse.density=many", "sparse.density: input should be a valid number"),
        ("sparse.density=true", "sparse.density: must be a number, not True"),
        ("sparse.columns=Whole", "sparse.columns: must be a share above 0 and at most 1, or whole, not 'Whole'"),
        ("sparse.columns=true", "sparse.columns: must be a share above 0 and at most 1, or whole, not True"),
        ("sparse.columns=0", "sparse.columns: must be a share above 0 and at most 1, or whole, not 0"),
        ("sparse.seed=-1", "sparse.seed: input should be greater than or equal to 0, not -1"),
        (
            "sparse.targets=v_proj",
            "sparse.targets: input should be 'all-linear' or 'all' or a valid list, not 'v_proj'",
        ),
        ("rpn.probability=2", "rpn.probability: input should be less than or equal to 1, not 2"),
        ("rpn={clean: false, passes: 0}", "rpn: clean: false leaves no loss to train on"),
        ("rpn.std=0.5", "rpn: std is a setting of noise: gaussian, not of noise: rpn; remove it"),
        ("data.train_size=0", "data.train_size: input should be greater than 0, not 0"),
        ("data.max_length=0", "data.max_length: input should be greater than 0, not 0"),
        ("model.task=translation", "model.task: input should be 'sequence-classification' or 'causal-lm'"),
        ("model.name=null", "model.name: input should be a valid string"),
        ("launch.processes_per_node=0", "launch.processes_per_node: 0 is not a positive number"),
        ("launch.processes_per_node=few", "launch.processes_per_node: input should be a valid integer"),
        ("model=some/model", "model: input should be a valid dictionary"),
    ],
)
def test_a_value_out_of_range_names_the_key_and_the_value(write, override, expected):
    path = write({})
    assert refusal(path, override).startswith(f"{path}: {expected}")


@pytest.mark.parametrize(
    ("data", "task", "expected"),
    [
        ({"columns": {"text": "a"}}, "sequence-classification", "needs the columns `text` and `label`"),
        ({"columns": {"label": "a"}}, "sequence-classification", "needs the columns `text` and `label`"),
        ({"columns": {"prompt": "a"}}, "causal-lm", "`prompt` and `completion` go together"),
        ({"columns": {"text": "a", "messages": "b"}}, "causal-lm", "needs one of `text`, `prompt` + `completion`"),
        ({"columns": {}}, "causal-lm", "needs one of `text`, `prompt` + `completion`, `messages`"),
        (
            {"columns": {"text": "a", "label": "b"}, "packing": True},
            "sequence-classification",
            "data.packing: only causal language models can be packed",
        ),
    ],
)
def test_columns_that_do_not_fit_the_task(write, data, task, expected):
    path = write({"model": {"name": "x", "task": task}, "data": {"path": "p", **data}})
    assert expected in refusal(path)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"messages": "a"}, "messages"),
    ],
)
def test_the_kind_of_example_follows_from_the_columns(write, columns, kind):
    path = write({"model": {"name": "x", "task": "causal-lm"}, "data": {"path": "p", "columns": columns}})
    assert load_recipe(path).data.example == kind
    assert load_recipe(write({}), ["data.columns.text_pair=other"]).data.example == "pair"


# Overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("3E5", 300000.0),
        ("-2e-3", -0.002),
        ("1.5e3", 1500.0),
        ("0.1", 0.1),
        ("7", 7),
        ("no", False),
        ("null", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ("1e3x", "1e3x"),
        ("12:00:00", "12:00:00"),
        ("1:30.5", "1:30.5"),
        ("a=b", "a=b"),
        ("[1, 2e-2]", [1, 0.02]),
        ("{betas: [0.9, 0.99]}", {"betas": [0.9, 0.99]}),
    ],
)
def test_the_value_of_an_override_is_yaml(write, text, value):
    found = load_recipe(write({"training": {"key": "old"}}), [f"training.key={text}"]).training["key"]
    assert found == value
    assert type(found) is type(value)


def test_a_recipe_reads_1e_3_as_a_number_too(write):
    path = write(yaml.safe_dump(CLASSIFIER) + "\ntraining: {learning_rate: 1e-3}\n")
    assert load_recipe(path).training["learning_rate"] == 0.001


def test_other_users_of_yaml_are_left_alone():
    assert yaml.safe_load("1e-3") == "1e-3"
    assert yaml.safe_load("12:00:00") == 43200


def test_an_override_makes_the_sections_that_are_not_there(write):
    recipe = load_recipe(write({}), ["rpn.passes=2", "training.a.b.c=1", "training.a.b.d=2", "sparse.seed=5"])
    assert recipe.rpn.passes == 2
    assert recipe.training["a"] == {"b": {"c": 1, "d": 2}}
    assert recipe.sparse.seed == 5


def test_later_overrides_win_and_null_takes_a_section_away(write):
    path = write({"rpn": {"passes": 3}})
    assert load_recipe(path, ["sparse.seed=1", "sparse.seed=2"]).sparse.seed == 2
    assert load_recipe(path, ["rpn=null"]).rpn is None
    assert load_recipe(path, ["rpn.probability=0.2"]).rpn.passes == 3
    assert load_recipe(write({"rpn": None}), ["rpn.passes=2"]).rpn.passes == 2


@pytest.mark.parametrize("override", ["learning_rate", "=1", "training..x=1", ".x=1", "training.=1"])
def test_an_override_that_is_not_key_equals_value(write, override):
    assert refusal(write({}), override).startswith(f"override '{override}': write section.key=value")


def test_an_override_below_a_value(write):
    assert refusal(write({}), "model.name.x=1") == "override 'model.name.x=1': name is a value, not a section"


def test_an_override_that_is_not_yaml(write):
    assert "'a: b: c' is not YAML" in refusal(write({}), "sparse.density=a: b: c")


# Files


def test_a_missing_file(tmp_path):
    path = tmp_path / "none.yaml"
    where = "neither at that path nor among the shipped ones (`sparse-zero recipes` lists them)"
    assert refusal(path) == f"{path}: no such recipe, {where}"


def test_files_that_cannot_be_read(tmp_path):
    assert "cannot be read" in refusal(tmp_path)
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize("text", ["model: [", "a: b: c", "model:\n\tname: x"])
def test_what_is_not_yaml(write, text):
    assert ": not YAML: " in refusal(write(text))


@pytest.mark.parametrize("text", ["", "- model", "model"])
def test_what_is_not_a_mapping(write, text):
    assert "a recipe is a mapping with the sections model, data, sparse" in refusal(write(text))


def test_a_missing_section(write):
    path = write("model: {name: x}")
    assert refusal(path) == f"{path}: data is missing"


def test_a_deepspeed_section_stays_as_it_is(write):
    section = {"zero_optimization": {"stage": 1}}
    assert load_recipe(write({"training": {"deepspeed": section}})).training["deepspeed"] == section


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads(path):
    assert isinstance(load_recipe(path), Recipe)


def test_recipes_need_no_torch():
    code = "import sys, sparse_zero.recipe.recipe; print({'torch', 'transformers', 'deepspeed'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "set()"
