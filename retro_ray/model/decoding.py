"""Algorithm 1 with a cache: a pass over prompts, and over a few new tokens of many sequences.

Shapes: B slots, T tokens of a prompt, L chunks, N new tokens of all slots, K neighbours, R neighbour
length, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retro_ray.errors import ConfigError
from retro_ray.model.cache import DecodeCache, PromptRecorder
from retro_ray.model.chunked import NeighbourEncoding
from retro_ray.model.decoder import RetroDecoder
from retro_ray.model.encoder import EncodedNeighbours
from retro_ray.model.inputs import sequence_inputs
from retro_ray.model.new_tokens import NewTokens, PassShape, plan_pass
from retro_ray.model.pass_graph import PassStages
from retro_ray.model.pointer import DecoderOutput


def read_prompts(
    model: RetroDecoder,
    tokens_BT: Tensor,
    lengths_B: Tensor,
    cache: DecodeCache,
    neighbours_BLKR: Tensor | None,
    mask_BLKR: Tensor | None,
    slots_B: Tensor | None,
) -> list[DecoderOutput]:
    """`RetroModel.prefill_outputs`."""
    cache.require_room(tokens_BT.shape[1], 0 if neighbours_BLKR is None else neighbours_BLKR.shape[2])
    lengths_B = lengths_B.cpu()
    if not bool(((lengths_B >= 1) & (lengths_B <= tokens_BT.shape[1])).all()):
        raise ConfigError(f"prompt lengths {lengths_B.tolist()} must be from 1 to {tokens_BT.shape[1]}")
    slots_B = (torch.arange(len(tokens_BT)) if slots_B is None else slots_B).to(tokens_BT.device)
    cache.reset(slots_B)
    cache.make_room(int(slots_B.max()) + 1, int(lengths_B.max()))
    if tokens_BT.device.type != "cpu":
        output = _read_together(model, tokens_BT, lengths_B, cache, neighbours_BLKR, mask_BLKR, slots_B)
        return [output[b, :length] for b, length in enumerate(lengths_B.tolist())]
    # A CPU gains nothing from several at once. Alone, a prompt gives the same to the bit whatever comes with it.
    outputs = []
    for b, length in enumerate(lengths_B.tolist()):
        here, num_chunks = slice(b, b + 1), length // model.config.chunk_length
        output = _read_together(
            model,
            tokens_BT[here, :length],
            lengths_B[here],
            cache,
            None if neighbours_BLKR is None else neighbours_BLKR[here, :num_chunks],
            None if mask_BLKR is None else mask_BLKR[here, :num_chunks],
            slots_B[here],
        )
        outputs.append(output[0])
    return outputs


def _read_together(
    model: RetroDecoder,
    tokens_BT: Tensor,
    lengths_B: Tensor,
    cache: DecodeCache,
    neighbours_BLKR: Tensor | None,
    mask_BLKR: Tensor | None,
    slots_B: Tensor,
) -> DecoderOutput:
    h_BTD = model.embed_tokens(tokens_BT)
    inputs = sequence_inputs(model.config, tokens_BT, h_BTD, neighbours_BLKR, mask_BLKR, None)
    recorder = PromptRecorder(cache, slots_B, lengths_B, model.config.chunk_length)
    output, encoded = model.run_layers(h_BTD, inputs, recorder)
    if encoded is not None and model.encoding is not None:
        _store(model, model.encoding, cache, *recorder.newest_chunks(encoded))
    cache.write_tokens(slots_B[:, None], torch.arange(tokens_BT.shape[1], device=tokens_BT.device), tokens_BT)
    cache.lengths[slots_B.cpu()] = lengths_B
    return output


def read_new_tokens(
    model: RetroDecoder,
    tokens_N: Tensor,
    num_new: Sequence[int],
    cache: DecodeCache,
    neighbours_BKR: Tensor | None,
    mask_BKR: Tensor | None,
    arrived_B: Tensor | None,
) -> Tensor:
    """`RetroModel.decode_tokens`."""
    lengths: list[int] = cache.lengths[: len(num_new)].tolist()
    longest = max((length + count for length, count in zip(lengths, num_new, strict=True) if count), default=0)
    cache.require_room(longest, 0 if neighbours_BKR is None else neighbours_BKR.shape[1])
    m = model.config.chunk_length
    _require_one_chunk(m, lengths, num_new)
    completed = [slot for slot, count in enumerate(num_new) if count and (lengths[slot] + 1) % m == 0]
    tokens, read, kept_rows = tokens_N.tolist(), num_new, None
    if cache.pass_graphs is not None and not all(num_new):
        tokens, read, kept_rows = _with_pausing_slots(tokens, lengths, num_new, cache.max_tokens)
    cache.make_room(len(read), max(length + count for length, count in zip(lengths, read, strict=True)))
    device = model.token_embedding.weight.device
    shape, numbers = plan_pass(tokens, lengths, read, None if device.type == "cpu" else cache.held_rows)
    graphs = cache.pass_graphs
    stages = PassStages(numbers, device) if graphs is None else graphs.stages(shape, numbers, device)
    new, h_ND = stages.do("up to neighbours", lambda: _up_to_neighbours(model, shape, stages.numbers_X, cache))
    if completed:
        _exchange_neighbours(model, cache, completed, neighbours_BKR, mask_BKR, arrived_B)
    with_neighbours = "from neighbours on", cache.num_rows_to_see(len(read))
    logits_NV = stages.do(with_neighbours, lambda: _from_neighbours_on(model, shape.num_slots, new, h_ND, cache))
    cache.lengths[: len(num_new)] += torch.tensor(num_new)
    if kept_rows is not None:
        return logits_NV[torch.tensor(kept_rows, device=device)]
    return logits_NV if graphs is None else logits_NV.clone()


def most_new_tokens(length: int, chunk_length: int) -> int:
    """How many tokens a slot of `length` tokens may get in one pass: those in front of the one that completes a chunk;
    or that one, and those in front of the next such.
    """
    return (-length - 1) % chunk_length or chunk_length


def _with_pausing_slots(
    tokens: Sequence[int], lengths: Sequence[int], num_new: Sequence[int], max_tokens: int
) -> tuple[list[int], list[int], list[int]]:
    """A token, any, for each slot that has none, so that passes differ less in shape: it is overwritten by that which
    will have its place.

    Returns:
        All tokens, how many are each slot's, and the rows of those that mean something.
    """
    given, read, kept_rows = iter(tokens), [], []
    filled: list[int] = []
    for length, count in zip(lengths, num_new, strict=True):
        kept_rows += range(len(filled), len(filled) + count)
        filled += [next(given) for _ in range(count)]
        pauses = count == 0 and length < max_tokens
        filled += [0] * pauses
        read.append(1 if pauses else count)
    return filled, read, kept_rows


def _up_to_neighbours(
    model: RetroDecoder, shape: PassShape, numbers_X: Tensor, cache: DecodeCache
) -> tuple[NewTokens, Tensor]:
    """The new tokens, and their activations [N, D] where neighbours come in: in the first layer that has
    cross-attention; in front of all where none has.

    Keys, values and activations are in the cache then, at places that had nothing.
    """
    weight = model.token_embedding.weight
    new = shape.place(model.config, numbers_X, weight.dtype)
    cache.write_tokens(new.slots_N, new.positions_N, new.tokens_N)
    h_ND = model.embed_tokens(new.tokens_N)
    if model.first_cca_layer is None:
        return new, h_ND
    for layer in model.layers_for_new_tokens[: model.first_cca_layer]:
        h_ND = layer.self_attention.step(h_ND, new, cache.keys[layer.number - 1], cache.values[layer.number - 1])
        if layer.number < model.first_cca_layer:
            h_ND = layer.feed_forward(h_ND)
    # First tokens may complete a chunk. Those behind belong to the next one, in the same rows.
    first = new.first_rows
    rows_N = new.positions_N[first] % model.config.chunk_length
    cache.chunk_hidden[new.slots_N[first], rows_N] = h_ND[first].to(cache.chunk_hidden.dtype)
    return new, h_ND


def _from_neighbours_on(
    model: RetroDecoder, num_slots: int, new: NewTokens, h_ND: Tensor, cache: DecodeCache
) -> Tensor:
    """Logits [N, V]."""
    if model.first_cca_layer is not None and len(new.first_rows) < len(h_ND):
        rows_N = new.positions_N % model.config.chunk_length
        cache.chunk_hidden[new.slots_N, rows_N] = h_ND.to(cache.chunk_hidden.dtype)
    refusal_BS = cache.refused_rows(num_slots)
    for layer in model.layers_for_new_tokens[(model.first_cca_layer or 1) - 1 :]:
        number = layer.number
        if number != model.first_cca_layer:
            h_ND = layer.self_attention.step(h_ND, new, cache.keys[number - 1], cache.values[number - 1])
        if layer.cca is not None and refusal_BS is not None:
            h_ND = layer.cca.step(h_ND, new, cache.cca_keys[number], cache.cca_values[number], refusal_BS)
        h_ND = layer.feed_forward(h_ND)
    h_ND, pointed = model.norm(h_ND), None
    if model.pointer is not None and refusal_BS is not None:
        last_NW = cache.last_tokens(new.slots_N, new.positions_N)
        pointed = model.pointer.step(h_ND, last_NW, cache.pointed_rows(new.slots_N, refusal_BS.shape[1]))
    return model.read_out(DecoderOutput(h_ND, pointed), new_tokens=True)


def _require_one_chunk(chunk_length: int, lengths: Sequence[int], num_new: Sequence[int]) -> None:
    for slot, (length, count) in enumerate(zip(lengths, num_new, strict=True)):
        most = most_new_tokens(length, chunk_length)
        if count > most:
            raise ConfigError(
                f"slot {slot} has {length} tokens and gets {count}: with chunk_length {chunk_length} "
                f"it may get {most} in one pass, up to the end of a chunk"
            )


def _exchange_neighbours(
    model: RetroDecoder,
    cache: DecodeCache,
    completed: Sequence[int],
    neighbours_BKR: Tensor | None,
    mask_BKR: Tensor | None,
    arrived_B: Tensor | None,
) -> None:
    """In slots that complete a chunk, its neighbours take the place of those of the chunk before."""
    device = cache.chunk_hidden.device
    cache.clear_neighbours(torch.tensor(completed, device=device))
    encoding = model.encoding_for_new_tokens
    if neighbours_BKR is None or neighbours_BKR.numel() == 0 or encoding is None:
        return
    arrived = [slot for slot in completed if arrived_B is None or bool(arrived_B[slot])]
    # One by one on a CPU, as prompts are read, and for the same reason.
    for slots in [[slot] for slot in arrived] if device.type == "cpu" else [arrived] if arrived else []:
        slots_N = torch.tensor(slots, dtype=torch.int64, device=device)
        mask_NKR = None if mask_BKR is None else mask_BKR[slots_N]
        tokens_NKR = neighbours_BKR[slots_N]
        e_NKRD = model.embed_neighbours(tokens_NKR)
        encoded = encoding.encoder(tokens_NKR, e_NKRD, mask_NKR, cache.chunk_hidden[slots_N])
        _store(model, encoding, cache, slots_N, encoded)


def _store(
    model: RetroDecoder, encoding: NeighbourEncoding, cache: DecodeCache, slots: Tensor, encoded: EncodedNeighbours
) -> None:
    keys_values = {number: cca.encoded_keys_values(encoded) for number, cca in encoding.ccas.items()}
    pointer_keys = None if model.pointer is None else model.pointer.keys(encoded)
    cache.write_neighbours(slots, encoded, keys_values, pointer_keys)
