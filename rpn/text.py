"""Augmentation of English or other text by changed copies, the rivals of noise on the embeddings: pure functions.

eda    one of four operations: synonyms replace words, synonyms are inserted, words change places, words are left out
       (arXiv 1901.11196). English: synonyms are those of WordNet, which NLTK reads
aeda   punctuation marks are inserted between the words (arXiv 2108.13230)

Words are what stands between spaces. All choices come from a `random.Random`.
"""

from collections.abc import Callable
from functools import cache
from random import Random

Synonyms = Callable[[str], list[str]]
"""Returns the synonyms of a word, without the word itself, always in the same order."""

METHODS = ("eda", "aeda")
MARKS = (".", ";", "?", ":", "!", ",")

CHANGED = 0.1
"""eda: the share of the words that is changed (alpha in its paper), and each word's probability to be left out."""

_FUNCTION_WORDS = """
a about above after again against all am an and any are as at be because been before being below between both but by
can could did do does doing down during each few for from further had has have having he her here hers herself him
himself his how i if in into is it its itself just me more most my myself no nor not now of off on once only or other
our ours ourselves out over own same she should so some such than that the their theirs them themselves then there
these they this those through to too under until up very was we were what when where which while who whom why will
with would you your yours yourself yourselves
"""
_STOP_WORDS = frozenset(_FUNCTION_WORDS.split())
"""Function words of English: they have no useful synonyms."""


class SynonymsNotFound(Exception):
    """NLTK, or its WordNet, is not installed or cannot be read."""


def augment(text: str, method: str, random: Random, synonyms: Synonyms | None = None) -> str:
    """A changed copy of a text. Args: synonyms: for eda; None: WordNet's.

    Raises:
        SynonymsNotFound: eda without NLTK or its WordNet.
    """
    words = text.split()
    if not words:
        return text
    if method == "aeda":
        return " ".join(insert_marks(words, random))
    known = wordnet_synonyms if synonyms is None else synonyms
    count = max(1, int(CHANGED * len(words)))
    match random.randrange(4):
        case 0:
            words = replace_words(words, count, random, known)
        case 1:
            words = insert_synonyms(words, count, random, known)
        case 2:
            words = swap_words(words, count, random)
        case 3:
            words = leave_out_words(words, CHANGED, random)
    return " ".join(words)


def insert_marks(words: list[str], random: Random) -> list[str]:
    """Insert between one and a third of the number of words punctuation marks, each before or after a word."""
    count = random.randint(1, max(1, len(words) // 3))
    before = sorted(random.sample(range(len(words) + 1), min(count, len(words) + 1)), reverse=True)
    words = list(words)
    for place in before:
        words.insert(place, random.choice(MARKS))
    return words


def replace_words(words: list[str], count: int, random: Random, synonyms: Synonyms) -> list[str]:
    """Replace up to `count` words that have synonyms by one of them. Function words stay."""
    words, places = list(words), [place for place, word in enumerate(words) if word.lower() not in _STOP_WORDS]
    random.shuffle(places)
    for place in places:
        if count and (known := synonyms(words[place])):
            words[place] = random.choice(known)
            count -= 1
    return words


def insert_synonyms(words: list[str], count: int, random: Random, synonyms: Synonyms) -> list[str]:
    """Insert a synonym of up to `count` words, each at a random place."""
    given, words = [word for word in words if word.lower() not in _STOP_WORDS], list(words)
    random.shuffle(given)
    for word in given:
        if count and (known := synonyms(word)):
            words.insert(random.randint(0, len(words)), random.choice(known))
            count -= 1
    return words


def swap_words(words: list[str], count: int, random: Random) -> list[str]:
    """Exchange two words, `count` times."""
    words = list(words)
    for _ in range(count if len(words) > 1 else 0):
        one, other = random.sample(range(len(words)), 2)
        words[one], words[other] = words[other], words[one]
    return words


def leave_out_words(words: list[str], probability: float, random: Random) -> list[str]:
    """Leave out each word with a probability; of all words, keep one."""
    kept = [word for word in words if random.random() >= probability]
    return kept or [random.choice(words)]


@cache
def wordnet_synonyms(word: str) -> list[str]:
    """The lemmas of all meanings of an English word, sorted, without the word itself.

    Raises:
        SynonymsNotFound: NLTK, or its WordNet, is not installed or cannot be read.
    """
    try:
        from nltk.corpus import wordnet

        synsets = wordnet.synsets(word)
    except (ImportError, LookupError, OSError) as error:
        found = f" ({error})" if isinstance(error, OSError) else ""
        raise SynonymsNotFound(
            "eda takes its synonyms from WordNet: pip install 'sparse-zero[eda]', then "
            f"python -m nltk.downloader wordnet{found}"
        ) from None
    lemmas = {lemma.replace("_", " ") for synset in synsets for lemma in synset.lemma_names()}
    return sorted(lemma for lemma in lemmas if lemma.lower() != word.lower())
