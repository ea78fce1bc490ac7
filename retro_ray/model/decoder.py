"""DECODER of Algorithm 1 as one pass over whole sequences, and the weights of all of RETRO.

Shapes: B sequences, T tokens, L chunks with neighbours, M chunk length, K neighbours per chunk,
R = 2M neighbour length, D width, V vocabulary. N = B * L, all the chunks of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retro_ray.config import ModelConfig
from retro_ray.model.cache import PromptRecorder
from retro_ray.model.chunked import ChunkedCrossAttention, NeighbourEncoding
from retro_ray.model.decoder_layer import DecoderLayer
from retro_ray.model.encoder import EncodedNeighbours, NeighbourEncoder
from retro_ray.model.inputs import SequenceInputs, chunks_with_neighbours, sequence_inputs, split_chunks
from retro_ray.model.pointer import DecoderOutput, NeighbourPointer
from retro_ray.model.rms_norm import RMSNorm, normalise

if TYPE_CHECKING:
    from retro_ray.model.int8_blocks import Int8Decoder, Int8Layer


def belongs_to_retrieval(weight_name: str) -> bool:
    """Whether a weight of a `RetroDecoder` has no part in it without neighbours."""
    return weight_name.startswith(("encoder.", "neighbour_embedding.", "pointer.")) or ".cca." in weight_name


class RetroDecoder(nn.Module):
    """A decoder that reads the neighbours of its earlier chunks; without neighbours, a plain one.

    Logits at position t depend on tokens up to t, and on the neighbours of chunk u (counted from 1)
    only for t >= u * m - 1. A chunk without neighbours, or with all of them masked, contributes
    exactly zero. A model without `cca_layers` ignores neighbours.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        """Recompute the activations of each layer in the backward pass."""
        self.attends_in_blocks = False
        """In training, documents of a sequence are kept apart by FlexAttention, for compiled blocks on a GPU."""
        self.packed_read_out: nn.Module | None = None
        self.int8: Int8Decoder | None = None
        """In place of the layers and READ for new tokens."""
        self.token_embedding = self._new_embedding(config.hidden_dim)
        layers = nn.ModuleList(DecoderLayer(config, number) for number in range(1, config.num_layers + 1))
        self.layers = cast("Sequence[DecoderLayer]", layers)  # a ModuleList forgets its modules' type
        self.norm = RMSNorm(config.hidden_dim, eps=config.norm_eps)
        self.untied_read_out = None if config.tie_embeddings else self._new_embedding(config.hidden_dim)

        # Retrieval last: from the same seed a decoder starts alike with and without it.
        self.first_cca_layer = min(config.cca_layers, default=None)
        self.encoder = NeighbourEncoder(config) if config.cca_layers else None
        own_embedding = config.cca_layers and not config.share_encoder_embedding
        self.neighbour_embedding = self._new_embedding(config.encoder_dim) if own_embedding else None
        for number in config.cca_layers:
            self.layers[number - 1].cca = ChunkedCrossAttention(config)
        self.pointer = NeighbourPointer(config) if config.cca_layers and config.pointer else None

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        neighbours_BLKR: Tensor | None = None,
        neighbour_mask_BLKR: Tensor | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the token after each position, float32 (float64 in a float64 model).

        Args:
            tokens_BT: int64; T need not be a multiple of the chunk length.
            neighbours_BLKR: int64, neighbours [N, F] of the first L <= T // m complete chunks.
            neighbour_mask_BLKR: bool, True for real neighbour tokens. None: all are real.
            segments_BT: int64, a number per packed document; attention, to neighbours too, stays
                inside equal numbers. Negative numbers are padding. None: one document per sequence.

        Raises:
            ConfigError: the neighbours' shape does not fit the tokens or the model.
        """
        output = self.output(
            tokens_BT,
            neighbours_BLKR=neighbours_BLKR,
            neighbour_mask_BLKR=neighbour_mask_BLKR,
            segments_BT=segments_BT,
        )
        return self.read_out(output)

    def output(
        self,
        tokens_BT: Tensor,
        *,
        neighbours_BLKR: Tensor | None = None,
        neighbour_mask_BLKR: Tensor | None = None,
        segments_BT: Tensor | None = None,
    ) -> DecoderOutput:
        """The input of `read_out` for positions [B, T]; arguments as `forward`."""
        h_BTD = self.embed_tokens(tokens_BT)
        inputs = sequence_inputs(
            self.config,
            tokens_BT,
            h_BTD,
            neighbours_BLKR,
            neighbour_mask_BLKR,
            segments_BT,
            in_blocks=self.attends_in_blocks and torch.is_grad_enabled(),
        )
        return self.run_layers(h_BTD, inputs)[0]

    def read_out(self, output: DecoderOutput, *, new_tokens: bool = False) -> Tensor:
        """READ: logits [..., V] of an output [...], position by position, so that a loss can take it in slices.

        `new_tokens`: [N], for which there may be weights of fewer bits than for others.
        """
        hidden = output.hidden
        if new_tokens and self.int8 is not None:
            logits = self.int8.read_out(hidden)
        elif self.packed_read_out is not None:
            logits = self.packed_read_out(hidden)
        else:
            logits = F.linear(hidden, self.read_out_weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if output.pointed is None else output.pointed.mixed_with(logits)

    @property
    def read_out_weight(self) -> Tensor:
        """[V, D]: the token embedding, if tied."""
        return self.token_embedding.weight if self.untied_read_out is None else self.untied_read_out.weight

    @property
    def layers_for_new_tokens(self) -> Sequence[DecoderLayer] | Sequence[Int8Layer]:
        """What new tokens pass through."""
        return self.layers if self.int8 is None else self.int8.layers

    @property
    def encoding(self) -> NeighbourEncoding | None:
        """None where the model ignores neighbours."""
        ccas = {layer.number: layer.cca for layer in self.layers if layer.cca is not None}
        return None if self.encoder is None else NeighbourEncoding(self.encoder, ccas)

    @property
    def encoding_for_new_tokens(self) -> NeighbourEncoding | None:
        """Of neighbours that come with new tokens."""
        return self.encoding if self.int8 is None or self.int8.encoding is None else self.int8.encoding

    def freeze_decoder(self) -> None:
        """RETRO-fitting: from now on encoder and chunked cross-attentions alone are trained, and without
        neighbours the model remains what it is.
        """
        for name, weight in self.named_parameters():
            weight.requires_grad_(belongs_to_retrieval(name))

    def count_parameters(self, include_embeddings: bool = False) -> int:
        """Number of weights; by default without token embeddings and an untied read-out."""
        vocabulary = (self.token_embedding, self.neighbour_embedding, self.untied_read_out)
        left_out = {id(module.weight) for module in vocabulary if module is not None}
        return sum(w.numel() for w in self.parameters() if include_embeddings or id(w) not in left_out)

    def run_layers(
        self, h_BTD: Tensor, inputs: SequenceInputs, recorder: PromptRecorder | None = None
    ) -> tuple[DecoderOutput, EncodedNeighbours | None]:
        """What READ reads after all layers, and E."""
        encoded = None
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h_BTD, encoded = checkpoint(
                    self._apply_layer, layer, h_BTD, encoded, inputs, recorder, use_reentrant=False
                )
            else:
                h_BTD, encoded = self._apply_layer(layer, h_BTD, encoded, inputs, recorder)
        h_BTD, pointed = self.norm(h_BTD), None
        if self.pointer is not None and encoded is not None:
            attending = encoded.attending(h_BTD, self.config.chunk_length)
            pointed = self.pointer(h_BTD, inputs.last_BTW, encoded, attending, inputs.sees_BT)
        return DecoderOutput(h_BTD, pointed), encoded

    def _apply_layer(
        self,
        layer: DecoderLayer,
        h_BTD: Tensor,
        encoded: EncodedNeighbours | None,
        inputs: SequenceInputs,
        recorder: PromptRecorder | None,
    ) -> tuple[Tensor, EncodedNeighbours | None]:
        remember = None if recorder is None else partial(recorder.keys_values, layer.number)
        h_BTD = layer.self_attention(h_BTD, inputs.rotary, mask=inputs.mask, causal=True, remember=remember)
        if layer.number == self.first_cca_layer:
            if recorder is not None:
                recorder.chunk_hidden(h_BTD)
            encoded = self._encode(h_BTD, inputs, leave_out=recorder is None)
        if layer.cca is not None and encoded is not None:
            h_BTD = layer.cca(h_BTD, encoded, inputs.query_rotary, inputs.sees_BT)
        return layer.feed_forward(h_BTD), encoded

    def _encode(self, h_BTD: Tensor, inputs: SequenceInputs, leave_out: bool) -> EncodedNeighbours | None:
        """ENCODER(RET(C_u)_u, H) of all chunks as one batch, which may `leave_out` those without any; None
        without neighbours.
        """
        if self.encoder is None or inputs.neighbours_BLKR is None:
            return None
        neighbours_NKR, mask_BLKR = inputs.neighbours_BLKR.flatten(0, 1), inputs.neighbour_mask_BLKR
        mask_NKR = None if mask_BLKR is None else mask_BLKR.flatten(0, 1)
        h_NMD = split_chunks(h_BTD, inputs.neighbours_BLKR.shape[1], self.config.chunk_length)
        context_mask_NM, num_chunks = inputs.context_mask_NM, len(h_NMD)
        numbers_N = chunks_with_neighbours(mask_NKR) if leave_out else None
        if numbers_N is not None and mask_NKR is not None:
            neighbours_NKR, mask_NKR, h_NMD = neighbours_NKR[numbers_N], mask_NKR[numbers_N], h_NMD[numbers_N]
            context_mask_NM = None if context_mask_NM is None else context_mask_NM[numbers_N]
        encoded = self.encoder(neighbours_NKR, self.embed_neighbours(neighbours_NKR), mask_NKR, h_NMD, context_mask_NM)
        return dataclasses.replace(encoded, numbers_N=numbers_N, num_without=num_chunks - len(h_NMD))

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """EMB."""
        return self._embed(tokens, self.token_embedding, self.config.normalize_embeddings)

    def embed_neighbours(self, neighbours: Tensor) -> Tensor:
        """EMB_enc."""
        normalize = self.config.normalize_embeddings or self.config.normalize_neighbour_embeddings
        return self._embed(neighbours, self.neighbour_embedding or self.token_embedding, normalize)

    def _embed(self, tokens: Tensor, embedding: nn.Embedding, normalize: bool) -> Tensor:
        """Rows of an embedding. Normalised to a mean square of 1, whatever the scale that a tied read-out asks of the
        weights, a token's identity is not swamped by what the layers write next to it.
        """
        h = embedding(tokens)
        return normalise(h, eps=1e-8) if normalize else h

    def _new_embedding(self, dim: int) -> nn.Embedding:
        """A [V, dim] table with starting weights."""
        embedding = nn.Embedding(self.config.vocab_size, dim)
        # A normalised embedding points at its own row of a tied read-out: the logit of the token
        # itself starts at std * dim, which must not grow with the width.
        nn.init.normal_(embedding.weight, std=min(0.02, 4 / dim) if self.config.normalize_embeddings else 0.02)
        return embedding
