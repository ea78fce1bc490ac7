"""Generation with retrieval in the loop: what a request needs besides its turn. Knows no Ray.

A GenerationScheduler decodes many requests as they come; `generate` a given few, and waits.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from retro_ray.errors import PromptError
from retro_ray.generation.batch import DecodingBatch
from retro_ray.generation.drafts import DEFAULT_DRAFT_TOKENS, Drafter
from retro_ray.generation.neighbours import ChunkQuery, ChunkSearch, RetrievedChunk, retrieve
from retro_ray.generation.request import GenerationRequest, GenerationResult
from retro_ray.generation.sequence import SequenceState
from retro_ray.model.retro import RetroModel
from retro_ray.text.tokenizer import TextTokenizer


class GenerationEngine:
    """Generates with one model; not for use by several threads at once.

    Args:
        model: in eval mode, on its device, in the dtype to compute in.
        tokenizer: the one that the model was trained with.
        retriever: None: every request runs without retrieval, as if it had turned it off.
        prefetch: ask for a chunk's neighbours when three quarters of it are there, with these as the
            query, so that generation need not stop for them (PipeRAG, Jiang et al. 2024). A chunk
            that the prompt completes is searched for as a whole.
        speculate: tokens that are guessed at most from what was retrieved and from the text itself, and
            then read in one pass; 0: none. Answers are the same; what changes is the time they take.
    """

    def __init__(
        self,
        model: RetroModel,
        tokenizer: TextTokenizer,
        retriever: ChunkSearch | None,
        *,
        prefetch: bool = False,
        speculate: int = DEFAULT_DRAFT_TOKENS,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.retriever = retriever if model.config.cca_layers else None
        self._speculate = speculate
        m = model.config.chunk_length
        self._query_length = prefetch_length(m) if prefetch else m

    def start(self, request: GenerationRequest) -> SequenceState:
        """The request's tokens, checked against the model's limits; nothing is computed yet.

        Raises:
            PromptError: prompt and max_tokens do not fit into the model's context, the prompt has a
                token that the model does not know, or the retriever cannot rerank as asked.
        """
        config = self.model.config
        tokens = self._prompt_tokens(request)
        if len(tokens) + request.max_tokens > config.context_length:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens (the start-of-document token included) and max_tokens is "
                f"{request.max_tokens}, together {len(tokens) + request.max_tokens}: the model's context holds "
                f"{config.context_length}; shorten the prompt or lower max_tokens"
            )
        num_neighbours = 0
        if request.retrieval and self.retriever is not None:
            num_neighbours = request.num_neighbours or config.num_neighbours
            if request.rerank is not None and not _takes(self.retriever, "rerank"):
                raise PromptError(f"rerank is {request.rerank!r}; this retriever does not rerank, leave it out")
        return SequenceState(
            request,
            tokens,
            self.tokenizer,
            chunk_length=config.chunk_length,
            num_neighbours=num_neighbours,
            query_length=self._query_length,
            drafter=Drafter(self._speculate) if self._speculate else None,
        )

    def retrieve(self, queries: Sequence[ChunkQuery]) -> list[RetrievedChunk]:
        """The neighbours of every query.

        Raises:
            RetrievalError: some could not be retrieved.
        """
        assert self.retriever is not None or not queries, "nothing is asked for without a retriever"
        return [] if self.retriever is None else retrieve(self.retriever, queries)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Decode `requests` together; each gets what it would get alone.

        Raises:
            PromptError: a request cannot be served (see `start`).
            RetrievalError: a chunk's neighbours could not be retrieved.
        """
        states = [self.start(request) for request in requests]
        batch = DecodingBatch(self.model, max_batch_size=len(states))
        self._retrieve_for(states)
        if states:
            batch.admit(states, sys.maxsize)
        while batch.active:
            self._retrieve_for(batch.active)
            batch.step()
        return [state.result() for state in states]

    def _prompt_tokens(self, request: GenerationRequest) -> list[int]:
        bos_id, vocab_size = self.tokenizer.bos_id, self.model.config.vocab_size
        if request.prompt_tokens is None:
            return [bos_id, *self.tokenizer.encode(request.prompt).tolist()]
        unknown = next((token for token in request.prompt_tokens if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise PromptError(f"the prompt has token {unknown}; the model's tokens are 0 to {vocab_size - 1}")
        return [*([] if request.prompt_tokens[:1] == (bos_id,) else [bos_id]), *request.prompt_tokens]

    def _retrieve_for(self, states: Sequence[SequenceState]) -> None:
        """Neighbours for all chunks that want them, in as few calls as may be."""
        wanted = [(state, query) for state in states for query in state.take_queries()]
        for (state, _), found in zip(wanted, self.retrieve([query for _, query in wanted]), strict=True):
            state.retrieved.append(found)


def prefetch_length(chunk_length: int) -> int:
    """Tokens of a chunk after which prefetching looks its neighbours up."""
    return max(1, chunk_length * 3 // 4)


def _takes(search: ChunkSearch, option: str) -> bool:
    parameters = inspect.signature(search.retrieve_chunks).parameters.values()
    return any(parameter.name == option or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
