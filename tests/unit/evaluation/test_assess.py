"""Texts whose overlaps are known, with keys that are known: the counts must be exact."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from retro_ray.commands.assess import assessment_as_text, describe
from retro_ray.errors import InputError
from retro_ray.evaluation.assess import assess
from retro_ray.text.corpus import Document
from retro_ray.text.tokenizer import TextTokenizer, train_tokenizer

M = 8


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer([words(range(400))] * 3, 1200, "train:1200")


def word(number: int) -> str:
    return "w" + "".join(chr(ord("a") + digit) for digit in divmod(number, 26))


def words(numbers: Sequence[int]) -> str:
    return "".join(" " + word(number) for number in numbers)


def document(name: str, numbers: Sequence[int]) -> Document:
    return Document(id=name, title=name, source=name[0], text=words(numbers))


def first_number_keys(texts: Sequence[str]) -> np.ndarray:
    """Chunks that start with like words are near each other."""
    number_of = {word(number): number for number in range(400)}
    return np.array([[number_of[text.split()[0]], 0] for text in texts], np.float32)


@pytest.fixture(scope="module")
def assessment(tokenizer: TextTokenizer):
    # One word is one token, and a document starts with its start token: chunks of 7 words, then 8, 8, ...
    a = document("a1", range(23))  # chunks start with words 0, 7, 15
    b = document("b1", [*range(15), *range(100, 108)])  # the same, but for its third chunk
    c = document("c1", range(200, 223))  # shares nothing
    return assess([a, b, c], tokenizer, first_number_keys, chunk_length=M, group_of=lambda d: d.source)


def test_one_word_is_one_token(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode(words(range(400)))) == 400


def test_known_shares(assessment) -> None:
    """a1: what follows its first chunk stands in b1's [N, F] for 8 words, and b1's alike; c1 has nothing."""
    assert (assessment.num_documents, assessment.num_chunks) == (3, 9)
    shares = {name: (group.num_tokens, group.num_copyable) for name, group in assessment.groups.items()}
    assert shares == {"a": (16, 8), "b": (16, 8), "c": (16, 0)}
    assert assessment.total.share == 16 / 48
    assert assessment.total.num_documents == 3
    assert assessment.total.random_share <= assessment.total.share


def test_examples_name_both_documents(assessment) -> None:
    [first, second] = assessment.examples
    assert {first.document, second.document} == {first.neighbour, second.neighbour} == {"a1", "b1"}
    assert first.text.split()[-8:] == [word(number) for number in range(7, 15)]
    assert first.distance == 0.0


def test_the_report_says_it_all(assessment) -> None:
    description = describe(assessment, share=0.5)
    assert description["new_copyable_share"] == 16 / 48
    assert "Much to gain: 33.3%" in description["verdict"]
    text = assessment_as_text(description)
    assert "a1 can copy from b1" in text
    assert "(50% of the text, 9 chunks)" in text
    nothing = dataclasses.replace(assessment.total, num_copyable=0)
    assert "Little to gain: 0.0%" in dataclasses.replace(assessment, total=nothing).verdict
    some = dataclasses.replace(assessment.total, num_copyable=1, num_copyable_from_random=0)
    assert "Some gain: 2.1%" in dataclasses.replace(assessment, total=some).verdict


def test_too_little_is_refused(tokenizer: TextTokenizer) -> None:
    def assess_them(*documents: Document) -> None:
        assess(list(documents), tokenizer, first_number_keys, chunk_length=M, group_of=lambda d: d.source)

    with pytest.raises(InputError, match="1 documents of 3 chunks"):
        assess_them(document("a", range(20)))
    with pytest.raises(InputError, match="more than 8 tokens"):
        assess_them(document("a", range(3)), document("b", range(3)))


def test_documents_that_are_nearly_the_same_are_named(tokenizer: TextTokenizer) -> None:
    a, copy, other = document("a", range(60)), document("b", range(60)), document("c", range(100, 160))
    found = assess([a, copy, other], tokenizer, first_number_keys, chunk_length=M, group_of=lambda d: d.source)
    assert found.near_duplicates == (("a", "b"),)
    assert "Pairs of documents that are nearly the same: 1, first a and b." in assessment_as_text(describe(found, 1.0))
