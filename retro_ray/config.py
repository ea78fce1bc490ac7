"""Every setting of retro_ray, one frozen dataclass per concern.

The string under a field is its documentation and its `--help`. Derived values are properties, so
that they follow what they derive from.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from retro_ray.errors import ConfigError

RerankMethod = Literal["none", "overlap"]
RetrievalPolicy = Literal["wait", "partial", "fail"]
CcaStart = Literal["paper", "copy"]
OptimizerName = Literal["adamw", "muon"]
Parallel = Literal["ddp", "fsdp"]
Precision = Literal["auto", "int8", "bf16", "fp32"]
Compile = Literal["auto", "yes", "no"]


def default_home() -> Path:
    """`$RETRO_RAY_HOME`, else `~/.retro_ray`; absolute, so that no working directory matters."""
    return Path(os.environ.get("RETRO_RAY_HOME") or "~/.retro_ray").expanduser().absolute()


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """How the records of a file become documents."""

    text_column: str = "text"
    """Column or key that holds a document's text."""
    id_column: str | None = None
    """Column or key that holds a document's id. Default: `id` where there is one, else made from
    source and position."""
    title_column: str = "title"
    """Column or key that holds a document's title, where there is one."""
    on_error: Literal["skip", "fail"] = "skip"
    """A record that cannot be read is skipped, counted and reported; or ends the job."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(RecordConfig):
    """Which documents to read, and how."""

    input: tuple[str, ...] = ("python-docs",)
    """Files, folders and globs, local or s3://, of Parquet, JSON lines (.jsonl, .json, also .gz and
    .zst), plain text and Markdown; or `python-docs`, the documentation that this Python carries."""
    share: float = 1.0
    """Take in only this share of the documents, chosen by a hash of their id: to try things quickly."""

    def __post_init__(self) -> None:
        _require(0 < self.share <= 1, "--share", self.share, "above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class DatabaseConfig:
    """How documents become a retrieval database."""

    tokenizer: str = "train:16384"
    """`train:N` trains a byte-level BPE with N entries on the corpus; else the name or path of a
    Hugging Face tokenizer."""
    chunk_length: int = 64
    """Tokens per chunk (m)."""
    embedder: str = "all-MiniLM-L6-v2"
    """Frozen BERT that embeds chunks: the built-in one, or a Hugging Face name or path."""
    num_shards: int | None = None
    """Index shards; one actor serves each. Default: 2, and one more for every 16 GB of text."""
    num_neighbours: int = 10
    """Neighbours stored for every chunk; training uses the first few of them."""
    validation_share: float = 0.05
    """Share of the documents, by a hash of their id, held out of the database for validation."""
    target_recall: float = 0.95
    """Share of the exact 10 nearest neighbours that the index is to find; 1 searches exactly, however slowly."""
    bytes_per_chunk: int | None = None
    """Most memory that an index may take per chunk, its keys not counted. Default: what the fastest codes take, some
    dozens of bytes. Where it is set so high that a graph fits (3,456 for keys of 384 dimensions), one is tried: twice
    as fast, but a shard's own, so that in other shards, or another build, other neighbours may be missed."""
    exclude_near: tuple[str, ...] = ()
    """Leave out documents that are nearly the same as one of these files, folders and globs, a test set say: whose
    13-grams of tokens overlap with its by 80 % or more."""
    seed: int = 0
    """Of the held-out choice and of the index training sample."""
    rerank: RerankMethod = "none"
    """`overlap`: of the nearest chunks, those that share most words with the query become its
    neighbours; searches in this database then do the same, unless told otherwise."""
    num_rerank_candidates: int = 50
    """Nearest chunks from which reranking chooses."""

    def __post_init__(self) -> None:
        _require(self.chunk_length >= 2, "--chunk-length", self.chunk_length, "at least 2")
        _require(self.num_rerank_candidates >= 1, "--num-rerank-candidates", self.num_rerank_candidates, "at least 1")
        _require(self.num_shards is None or self.num_shards >= 1, "--num-shards", self.num_shards, "at least 1")
        _require(self.num_neighbours >= 1, "--num-neighbours", self.num_neighbours, "at least 1")
        _require(0 <= self.validation_share < 1, "--validation-share", self.validation_share, "0 or more, under 1")
        _require(0 < self.target_recall <= 1, "--target-recall", self.target_recall, "above 0, at most 1")
        _require(
            self.bytes_per_chunk is None or self.bytes_per_chunk >= 1,
            "--bytes-per-chunk",
            self.bytes_per_chunk,
            "at least 1",
        )
        _require(0 <= self.seed < 1 << 64, "--seed", self.seed, "0 or more, under 2**64")
        if self.tokenizer.startswith("train:"):
            size = self.tokenizer.removeprefix("train:")
            # 256 bytes and one special token are the floor of a byte-level BPE.
            _require(size.isdigit() and int(size) >= 257, "--tokenizer", self.tokenizer, "train:N with N at least 257")


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How a database is searched through the actors of its shards."""

    num_replicas: int = 1
    """Actors that serve each shard, on different nodes where there are several."""
    timeout_s: float = 30.0
    """A replica that takes longer to answer is given up for another one."""
    policy: RetrievalPolicy = "wait"
    """Where no replica of a shard answers: wait for one, answer without the shard and say so
    (partial), or fail."""
    mmap: bool = False
    """Leave indexes and keys on disk and read what is looked at: for a database larger than memory.
    A graph (jobs/index.py --bytes-per-chunk) is read into memory all the same. Actors that run already stay as they
    are."""
    rerank: RerankMethod | None = None
    """How neighbours are reordered; default: as those were that the database stores."""
    num_rerank_candidates: int | None = None
    """Nearest chunks from which reranking chooses; default: as for those that the database stores."""

    def __post_init__(self) -> None:
        _require(self.num_replicas >= 1, "num_replicas", self.num_replicas, "at least 1")
        _require(self.timeout_s > 0, "timeout_s", self.timeout_s, "above 0")
        number = self.num_rerank_candidates
        _require(number is None or number >= 1, "num_rerank_candidates", number, "at least 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a RETRO model; symbols in parentheses are the paper's."""

    vocab_size: int
    """Token ids the model knows."""
    chunk_length: int = 64
    """Tokens per chunk (m)."""
    num_chunks: int = 32
    """Chunks per sequence (l)."""
    hidden_dim: int = 896
    """Width of the decoder (d)."""
    num_layers: int = 12
    """Decoder layers (L)."""
    num_heads: int = 16
    """Attention heads, everywhere in the decoder."""
    num_kv_heads: int | None = None
    """Heads of the keys and values of the decoder's self-attention, each for num_heads / num_kv_heads
    heads of queries (grouped-query attention). None: as many as num_heads."""
    head_dim: int = 64
    """Width of one head."""
    ffn_dim: int = 3584
    """Inner width of the decoder's feed-forward blocks."""
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    """The decoder's feed-forward blocks: two matrices around a GELU, or three with a SiLU gate, as in Llama."""
    attention_bias: bool = False
    """The projections of the decoder's self-attention have biases."""
    qk_norm: bool = False
    """RMS-normalise each head's queries and keys in the decoder's self-attention, as in Qwen3."""
    cca_layers: tuple[int, ...] = (6, 9, 12)
    """Decoder layers, counted from 1, with chunked cross-attention (P); empty: no retrieval."""
    encoder_dim: int = 896
    """Width of the neighbour encoder (d')."""
    encoder_layers: int = 2
    """Layers of the neighbour encoder (L_enc)."""
    encoder_heads: int = 16
    """Heads of the encoder's attentions, each `head_dim` wide."""
    encoder_ffn_dim: int = 3584
    """Inner width of the encoder's feed-forward blocks."""
    encoder_ca_layers: tuple[int, ...] = (1,)
    """Encoder layers, counted from 1, that attend to the decoder's activations (P_enc)."""
    num_neighbours: int = 2
    """Neighbours per chunk in training (k); any number works afterwards."""
    share_encoder_embedding: bool = False
    """The encoder uses the decoder's token embedding; needs encoder_dim == hidden_dim."""
    normalize_embeddings: bool = False
    """RMS-normalise input embeddings, so that a token's identity is not swamped early in training."""
    normalize_neighbour_embeddings: bool = False
    """The same for the encoder alone, under a decoder that was pretrained without."""
    cca_start: CcaStart = "paper"
    """Start of chunked cross-attention: the paper's (an output of zero), or one that copies: keys
    from the previous neighbour token, key projection = query projection, output projection =
    0.3 x transposed value projection, and one null key to attend to nothing."""
    pointer: bool = False
    """Neighbour tokens that a position points at are a part of the output's distribution, beside the softmax over the
    vocabulary (a pointer sentinel mixture, Merity et al. 2016)."""
    pointer_max_ngram: int = 8
    """The pointer is told how many of a position's last tokens, up to so many, stand in front of a neighbour token too.
    0: it is not."""
    tie_embeddings: bool = True
    """The read-out shares its weights with the input embedding."""
    rope_base: float = 10_000.0
    """Base of the rotary positions."""
    rope_frequencies: tuple[float, ...] = ()
    """Angle per position of each of the head_dim / 2 rotary pairs in the decoder's self-attention.
    Empty: from rope_base, as everywhere else."""
    rope_magnitude: float = 1.0
    """The decoder's own rotations stretch queries and keys by this factor, as YaRN's do."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values of the decoder's self-attention."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def neighbour_length(self) -> int:
        """Tokens of a neighbour [N, F] (r)."""
        return 2 * self.chunk_length

    @property
    def context_length(self) -> int:
        """Tokens per sequence (n)."""
        return self.num_chunks * self.chunk_length

    def __post_init__(self) -> None:
        for name in ("vocab_size", "chunk_length", "num_chunks", "hidden_dim", "num_layers", "num_heads", "ffn_dim"):
            value = getattr(self, name)
            _require(value >= 1, name, value, "at least 1")
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even, for rotary positions")
        # Matches are counted in bytes.
        _require(0 <= self.pointer_max_ngram <= 127, "pointer_max_ngram", self.pointer_max_ngram, "from 0 to 127")
        divides = self.kv_heads >= 1 and self.num_heads % self.kv_heads == 0
        _require(divides, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads ({self.num_heads})")
        num_pairs = self.head_dim // 2
        _require(
            len(self.rope_frequencies) in (0, num_pairs),
            "the number of rope_frequencies",
            len(self.rope_frequencies),
            f"head_dim / 2 = {num_pairs}, or 0",
        )
        for name, layers, last in (
            ("cca_layers", self.cca_layers, self.num_layers),
            ("encoder_ca_layers", self.encoder_ca_layers, self.encoder_layers),
        ):
            inside = all(1 <= layer <= last for layer in layers) and list(layers) == sorted(set(layers))
            _require(inside, name, layers, f"ascending layer numbers from 1 to {last}")
        if self.share_encoder_embedding and self.encoder_dim != self.hidden_dim:
            raise ConfigError(
                f"share_encoder_embedding needs encoder_dim ({self.encoder_dim}) == hidden_dim ({self.hidden_dim}): "
                "set both alike, or share_encoder_embedding = False"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained."""

    num_steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 8
    """Sequences per optimiser step, over all workers."""
    micro_batch_size: int = 4
    """Sequences per forward pass of one worker; more of a worker's share accumulate gradients."""
    learning_rate: float = 2e-4
    """Highest learning rate."""
    final_learning_rate_share: float = 0.1
    """The cosine ends at this share of the highest learning rate."""
    num_warmup_steps: int = 750
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """On matrices; not on norms and vectors."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    optimizer: OptimizerName = "adamw"
    """`muon` uses Muon for the matrices inside the blocks and AdamW for all else."""
    trained: Literal["all", "retrieval"] = "all"
    """`retrieval`: encoder and chunked cross-attentions alone (RETRO-fitting), so that the model without
    neighbours stays what it was."""
    retrieval_dropout: float = 0.0
    """Share of training sequences that see no neighbours, so that RETRO[OFF] stays good."""
    final_retrieval_dropout: float | None = None
    """The share at the last step, up to which it changes evenly. Default: it stays."""
    plain_loss_share: float = 0.8
    """With a pointer: the share of what is minimised that is the loss of the softmax over the vocabulary alone, which
    otherwise would not learn what can be copied."""
    parallel: Parallel = "ddp"
    """Each worker has the whole model (DDP), or with gradients and the optimiser's state a part of it
    (FSDP), for models that one worker cannot hold. A run may change it when it is resumed."""
    precision: Precision = "auto"
    """`bf16`: products in bf16, weights in fp32. `int8`: the same, but wide layers and the read-out are trained in
    products of eight bits (int8_training.py), for CPUs that multiply those fastest. `auto`: the fastest here."""
    compile: Compile = "auto"
    """Compile the model's blocks (torch.compile): half a minute before the first step, and faster ones. `auto`: on a
    GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""
    evaluate_every: int = 500
    """Steps between validations; there is always one at the end."""
    num_evaluation_chunks: int = 2_000
    """Chunks of the validation split scored at each validation during training."""
    seed: int = 0
    """Of initialisation, data order and retrieval dropout."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "micro_batch_size", "checkpoint_every", "evaluate_every"):
            value = getattr(self, name)
            _require(value >= 1, name, value, "at least 1")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        _require(0 <= self.retrieval_dropout <= 1, "retrieval_dropout", self.retrieval_dropout, "from 0 to 1")
        _require(0 <= self.plain_loss_share <= 1, "plain_loss_share", self.plain_loss_share, "from 0 to 1")
        final = self.final_retrieval_dropout
        _require(final is None or 0 <= final <= 1, "final_retrieval_dropout", final, "from 0 to 1")

    def retrieval_dropout_at(self, step: int) -> float:
        """The share of sequences without neighbours at a step, counted from 0."""
        if self.final_retrieval_dropout is None:
            return self.retrieval_dropout
        progress = step / max(1, self.num_steps - 1)
        return self.retrieval_dropout + progress * (self.final_retrieval_dropout - self.retrieval_dropout)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of a training run: what a recipe returns and what a checkpoint records."""

    recipe: str
    model: ModelConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)
    base: str | None = None
    """With RETRO-fitting: the pretrained model that the run started from."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RunConfig:
        """The config that `to_dict` (through JSON) came from."""
        model: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content["model"].items()
        }
        return cls(
            recipe=content["recipe"],
            model=ModelConfig(**model),
            training=TrainingConfig(**content["training"]),
            base=content.get("base"),
        )


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
