import hashlib
import json
from pathlib import Path

import pytest

from retro_ray.errors import ConfigError
from retro_ray.serve.keys import KEYS_FILE_VARIABLE, KEYS_VARIABLE, ApiKey, KeyRing, parse_keys, read_keys

KEY, OTHER = "k" * 32, "o" * 32


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


GENERATE, BOTH = frozenset({"generate"}), frozenset({"generate", "edit"})


@pytest.mark.parametrize(
    "text",
    [
        f"# who may what\n\n{KEY}  # a key alone may generate\n{OTHER} generate,edit\n",
        f"sha256:{digest(KEY)} generate\r\nsha256:{digest(OTHER).upper()}\tedit generate",
        json.dumps({KEY: ["generate"], f"sha256:{digest(OTHER)}": ["edit", "generate"]}),
    ],
)
def test_lines_and_json_say_the_same(text: str) -> None:
    assert parse_keys(text, "keys") == (ApiKey(digest(KEY), GENERATE), ApiKey(digest(OTHER), BOTH))


def test_a_key_ring_knows_its_keys_and_no_others() -> None:
    ring = KeyRing(parse_keys(f"{KEY}\n{OTHER} edit", "keys"))
    assert ring.rights_of(KEY) == GENERATE
    assert ring.rights_of(OTHER) == {"edit"}
    for wrong in ("", KEY[:-1], KEY + "k", digest(KEY), f"sha256:{digest(KEY)}", "\udcff\u4e2d"):
        assert ring.rights_of(wrong) is None
    assert ring
    assert not KeyRing()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("short generate", "line 1: a key must have at least 16 characters"),
        (f"{KEY}\nsha256:{'0' * 63}", "line 2: a key must have at least 16 characters"),
        (f"{KEY} generate admin", r"line 1: rights are \['admin'\]; there are generate, edit"),
        (json.dumps({KEY: []}), "entry 1: rights are missing"),
        (json.dumps({KEY: "edit"}), "entry 1: a key's rights must be a list"),
        ("{", "is not valid JSON"),
        (f"{KEY} edit\nsha256:{digest(KEY)}", "has an API key twice"),
    ],
)
def test_a_wrong_entry_is_named_without_showing_a_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_keys(text, "my-keys")
    assert "my-keys" in str(caught.value)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_keys_come_from(tmp_path: Path) -> None:
    file, other = tmp_path / "keys", tmp_path / "other"
    file.write_text(KEY)
    other.write_text(OTHER)
    of_file, of_other = parse_keys(KEY, ""), parse_keys(OTHER, "")
    assert read_keys(None, {}) == ()
    assert read_keys(None, {KEYS_VARIABLE: KEY}) == of_file
    assert read_keys(None, {KEYS_FILE_VARIABLE: str(file), KEYS_VARIABLE: OTHER}) == of_file
    assert read_keys(other, {KEYS_FILE_VARIABLE: str(file)}) == of_other


def test_a_file_that_cannot_be_used_never_means_that_no_keys_are_set(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# none yet\n")
    with pytest.raises(ConfigError, match="has no API keys"):
        read_keys(empty, {})
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "missing", {})
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(binary, {})
