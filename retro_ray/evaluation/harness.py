"""RETRO as a model of EleutherAI's lm_eval, by the name `retro`.

Log-likelihoods are those of jobs/evaluate.py: a text is a document of its own, read in windows of whole chunks, its
chunks' neighbours are retrieved from the database, and of a window only new tokens are scored.

Versions of lm_eval that look for plugins find the class by the package's entry point; for those that do not there is
`python -m retro_ray.lm_eval`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from retro_ray.config import Precision, default_home
from retro_ray.database.store import Database
from retro_ray.errors import ConfigError
from retro_ray.evaluation.bits_per_byte import RetrievalMode
from retro_ray.evaluation.text_scorer import TextScorer
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.request import GenerationRequest
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.precision import resolve_precision
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.retriever import ChunkRetriever, open_embedder
from retro_ray.training.checkpoint import load_model
from retro_ray.training.run_folder import run_directory

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_NOT_OURS = ("max_batch_size",)
"""What lm_eval gives every model."""
_ARGUMENTS = "home, run, retrieval, num_neighbours, precision, batch_size, device and max_gen_toks"


@register_model("retro")
class RetroLM(TemplateLM):
    """A run's newest checkpoint in front of its home's database.

    Args:
        home: of the database and the run; default: $RETRO_RAY_HOME, or ~/.retro_ray.
        run: its name.
        retrieval: on, off, or random: the control with chunks drawn at random.
        num_neighbours: per chunk; default: as many as in training.
        precision: of the arithmetic: auto, bf16 or fp32; int8 is bf16 here.
        batch_size: windows per forward pass, texts generated together.
        device: of a machine with GPUs; default: the first.
        max_gen_toks: tokens generated for tasks that do not say how many.

    Raises:
        ConfigError: an argument that there is not, or a value that cannot be.
        DatabaseError: the home has no database.
        CheckpointError: the run has no checkpoint.
        MismatchError: model and database do not belong together.
    """

    def __init__(
        self,
        home: str | None = None,
        run: str = "default",
        retrieval: str | bool = "on",
        num_neighbours: int | None = None,
        precision: str = "auto",
        batch_size: int | str = 8,
        device: str | None = None,
        max_gen_toks: int = 128,
        **others: Any,
    ) -> None:
        super().__init__()
        for name in others:
            if name not in _NOT_OURS:
                raise ConfigError(f"unknown model argument {name}={others[name]}: there are {_ARGUMENTS}")
        if isinstance(retrieval, bool):  # lm_eval reads true and false
            retrieval = "on" if retrieval else "off"
        mode = _chosen("retrieval", retrieval, get_args(RetrievalMode))
        self._max_gen_toks = max_gen_toks
        self._batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        # lm_eval's own default is cuda:0, on every machine.
        self._device = torch.device((device or "cuda") if torch.cuda.is_available() else "cpu")
        self._precision: Precision = _chosen("precision", precision, get_args(Precision))
        self._retrieves = mode == "on"
        self._num_neighbours = num_neighbours
        path = Path(home).expanduser().absolute() if home else default_home()
        self._database = Database.open(path)
        self._model, _, _ = load_model(run_directory(path, run), self._database.manifest, self._device)
        self._model.eval()
        self._scorer = TextScorer(
            self._model,
            self._database,
            lambda: open_embedder(self._database, self._device),
            mode=mode,
            num_neighbours=num_neighbours,
            batch_size=self._batch_size,
            precision=self._precision,
        )

    @property
    def eot_token_id(self) -> int:
        return self._database.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._database.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._database.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        ids = self._database.tokenizer.encode(string).tolist()
        return [self.prefix_token_id, *ids] if add_special_tokens else ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        values = self._scorer.score_texts(texts).tolist()
        for text, value in zip(texts, values, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return values

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        answers = self._scorer.score_continuations([(context, continuation) for _, context, continuation in requests])
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for start in tqdm(range(0, len(requests), self._batch_size), desc="generate", disable=disable_tqdm):
            asked = [request.args for request in requests[start : start + self._batch_size]]
            results = self._engine.generate([self._generation_request(*arguments) for arguments in asked])
            texts += [result.text for result in results]
            for arguments, result in zip(asked, results, strict=True):
                self.cache_hook.add_partial("generate_until", arguments, result.text)
        return texts

    def _generation_request(self, context: str, gen_kwargs: dict[str, Any]) -> GenerationRequest:
        """What lm_eval asks for; of a context that is too long, the end is kept."""
        options: dict[str, Any] = {**normalize_gen_kwargs(gen_kwargs, self._max_gen_toks)}
        max_tokens, until = int(options.pop("max_gen_toks")), options.pop("until")
        if not options.pop("do_sample"):
            options["temperature"] = 0.0
        sampling = {name: options.pop(name) for name in _SAMPLING if name in options}
        if options:
            raise ConfigError(f"unknown generation arguments {options}; there are {', '.join(_SAMPLING)}")
        room = self._model.config.context_length - 1 - max_tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks is {max_tokens}; the model's context holds {self._model.config.context_length} tokens"
            )
        return GenerationRequest(
            prompt_tokens=tuple(self.tok_encode(context)[-room:]),
            max_tokens=max_tokens,
            # lm_eval seeds torch: the same run gives the same text, a repetition within it another one.
            sampling=SamplingConfig(**sampling, seed=int(torch.randint(1 << 62, ()))),
            stop=tuple(stop for stop in until if stop),
            retrieval=self._retrieves and self._num_neighbours != 0,
            num_neighbours=self._num_neighbours or None,
        )

    @cached_property
    def _engine(self) -> GenerationEngine:
        model = self._model
        if resolve_precision(self._precision, self._device) != "fp32":
            model = copy.deepcopy(model).bfloat16()
        retriever = None
        if self._retrieves:
            retriever = ChunkRetriever.open(self._database, LocalRetriever.open(self._database), self._device)
        return GenerationEngine(model, self._database.tokenizer, retriever)


def _chosen(name: str, value: Any, known: Sequence[str]) -> Any:
    if value not in known:
        raise ConfigError(f"model argument {name} is {value!r}; it must be one of {', '.join(known)}")
    return value
