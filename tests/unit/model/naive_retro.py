"""RETRO once more, as slow and as literal as it can be: the reference that the model must equal.

Written from the paper: Algorithm 1, equations 6 and 7, listing 1. NumPy in float64; loops over
sequences, chunks, neighbours, heads and query positions, and nothing is batched. Positions enter
each logit as the one number the paper gives, the distance d of query and key, never as absolute
positions. It shares no code with `retro_ray.model`, only the names of the weights.
"""

import math
from collections.abc import Iterable

import numpy as np

from retro_ray.config import ModelConfig

Weights = dict[str, np.ndarray]
Array = np.ndarray


def naive_logits(
    config: ModelConfig,
    weights: Weights,
    tokens: Array,
    neighbours: Array | None = None,
    mask: Array | None = None,
    segments: Array | None = None,
) -> Array:
    """Logits [B, T, V] of tokens [B, T] with neighbours [B, L, K, R]."""
    out = []
    for b, sequence in enumerate(tokens):
        chunks = [] if neighbours is None else list(neighbours[b])
        real = [np.ones_like(c, dtype=bool) for c in chunks] if mask is None else list(mask[b])
        segment = np.zeros(len(sequence), dtype=int) if segments is None else segments[b]
        out.append(_decoder(config, weights, sequence, chunks, real, segment))
    return np.stack(out)


def _decoder(config: ModelConfig, weights: Weights, x: Array, retrieved: list, real: list, segment: Array) -> Array:
    table = weights["token_embedding.weight"]
    h = [_embedding(table, token, config.normalize_embeddings) for token in x]
    encoded = None
    for p in range(1, config.num_layers + 1):
        name = f"layers.{p - 1}"
        h = _causal_attention(config, weights, f"{name}.self_attention", h, segment)
        if config.cca_layers and p == min(config.cca_layers):
            encoded = _encoder(config, weights, retrieved, real, h, segment)
        if p in config.cca_layers:
            h = _chunked_cross_attention(config, weights, f"{name}.cca", h, encoded, segment)
        h = [_feed_forward(config, weights, f"{name}.feed_forward", token) for token in h]
    read = weights["token_embedding.weight" if config.tie_embeddings else "untied_read_out.weight"]
    h = [_rms_norm(config, weights["norm.weight"], token) for token in h]
    logits = [read @ token for token in h]
    if config.pointer and encoded:
        logits = _with_pointer(config, weights, logits, h, x, retrieved, encoded, segment)
    return np.stack(logits)


def _with_pointer(
    config: ModelConfig,
    weights: Weights,
    logits: list,
    h: list,
    x: Array,
    retrieved: list,
    encoded: list,
    segment: Array,
) -> list:
    """The mixture as probabilities: what is pointed at, and the rest as the softmax says. Its logarithms, raised to the
    scale of the logits, are those of the vocabulary where nothing is pointed at.
    """
    m, zero = config.chunk_length, np.zeros(config.encoder_dim)
    logits = list(logits)
    for u in range(1, len(encoded) + 1):
        for t in range(u * m - 1, min(len(h), (u + 1) * m - 1)):
            if segment[t] != segment[u * m - 1]:
                continue
            query = weights["pointer.query.weight"] @ h[t] / math.sqrt(config.hidden_dim)
            scores = [float((weights["pointer.sentinel.weight"] @ h[t] + weights["pointer.sentinel.bias"])[0])]
            tokens = []
            for neighbour, vectors in zip(retrieved[u - 1], encoded[u - 1], strict=True):
                for i, vector in enumerate(vectors):
                    if vector is None:
                        continue
                    before = vectors[i - 1] if i > 0 and vectors[i - 1] is not None else zero
                    key = weights["pointer.previous_key.weight"] @ before + weights["pointer.own_key.weight"] @ vector
                    score = float(query @ key)
                    for n in range(1, config.pointer_max_ngram + 1):
                        # Token n of the match: n - 1 back from t, n back from i.
                        s = t - n + 1
                        if s < 0 or i - n < 0 or vectors[i - n] is None:
                            break
                        if segment[s] != segment[t] or x[s] != neighbour[i - n]:
                            break
                        score += float(
                            weights["pointer.match.weight"][n - 1] @ h[t] + weights["pointer.match.bias"][n - 1]
                        )
                    scores.append(score)
                    tokens.append(neighbour[i])
            shares = np.exp(np.array(scores) - max(scores))
            shares /= shares.sum()
            total = np.exp(logits[t]).sum()
            probabilities = shares[0] * np.exp(logits[t]) / total
            for token, share in zip(tokens, shares[1:], strict=True):
                probabilities[token] += share
            logits[t] = np.log(probabilities * total)
    return logits


def _encoder(config: ModelConfig, weights: Weights, retrieved: list, real: list, h: list, segment: Array) -> list:
    """encoded[u][j][i]: the vector of token i of neighbour j of chunk u; None for a token that is not real."""
    m = config.chunk_length
    table = "token_embedding.weight" if config.share_encoder_embedding else "neighbour_embedding.weight"
    encoded = []
    for u in range(len(retrieved)):
        # The neighbours were retrieved by the document of the chunk's last token.
        own = [t for t in range(u * m, (u + 1) * m) if segment[t] == segment[(u + 1) * m - 1]]
        h_u = {t - u * m + 1: _rms_norm(config, weights["encoder.context_norm.weight"], h[t]) for t in own}
        of_chunk = []
        for j in range(len(retrieved[u])):
            # Numbers i' count from 1, as in the paper; tokens that are not real do not exist.
            e = {
                i + 1: _embedding(
                    weights[table], token, config.normalize_embeddings or config.normalize_neighbour_embeddings
                )
                for i, token in enumerate(retrieved[u][j])
                if real[u][j][i]
            }
            for p in range(1, config.encoder_layers + 1):
                e = _encoder_layer(config, weights, f"encoder.layers.{p - 1}", e, h_u, p in config.encoder_ca_layers)
            e = {i: _rms_norm(config, weights["encoder.norm.weight"], vector) for i, vector in e.items()}
            of_chunk.append([e.get(i + 1) for i in range(config.neighbour_length)])
        encoded.append(of_chunk)
    return encoded


def _encoder_layer(config: ModelConfig, weights: Weights, name: str, e: dict, h_u: dict, conditioned: bool) -> dict:
    attention = f"{name}.self_attention"
    normed = {i: _rms_norm(config, weights[f"{attention}.norm.weight"], vector) for i, vector in e.items()}
    e = {
        i: e[i]
        + _attention(config, weights, attention, normed[i], [(vector, vector, i - s) for s, vector in normed.items()])
        for i in e
    }
    if conditioned:
        attention = f"{name}.cross_attention"
        e = {
            # Equation 7: d(i', i) = i' - i, i' the neighbour's token, i the chunk's.
            i: vector
            + _attention(
                config,
                weights,
                attention,
                _rms_norm(config, weights[f"{attention}.norm.weight"], vector),
                [(context, context, i - s) for s, context in h_u.items()],
            )
            for i, vector in e.items()
        }
    return {i: _feed_forward(config, weights, f"{name}.feed_forward", vector) for i, vector in e.items()}


def _causal_attention(config: ModelConfig, weights: Weights, name: str, h: list, segment: Array) -> list:
    normed = [_rms_norm(config, weights[f"{name}.norm.weight"], vector) for vector in h]
    out = []
    for t in range(len(h)):
        seen = [(normed[s], normed[s], t - s) for s in range(t + 1) if segment[s] == segment[t]]
        out.append(h[t] + _attention(config, weights, name, normed[t], seen))
    return out


def _chunked_cross_attention(
    config: ModelConfig, weights: Weights, name: str, h: list, encoded: list, segment: Array
) -> list:
    """Chunk u = 1..L: query i = 1..m is the token at u*m - 1 + i - 1, counted from 0, if there is one."""
    m = config.chunk_length
    h = list(h)
    for u in range(1, len(encoded) + 1):
        keys = _cca_keys(config, weights, name, encoded[u - 1])
        for i in range(1, m + 1):
            t = u * m + i - 2
            if t >= len(h) or segment[t] != segment[u * m - 1]:
                continue
            # Equation 6: d(i, i') = i - i' + m - 1; the null key is at no position and scores zero.
            at_distance = [(key, value, 0 if i_prime is None else i - i_prime + m - 1) for key, value, i_prime in keys]
            query = _rms_norm(config, weights[f"{name}.norm.weight"], h[t])
            h[t] = h[t] + _attention(config, weights, name, query, at_distance)
    return h


def _cca_keys(config: ModelConfig, weights: Weights, name: str, neighbours: list) -> list:
    """(key input, value input, i') of all real tokens of a chunk's neighbours."""
    zero = np.zeros(config.encoder_dim)
    copy = config.cca_start == "copy"
    keys = [(zero, zero, None)] if copy else []
    for vectors in neighbours:
        for i, vector in enumerate(vectors):
            if vector is None:
                continue
            key = vector
            if copy:
                before = vectors[i - 1] if i > 0 and vectors[i - 1] is not None else zero
                key = weights[f"{name}.own_share"] * vector + weights[f"{name}.previous_share"] * before
            keys.append((key, vector, i + 1))
    return keys


def _attention(config: ModelConfig, weights: Weights, name: str, query: Array, keys: list) -> Array:
    """Multi-head attention of one query to (key input, value input, distance), without the residual."""
    if not keys:
        return np.zeros(len(weights[f"{name}.out.weight"]))
    key_inputs, value_inputs, distances = (np.array(column) for column in zip(*keys, strict=True))
    num_heads, num_kv_heads = (len(weights[f"{name}.{part}.weight"]) // config.head_dim for part in ("query", "key"))
    heads = []
    for head in range(num_heads):
        kv_head = head * num_kv_heads // num_heads
        [q] = _projected(config, weights, f"{name}.query", head, [query])
        k = _projected(config, weights, f"{name}.key", kv_head, key_inputs)
        logits = _logits(config, name, q, np.array(k), distances)
        shares = np.exp(logits - logits.max())
        heads.append(
            shares / shares.sum() @ np.array(_projected(config, weights, f"{name}.value", kv_head, value_inputs))
        )
    return weights[f"{name}.out.weight"] @ np.concatenate(heads) + weights.get(f"{name}.out.bias", 0)


def _projected(config: ModelConfig, weights: Weights, name: str, head: int, inputs: Iterable[Array]) -> list[Array]:
    own = slice(head * config.head_dim, (head + 1) * config.head_dim)
    bias = weights[f"{name}.bias"][own] if f"{name}.bias" in weights else 0
    projected = [weights[f"{name}.weight"][own] @ x + bias for x in inputs]
    norm = weights.get(f"{name}_norm.weight")
    return projected if norm is None else [_rms_norm(config, norm, x) for x in projected]


def _logits(config: ModelConfig, name: str, q: Array, k: Array, d: Array) -> Array:
    """Rotary positions: the pairs (e, e + E/2) are complex numbers, turned against each other by d."""
    half = config.head_dim // 2
    q_complex, k_complex = q[:half] + 1j * q[half:], k[:, :half] + 1j * k[:, half:]
    frequencies, magnitude = config.rope_base ** -(np.arange(half) / half), 1.0
    if config.rope_frequencies and name.startswith("layers.") and name.endswith("self_attention"):
        frequencies, magnitude = np.array(config.rope_frequencies), config.rope_magnitude
    turned = magnitude**2 * np.exp(1j * d[:, None] * frequencies)
    return (q_complex * k_complex.conj() * turned).real.sum(axis=1) / math.sqrt(config.head_dim)


def _feed_forward(config: ModelConfig, weights: Weights, name: str, h: Array) -> Array:
    normed = _rms_norm(config, weights[f"{name}.norm.weight"], h)
    x = weights[f"{name}.up.weight"] @ normed
    if f"{name}.gate.weight" in weights:
        gate = weights[f"{name}.gate.weight"] @ normed
        x = x * gate / (1 + np.exp(-gate))
    else:
        x = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])
    return h + weights[f"{name}.down.weight"] @ x


def _rms_norm(config: ModelConfig, weight: Array, x: Array) -> Array:
    return weight * x / math.sqrt(float(np.mean(x**2)) + config.norm_eps)


def _embedding(table: Array, token: int, normalize: bool) -> Array:
    x = table[token]
    return x / math.sqrt(float(np.mean(x**2)) + 1e-8) if normalize else x
