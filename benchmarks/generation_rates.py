"""Rates of generation, ours and others', each measured by a function of its own.

Time per token is the difference between answers of many tokens and of one: what reading the prompts
takes is in both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retro_ray.config import ModelConfig
from retro_ray.errors import ConfigError
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.events import Finished, TextDelta
from retro_ray.generation.request import GenerationRequest, GenerationResult
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.generation.scheduler import GenerationScheduler
from retro_ray.generation.stats import SchedulerStats
from retro_ray.model.retro import RetroModel

GREEDY = SamplingConfig(temperature=0.0)


Computed = TypeVar("Computed")


def in_own_thread(compute: Callable[[], Computed]) -> Computed:
    """As one contender among others: its OpenMP threads end with the thread, and slow no other one down."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(compute).result()


def random_model(config: ModelConfig, eos_id: int) -> RetroModel:
    """Random weights, under which no text ends before it is as long as asked for."""
    torch.manual_seed(0)
    model = RetroModel(config).eval()
    with torch.no_grad():
        model.token_embedding.weight[eos_id] = 0
    return model


def num_decoder_weights(model: RetroModel) -> int:
    """Weights that decoding one token reads: neighbours have been encoded before."""
    layers = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if name.startswith("layers.") and ".cca.key" not in name and ".cca.value" not in name
    )
    return layers + model.read_out_weight.numel()


def read_bandwidth(num_bytes: int = 1 << 30) -> float:
    """Bytes per second at which a large bf16 tensor is read, with all threads."""
    tensor = torch.ones(num_bytes // 2, dtype=torch.bfloat16)
    reads = (tensor.sum, tensor.view(torch.int64).sum, tensor.max)
    return max(num_bytes / _seconds(read) for read in reads for _ in range(3))


@dataclass(frozen=True)
class Answers:
    """To requests that were made at the same time."""

    seconds: float
    """Until the last of them ended."""
    results: tuple[GenerationResult, ...]
    begun: SchedulerStats
    """When each had its first token."""
    ended: SchedulerStats

    @property
    def retrieval_hidden_share(self) -> float:
        """Of the retrieval for what was generated; 0 if there was none."""
        retrieval_s = self.ended.retrieval_s - self.begun.retrieval_s
        return 1 - (_stalled_s(self.ended) - _stalled_s(self.begun)) / retrieval_s if retrieval_s > 0 else 0.0


def answer(
    scheduler: GenerationScheduler, prompts: Sequence[Sequence[int]], num_tokens: int, retrieval: bool = True
) -> Answers:
    """Continue all `prompts` at once, greedily."""
    begun: dict[int, SchedulerStats] = {}

    async def follow(index: int) -> GenerationResult:
        request = GenerationRequest(
            prompt_tokens=tuple(prompts[index]), max_tokens=num_tokens, retrieval=retrieval, sampling=GREEDY
        )
        async with contextlib.aclosing(scheduler.stream(request)) as events:
            async for event in events:
                if isinstance(event, (TextDelta, Finished)) and index not in begun:
                    begun[index] = scheduler.stats()
                if isinstance(event, Finished):
                    return event.result
        raise AssertionError("a stream ends with Finished or an error")

    async def follow_all() -> list[GenerationResult]:
        return await asyncio.gather(*map(follow, range(len(prompts))))

    start = time.perf_counter()
    results = asyncio.run(follow_all())
    seconds = time.perf_counter() - start
    *_, last_begun = begun.values()
    return Answers(seconds, tuple(results), last_begun, scheduler.stats())


@dataclass(frozen=True)
class Streams:
    """Requests that were decoded at the same time."""

    tokens_per_s: float
    """From the first request until the last answer, without what their prompts and first tokens took."""
    answers: Answers


def decode_streams(
    engine: GenerationEngine, prompts: Sequence[Sequence[int]], num_tokens: int, retrieval: bool
) -> Streams:
    """The rate at which all `prompts` are continued at once by a scheduler that has done so before, as a service's."""
    with contextlib.closing(GenerationScheduler(engine, max_batch_size=len(prompts))) as scheduler:
        answer(scheduler, prompts, num_tokens + 1, retrieval)
        prompt_s = answer(scheduler, prompts, 1, retrieval).seconds
        answers = answer(scheduler, prompts, num_tokens + 1, retrieval)
    num_decoded = sum(len(result.token_ids) - 1 for result in answers.results)
    return Streams(num_decoded / (answers.seconds - prompt_s), answers)


def answer_alone(engine: GenerationEngine, prompt: Sequence[int], num_tokens: int) -> Answers:
    """Continue one prompt by a scheduler that has done nothing before."""
    with contextlib.closing(GenerationScheduler(engine, max_batch_size=1)) as scheduler:
        return answer(scheduler, [prompt], num_tokens)


def _stalled_s(stats: SchedulerStats) -> float:
    """Seconds of retrieval in which nothing was decoded."""
    return (1 - stats.retrieval_hidden_share) * stats.retrieval_s


def llama_like(config: ModelConfig) -> LlamaForCausalLM:
    """A Llama in bf16 with as many weights as the decoder without cross-attention: its feed-forward block has
    three matrices.
    """
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_dim,
            intermediate_size=config.ffn_dim * 2 // 3,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context_length,
            tie_word_embeddings=True,
        )
    )
    llama.generation_config.eos_token_id = None
    llama.generation_config.pad_token_id = 0
    return llama.bfloat16().eval()


def llama_tokens_per_s(llama: LlamaForCausalLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
    """Of transformers' own generate with its KV cache, as many streams as prompts, which are equally long."""
    tokens = torch.tensor([list(prompt) for prompt in prompts], device=llama.device)

    def generate(count: int) -> None:
        made = llama.generate(tokens, max_new_tokens=count, do_sample=False, use_cache=True)  # pyright: ignore
        assert made.shape[1] == tokens.shape[1] + count, "it ended early"

    generate(2)  # warms up
    return tokens.shape[0] * num_tokens / (_seconds(lambda: generate(num_tokens + 1)) - _seconds(lambda: generate(1)))


def retro_pytorch_tokens_per_s(python: Path, config: ModelConfig, context: int, num_tokens: int) -> dict[str, float]:
    """retro-pytorch's own generate up to `context` tokens, one stream: in float32, and under bf16 autocast.

    Raises:
        ConfigError: it is not installed in the environment of `python`.
    """
    if not python.exists():
        raise ConfigError(f"--peers-python is {python}, which is not there: run make .venv-peers/.installed")
    settings = {
        "vocab-size": config.vocab_size,
        "dim": config.hidden_dim,
        "layers": config.num_layers,
        "chunk-length": config.chunk_length,
        "neighbours": config.num_neighbours,
        "context": context,
        "tokens": num_tokens,
        "threads": os.cpu_count() or 1,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    script = Path(__file__).with_name("retro_pytorch_generation.py")
    command = [str(python), str(script), *flags, "--cca-layers", *map(str, config.cca_layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["tokens_per_s"]


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
