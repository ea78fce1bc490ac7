"""What POST /v1/completions takes. What is not supported is refused by name, never ignored."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from retro_ray.errors import PromptError
from retro_ray.generation.request import MAX_LOGPROBS, MAX_NEIGHBOURS, GenerationRequest, Rerank
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.serve.limits import MAX_CHOICES, MAX_PROMPT_CHARACTERS, MAX_PROMPT_TOKENS

PromptText = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
PromptTokens = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=200)]

_NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
    "user": (None,),
}
"""OpenAI's parameters that are not supported, with the values that ask for nothing: these pass."""


class StrictModel(BaseModel):
    """Neither unknown fields nor silent conversions such as "2" to 2."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(StrictModel):
    """OpenAI's options of a stream."""

    include_usage: bool = False
    """End with a chunk that has the token counts."""


class RetrievalOptions(StrictModel):
    """Ours, beyond OpenAI's format: what this request retrieves."""

    enabled: bool = True
    """False: the model alone (RETRO[OFF])."""
    num_neighbours: int | None = Field(default=None, ge=1, le=MAX_NEIGHBOURS)
    """Neighbours per chunk; default: as many as the model was trained with."""
    rerank: Rerank | None = None
    """`overlap` puts neighbours that share words with the chunk first; default: as the service is set."""


class CompletionRequest(StrictModel):
    """Body of POST /v1/completions. null means the default."""

    model: str | None = None
    """The served model's name; optional, and refused if it is another's."""
    prompt: (
        PromptText
        | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_CHOICES)]
        | PromptTokens
        | Annotated[list[PromptTokens], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    """One text or several, or their tokens; an empty text starts a new document."""
    max_tokens: int = Field(default=16, ge=0)
    """0, with `echo`, scores the prompt."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    """Completions per prompt."""
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] = Field(default_factory=list)
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    """Completion i of a prompt uses seed + i."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Log probabilities of the tokens, and of so many likeliest ones at each place."""
    echo: bool = False
    """Give the prompt back before the completion."""
    stream: bool = False
    """Answer with server-sent events as the text is written."""
    stream_options: StreamOptions | None = None
    top_k: int = Field(default=0, ge=0)
    """Ours: only the k likeliest tokens; 0: all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Ours: only tokens at least this many times as likely as the likeliest one."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    """Ours: above 1, tokens that have occurred become less likely."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Ours: seconds after which the request ends with an error; default: the service's."""
    retrieval: RetrievalOptions = RetrievalOptions()
    """Ours: what is retrieved."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {
            name: value
            for name, value in content.items()
            if value not in _NOTHING_ASKED.get(name, (None,) if name in cls.model_fields else ())
        }

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt, however they were written."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]: the tokens of one prompt
        return self.prompt  # pyright: ignore[reportReturnType]

    def generation_requests(self, max_deadline_s: float) -> list[GenerationRequest]:
        """One per choice: the n completions of the first prompt, then those of the second, ...

        Raises:
            PromptError: there are too many of them, or what they ask for does not go together.
        """
        num_choices = len(self.prompts) * self.n
        if num_choices > MAX_CHOICES:
            raise PromptError(
                f"{len(self.prompts)} prompts x n = {self.n} make {num_choices} completions; "
                f"one request may ask for at most {MAX_CHOICES}"
            )
        if self.deadline_s is not None and self.deadline_s > max_deadline_s:
            raise PromptError(f"deadline_s is {self.deadline_s:g}; this service allows at most {max_deadline_s:g}")
        if self.stream_options is not None and not self.stream:
            raise PromptError("stream_options is set without stream: leave it out, or set stream to true")
        return [
            GenerationRequest(
                prompt=prompt if isinstance(prompt, str) else "",
                prompt_tokens=None if isinstance(prompt, str) else tuple(prompt),
                max_tokens=self.max_tokens,
                sampling=SamplingConfig(
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    min_p=self.min_p,
                    repetition_penalty=self.repetition_penalty,
                    seed=None if self.seed is None else self.seed + i,
                ),
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                logprobs=self.logprobs,
                echo=self.echo,
                retrieval=self.retrieval.enabled,
                num_neighbours=self.retrieval.num_neighbours,
                rerank=self.retrieval.rerank,
                deadline_s=self.deadline_s or max_deadline_s,
            )
            for prompt in self.prompts
            for i in range(self.n)
        ]
