"""Augmentation of texts: what each operation changes, and how often."""

import os
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from rpn import text

WORDS = [f"w{n}" for n in range(12)]
KNOWN = {"w3": ["three", "trio"], "w5": ["five"], "w8": ["eight"]}


def synonyms(word: str) -> list[str]:
    return KNOWN.get(word, [])


def lines(function, *arguments, times: int = 300) -> list[list[str]]:
    return [function(WORDS, *arguments[:-1], Random(seed), *arguments[-1:]) for seed in range(times)]


def test_words_with_synonyms_are_replaced():
    seen = Counter()
    for words in lines(text.replace_words, 2, synonyms):
        changed = {place for place in range(12) if words[place] != WORDS[place]}
        assert len(words) == 12
        assert len(changed) == 2
        assert all(words[place] in KNOWN[WORDS[place]] for place in changed)
        seen.update(words[place] for place in changed)
    assert seen.keys() == {"three", "trio", "five", "eight"}
    assert abs(seen["three"] - seen["trio"]) < 40
    assert text.replace_words(["the", "w0"], 2, Random(0), lambda word: ["x"]) == ["the", "x"], "function words stay"


def test_synonyms_are_inserted_anywhere():
    places = set()
    for words in lines(text.insert_synonyms, 1, synonyms):
        [new] = [word for word in words if word not in WORDS]
        places.add(words.index(new))
        assert [word for word in words if word != new] == WORDS
    assert places == set(range(13))


def test_words_change_places():
    for seed in range(50):
        words = text.swap_words(WORDS, 1, Random(seed))
        assert sum(a != b for a, b in zip(words, WORDS, strict=True)) == 2
        assert sorted(words) == sorted(WORDS)
    assert text.swap_words(["one"], 1, Random(0)) == ["one"]


def test_words_are_left_out_with_the_probability():
    kept = [text.leave_out_words(WORDS, 0.1, Random(seed)) for seed in range(500)]
    assert sum(map(len, kept)) / (500 * 12) == pytest.approx(0.9, abs=0.015)
    assert all([word for word in WORDS if word in words] == words for words in kept)
    assert text.leave_out_words(["a", "b"], 1.0, Random(0))[0] in "ab"


def test_aeda_inserts_one_to_a_third_of_the_words():
    counts = Counter()
    for seed in range(300):
        words = text.augment(" ".join(WORDS), "aeda", Random(seed)).split()
        assert [word for word in words if word not in text.MARKS] == WORDS
        counts[len(words) - 12] += 1
    assert counts.keys() == {1, 2, 3, 4}
    assert min(counts.values()) > 40
    assert len(text.augment("word", "aeda", Random(0)).split()) == 2


def test_eda_draws_each_of_its_four_operations():
    copies = [text.augment(" ".join(WORDS), "eda", Random(seed), synonyms).split() for seed in range(400)]
    replaced = sum(len(words) == 12 and set(words) != set(WORDS) for words in copies)
    inserted = sum(len(words) == 13 for words in copies)
    swapped = sum(len(words) == 12 and set(words) == set(WORDS) and words != WORDS for words in copies)
    left_out = sum(len(words) < 12 or words == WORDS for words in copies)
    assert replaced + inserted + swapped + left_out == 400
    assert min(replaced, inserted, swapped, left_out) > 70
    assert text.augment(" ".join(WORDS), "eda", Random(7), synonyms).split() == copies[7]
    assert text.augment(" ", "eda", Random(0), synonyms) == " "


def write_wordnet(directory: Path) -> None:
    """A WordNet with two nouns of one meaning, in its own format: an index by word, and data at byte offsets."""
    directory.mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        for name in (f"data.{part}", f"index.{part}", f"{part}.exc"):
            (directory / name).write_text("")
    names = [f"adj.all\t{3 if n < 3 else 1}" for n in range(5)]
    (directory / "lexnames").write_text("".join(f"{n:02}\t{name}\n" for n, name in enumerate(names)))
    (directory / "index.sense").write_text("")
    (directory / "noun.exc").write_text("pics film\n")
    (directory / "data.noun").write_text("00000000 04 n 02 film 0 motion_picture 0 000 | it moves  \n")
    words = ("film", "motion_picture")
    (directory / "index.noun").write_text("".join(f"{word} n 1 0 1 0 00000000  \n" for word in words))


def test_synonyms_are_read_from_wordnet(tmp_path, monkeypatch):
    nltk = pytest.importorskip("nltk")
    write_wordnet(tmp_path / "corpora" / "wordnet")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])  # it reads nothing elsewhere
    with warnings.catch_warnings(action="ignore"):  # that it knows English only
        reader = nltk.corpus.reader.WordNetCorpusReader(str(tmp_path / "corpora" / "wordnet"), None)
    monkeypatch.setattr(nltk.corpus, "wordnet", reader)
    text.wordnet_synonyms.cache_clear()
    assert text.wordnet_synonyms("film") == ["motion picture"]
    assert text.wordnet_synonyms("films") == ["film", "motion picture"], "other forms of a word are known"
    assert text.wordnet_synonyms("unknown") == []
    text.wordnet_synonyms.cache_clear()


DEBIANS = Path("/usr/share/wordnet")
"""WordNet 3.0 of Debian's package wordnet-base, which .ci/run installs. It lacks two files that NLTK opens."""


def test_synonyms_of_the_real_wordnet(tmp_path, monkeypatch):
    if not DEBIANS.is_dir():
        assert os.environ.get("CI") != "true"
        pytest.skip("needs Debian's package wordnet-base")
    nltk = pytest.importorskip("nltk")
    directory = tmp_path / "corpora" / "wordnet"
    shutil.copytree(DEBIANS, directory)
    (directory / "index.sense").write_text("")
    (directory / "lexnames").write_text("".join(f"{number:02}\tname\t1\n" for number in range(45)))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with warnings.catch_warnings(action="ignore"):
        reader = nltk.corpus.reader.WordNetCorpusReader(str(directory), None)
    monkeypatch.setattr(nltk.corpus, "wordnet", reader)
    text.wordnet_synonyms.cache_clear()
    known = "film, flick, motion picture, motion-picture show, moving picture, moving-picture show, pic, picture"
    assert text.wordnet_synonyms("movie") == [*known.split(", "), "picture show"]
    assert "child" in text.wordnet_synonyms("children")
    assert {"good", "well"} <= {*text.wordnet_synonyms("better")}, "of every part of speech"
    copies = [text.augment("a movie for children", "eda", Random(seed)) for seed in range(40)]
    assert any("picture" in copy or "film" in copy for copy in copies)
    text.wordnet_synonyms.cache_clear()


def test_a_wordnet_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    nltk = pytest.importorskip("nltk")
    reader = nltk.corpus.util.LazyCorpusLoader("wordnet", nltk.corpus.reader.WordNetCorpusReader, None)
    write_wordnet(tmp_path / "corpora" / "wordnet")
    (tmp_path / "corpora" / "wordnet" / "lexnames").unlink()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk.corpus, "wordnet", reader)
    text.wordnet_synonyms.cache_clear()
    with pytest.raises(text.SynonymsNotFound, match=r"nltk\.downloader wordnet \(.*No such file.*lexnames"):
        text.augment("some good words", "eda", Random(2))


def test_without_wordnet_eda_says_how_to_get_it(monkeypatch):
    text.wordnet_synonyms.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    with pytest.raises(text.SynonymsNotFound, match=r"pip install 'sparse-zero\[eda\]', then"):
        text.augment("some good words", "eda", Random(2))
