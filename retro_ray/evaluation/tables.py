"""Results of an evaluation as tables for a terminal."""

from __future__ import annotations

import math
from typing import Any


def scores_table(result: dict[str, Any]) -> str:
    """Bits per byte and perplexities by what is retrieved."""
    lines = [
        f"step {result['step']}, {result['documents']} documents, {result['text_bytes']} bytes of text",
        f"{'retrieval':>10}  bits per byte  95 % interval    token perplexity  word perplexity  last token right",
    ]
    for name, bits in result["bits_per_byte"].items():
        token, word, last = (
            result[key][name] for key in ("token_perplexity", "word_perplexity", "last_token_accuracy")
        )
        interval = as_interval(result["bits_per_byte_interval"][name])
        lines.append(f"{name:>10}  {bits:13.4f}  {interval:15}  {token:16.2f}  {word:15.2f}  {last:16.1%}")
    low, high = result["gain_on_over_off_interval"]
    surely = "" if math.isnan(low) else f" (95 %: {low:.1%} to {high:.1%})"
    lines.append(
        f"retrieval lowers bits per byte by {result['gain_on_over_off']:.1%}{surely}, "
        f"random neighbours by {result['gain_random_over_off']:.1%}"
    )
    if result["gain_on_over_baseline"] is not None:
        lines.append(f"against the baseline it lowers them by {result['gain_on_over_baseline']:.1%}")
    return "\n".join(lines)


def leakage_table(result: dict[str, Any]) -> str:
    """Bits per byte of the chunks that share at most so much with what is retrieved."""
    names = [name for name in ("baseline", "off", "on") if name in result["bits_per_byte"]]
    lines = [
        "",
        "where a chunk's longest run of tokens shared with its 10 nearest neighbours is at most alpha of it:",
        f"{'alpha':>7}  {'chunks':>8}  {'bytes':>6}  " + "  ".join(f"{name:>8}" for name in names) + "   on over off",
    ]
    for point in result["leakage"]:
        bits = point["bits_per_byte"]
        share = point["text_bytes"] / result["text_bytes"]
        values = "  ".join(f"{bits[name]:8.4f}" for name in names)
        gain = f"{bits['on'] / bits['off'] - 1:+11.1%}" if point["chunks"] else ""
        lines.append(f"{point['alpha']:7.1%}  {point['chunks']:8,}  {share:6.1%}  {values}   {gain}")
    return "\n".join(lines)


def near_duplicates_table(result: dict[str, Any]) -> str:
    """The documents of which the database has nearly the same, the most similar first."""
    pairs = result["pairs"]
    lines = [
        "",
        f"{result['documents_with']} of {result['documents']} documents have a near duplicate in the database "
        f"(13-grams of tokens shared: {result['min_jaccard']:.0%} or more)",
    ]
    for pair in pairs[:_MAX_PAIRS]:
        lines.append(f"{pair['jaccard']:7.1%}  {pair['document']}  =  {pair['near']}")
    if len(pairs) > _MAX_PAIRS:
        lines.append(f"         and {len(pairs) - _MAX_PAIRS} more (--json lists them)")
    return "\n".join(lines)


_MAX_PAIRS = 10


def sweep_table(result: dict[str, Any]) -> str:
    """Bits per byte along every axis that was swept."""
    lines = [
        "",
        f"retrieval off: {result['bits_per_byte_off']:.4f} bits per byte {as_interval(result['interval_off'])}",
    ]
    axis = None
    for point in result["points"]:
        if point["axis"] != axis:
            axis = point["axis"]
            lines.append(f"{axis:>8}  bits per byte  95 % interval    over off   95 % interval")
        low, high = point["gain_interval"]
        gain = "" if math.isnan(low) else f"{-high:+.1%} to {-low:+.1%}"
        lines.append(
            f"{point['value']:>8}  {point['bits_per_byte']:13.4f}  {as_interval(point['interval']):15}  "
            f"{-point['gain_over_off']:+7.1%}   {gain:17}  {point['note']}".rstrip()
        )
    return "\n".join([*lines, *result["notes"]])


def update_table(result: dict[str, Any]) -> str:
    """What one checkpoint gained from an update of its database, in all and by document."""
    bits, sizes = result["bits_per_byte"], {name: result[name]["documents"] for name in ("before", "after")}
    low, high = result["gain_interval"]
    surely = "" if math.isnan(low) else f" (95 %: {low:.1%} to {high:.1%})"
    lines = [
        f"step {result['step']}, {result['documents']} documents, the database before ({sizes['before']:,} documents) "
        f"and after ({sizes['after']:,})",
        *(f"{name:>10}  {bits[name]:8.4f} bits per byte" for name in ("off", "before", "after")),
        f"the update lowers them by {result['gain']:.1%}{surely}, without training",
        "",
        f"{'before':>8}  {'after':>8}  document  <- neighbours that brought it",
    ]
    for one in result["by_document"][:_MAX_PAIRS]:
        who = ", ".join(neighbour["document"] for neighbour in one["neighbours"])
        bits = one["bits_per_byte"]
        lines.append(f"{bits['before']:8.4f}  {bits['after']:8.4f}  {one['document']}" + (f"  <- {who}" if who else ""))
    if len(result["by_document"]) > _MAX_PAIRS:
        lines.append(f"and {len(result['by_document']) - _MAX_PAIRS} more (--json lists them)")
    return "\n".join(lines)


def answers_table(result: dict[str, Any]) -> str:
    """Right answers with passages and without."""
    lines = [
        f"step {result['step']}, {result['scores']['on']['questions']} questions, passages {result['passages']}",
        f"{'retrieval':>10}  exact match      F1",
    ]
    lines += [f"{mode:>10}  {one['exact_match']:11.1%}  {one['f1']:6.1%}" for mode, one in result["scores"].items()]
    return "\n".join(lines)


def as_interval(interval: tuple[float, float]) -> str:
    """An interval, or nothing where there is none."""
    return "" if math.isnan(interval[0]) else f"{interval[0]:.4f}-{interval[1]:.4f}"
