"""Text to token ids and back, with the bytes that each token stands for.

A trained tokenizer is lossless: `decode(encode(text)) == text` for every text that UTF-8 can hold.
A Hugging Face tokenizer is what its author made it; many normalise text and lose some of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from retro_ray.errors import ConfigError, DatabaseError, InputError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
META_FILE = "tokenizer_meta.json"

# Long texts are encoded in pieces, so that memory stays bounded (an encoding takes over a hundred times
# the memory of its text); a piece that fits the processor's cache is also faster than a long one.
PIECE_LENGTH = 1 << 16
PIECES_PER_BATCH = 16
HUB_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


class TextTokenizer:
    """A fast tokenizer, its start and end tokens, and the fingerprint that tells it from others.

    Args:
        content: the tokenizer as JSON, as in a tokenizer.json.
        name: `train:N`, or what it was loaded from.
        bos_id: start token; every document begins with it.
        eos_id: end token; may be the same.
    """

    def __init__(self, content: str, name: str, bos_id: int, eos_id: int) -> None:
        self.name = name
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._content = content
        self._tokenizer = Tokenizer.from_str(content)
        # A text that spells a special token out is text: it must neither be lost nor steer the model.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have holes, so the number of entries can be too small.
        self.vocab_size = max(*self._tokenizer.get_vocab(with_added_tokens=True).values(), bos_id, eos_id) + 1
        identity = json.dumps([content, bos_id, eos_id])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[str, str, int, int]]:
        return TextTokenizer, (self._content, self.name, self.bos_id, self.eos_id)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int64 [n], without start or end token.

        Raises:
            InputError: the text holds a lone surrogate, which is no character and has no UTF-8 form.
        """
        _utf8(text)
        return _concatenate([np.array(encoding.ids, np.int64) for _, encoding in self._encodings(text, fast=True)])

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, int64 [n], and the UTF-8 bytes of the text that each accounts for, int64 [n].

        The bytes sum exactly to those of the text if there is any token. Bytes that no token covers
        (whitespace, say, that the tokenizer drops) count for the next token, and at the end for the
        last one.

        Raises:
            InputError: as in `encode`.
        """
        total = len(_utf8(text))
        if self._bytes_of_id is not None:
            ids = self.encode(text)
            num_bytes = self._bytes_of_id[ids]
            if num_bytes.sum() == total:
                return ids, num_bytes
        return self._encode_with_offsets(text, total)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids. Special tokens are left out; a character cut in two becomes U+FFFD."""
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)

    def decode_batch(self, batch: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        """`decode` of each."""
        rows = [np.asarray(ids, np.int64).tolist() for ids in batch]
        return self._tokenizer.decode_batch(rows, skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_meta.json into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TOKENIZER_FILE).write_text(self._content, encoding="utf-8", newline="")
        meta = {"name": self.name, "bos_id": self.bos_id, "eos_id": self.eos_id, "fingerprint": self.fingerprint}
        (directory / META_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    def save_pretrained(self, directory: Path) -> None:
        """Write it as transformers' AutoTokenizer reads it, for programs that know no other kind; ids are the same."""
        from transformers import PreTrainedTokenizerFast  # takes seconds to import

        bos_token, eos_token = (self._tokenizer.id_to_token(token) for token in (self.bos_id, self.eos_id))
        PreTrainedTokenizerFast(
            tokenizer_object=self._tokenizer, bos_token=bos_token, eos_token=eos_token, split_special_tokens=True
        ).save_pretrained(str(directory))

    @classmethod
    def load(cls, directory: Path) -> TextTokenizer:
        """The tokenizer that `save` wrote.

        Raises:
            DatabaseError: there is none, it is damaged, or it is not the one that was saved.
        """
        directory = Path(directory)
        way_out = "restore the file, or rebuild the database with jobs/index.py"
        try:
            # Bytes, since text mode would fold line ends and so change the fingerprint.
            content = (directory / TOKENIZER_FILE).read_bytes().decode("utf-8")
            meta = json.loads((directory / META_FILE).read_text(encoding="utf-8"))
            name, recorded = meta["name"], meta["fingerprint"]
            bos_id, eos_id = int(meta["bos_id"]), int(meta["eos_id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatabaseError(f"cannot read the tokenizer in {directory} ({error}): {way_out}") from error
        try:
            tokenizer = cls(content, name, bos_id, eos_id)
        except Exception as error:  # the tokenizers library raises bare Exception for a bad file
            raise DatabaseError(f"{directory / TOKENIZER_FILE} is damaged ({error}): {way_out}") from error
        if tokenizer.fingerprint != recorded:
            raise DatabaseError(
                f"the tokenizer in {directory} has fingerprint {tokenizer.fingerprint}, {META_FILE} says "
                f"{recorded}: {way_out}"
            )
        return tokenizer

    @cached_property
    def _bytes_of_id(self) -> np.ndarray | None:
        """Bytes of each id, int64 [vocab_size], where a token is spelled with one character per byte."""
        structure = json.loads(self._content)
        if structure.get("normalizer") or (structure.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        num_bytes = np.zeros(self.vocab_size, np.int64)
        for token, token_id in self._tokenizer.get_vocab(with_added_tokens=False).items():
            num_bytes[token_id] = len(token)
        for token_id, token in self._tokenizer.get_added_tokens_decoder().items():
            num_bytes[token_id] = len(token.content.encode())  # added tokens are spelled as they are
        return num_bytes

    def _encodings(self, text: str, *, fast: bool) -> Iterator[tuple[int, Any]]:
        """(start in characters, encoding) of each piece of a text; a fast one has no offsets."""
        encode = self._tokenizer.encode_batch_fast if fast else self._tokenizer.encode_batch
        cuts = cut_points(text)
        while batch := list(islice(cuts, PIECES_PER_BATCH)):
            pieces = [text[start:end] for start, end in batch]
            encodings = encode(pieces, add_special_tokens=False)
            yield from zip((start for start, _ in batch), encodings, strict=True)

    def _encode_with_offsets(self, text: str, total: int) -> tuple[np.ndarray, np.ndarray]:
        """`encode_with_bytes` for any tokenizer, by the places that it reports for its tokens."""
        ids, ends = [], []
        for start, encoding in self._encodings(text, fast=False):
            ids.append(np.array(encoding.ids, np.int64))
            offsets = np.fromiter((end for _, end in encoding.offsets), np.int64, len(encoding.ids))
            ends.append(start + offsets)
        all_ids, end_char = _concatenate(ids), _concatenate(ends)
        if len(all_ids) == 0:
            return all_ids, end_char
        # Tokens of one character share its place: the first of them gets its bytes, the others 0.
        end_byte = np.maximum.accumulate(_byte_positions(text)[end_char] if total != len(text) else end_char)
        end_byte[-1] = total
        return all_ids, np.diff(end_byte, prepend=0)


def train_tokenizer(texts: Iterable[str], vocab_size: int, name: str) -> TextTokenizer:
    """Train a byte-level BPE: lossless, and the same for the same texts, in whatever order they come.

    Args:
        texts: what to learn from, streamed.
        vocab_size: most entries, with the 256 bytes and the one special token; a small corpus yields
            fewer, since only pairs that occur twice are merged.
        name: recorded in the tokenizer.

    Raises:
        ConfigError: `vocab_size` is under 257.
    """
    if vocab_size < 257:
        raise ConfigError(f"--tokenizer train:{vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257 entries")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = (text[start:end] for text in texts for start, end in cut_points(text))
    tokenizer.train_from_iterator(pieces, trainer)
    end_id = tokenizer.get_vocab()[END_OF_TEXT]
    return TextTokenizer(tokenizer.to_str(), name, bos_id=end_id, eos_id=end_id)


def load_tokenizer(name_or_path: str) -> TextTokenizer:
    """A Hugging Face tokenizer by name or path, or one of ours by its folder.

    Looks on this machine first and asks the hub only for what is not here.

    Raises:
        ConfigError: there is none, it has no fast form, or it has neither a start nor an end token.
        DatabaseError: a folder of ours is damaged.
    """
    if (Path(name_or_path) / META_FILE).is_file():
        return TextTokenizer.load(Path(name_or_path))
    loaded = _load_pretrained(name_or_path)
    if not getattr(loaded, "is_fast", False):
        raise ConfigError(
            f"--tokenizer {name_or_path} has no fast form (no tokenizer.json): choose one that has, or train:16384"
        )
    known = [token for token in (loaded.bos_token_id, loaded.eos_token_id) if token is not None]
    if not known:
        raise ConfigError(
            f"--tokenizer {name_or_path} has neither a start nor an end token, so it is none of a "
            "language model: choose one that has, or train:16384"
        )
    # Where only one of them exists, it stands for both.
    return TextTokenizer(loaded.backend_tokenizer.to_str(), name_or_path, bos_id=known[0], eos_id=known[-1])


def _load_pretrained(name_or_path: str) -> Any:
    from transformers import AutoTokenizer  # takes seconds to import, and few runs need it

    way_out = "check the name or path, or use --tokenizer train:16384"
    is_path = Path(name_or_path).exists() or name_or_path.startswith((".", "/", "~"))
    try:
        return AutoTokenizer.from_pretrained(str(Path(name_or_path).expanduser()), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        if is_path:
            raise ConfigError(f"no tokenizer at {name_or_path} ({_first_line(error)}): {way_out}") from error
    problem = hub_problem()
    if problem:
        raise ConfigError(
            f"--tokenizer {name_or_path} is not on this machine, and the hub does not answer ({problem}): {way_out}"
        )
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot load --tokenizer {name_or_path} ({_first_line(error)}): {way_out}") from error


def hub_problem() -> str | None:
    """Why the hub cannot be asked, or None: one short request in place of a minute of retries."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # of the hub's HTTP client, which is not always the same library
        return _first_line(error)
    return None


def cut_points(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of the pieces, in characters, in which a text is encoded; together they are all of it.

    A piece ends before a single space between two words where there is one in its last half: tokens
    of the GPT-2 kind start there in any case, so that a cut changes none of them. Else it ends at
    any whitespace, else at its greatest length.
    """
    start = 0
    while len(text) - start > PIECE_LENGTH:
        end = start + PIECE_LENGTH
        lowest = end - PIECE_LENGTH // 2
        cut = text.rfind(" ", lowest, end)
        while cut > lowest and (text[cut - 1].isspace() or text[cut + 1].isspace()):
            cut = text.rfind(" ", lowest, cut)
        if cut <= lowest:
            cut = next((at for at in range(end, lowest, -1) if text[at - 1].isspace()), end)
        yield start, cut
        start = cut
    if start < len(text):
        yield start, len(text)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, which "
            "UTF-8 cannot hold: remove it"
        ) from error


def _byte_positions(text: str) -> np.ndarray:
    """int64 [len(text) + 1]: the UTF-8 byte at which each character starts, and the text ends."""
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)])


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
