"""The facts of a report as one self-contained HTML page."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from retro_ray.evaluation import plots

_FINGERPRINTS = ("checkpoint_weights", "database_version", "text_fingerprint")
_SHOWN_DOCUMENTS = 15


def render(facts: dict[str, Any], index_plot: str | None = None) -> str:
    """The page. All texts of documents and settings are escaped; pictures alone are not."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "change": _change, "fewer": _fewer, "bits": _bits, "number": _number}
    scores, sweep = facts["scores"], facts["sweep"]
    axes = list(dict.fromkeys(point["axis"] for point in sweep["points"])) if sweep else []
    pictures = {
        "leakage": plots.leakage_plot(scores),
        "place": plots.place_plot(scores),
        "training": plots.training_plot(facts["metrics"]) if facts["metrics"] else None,
        "index": index_plot,
        **{f"sweep {axis}": plots.sweep_plot(sweep, axis) for axis in axes},
    }
    template = (files("retro_ray.evaluation") / "report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        facts=facts,
        scores=scores,
        pictures={name: None if svg is None else Markup(svg) for name, svg in pictures.items()},
        axes=axes,
        axis_names=plots.AXIS_NAMES,
        labels=plots.LABELS,
        stale=_of_other_states(facts),
        shown_documents=_SHOWN_DOCUMENTS,
        settings=json.dumps({name: facts[name] for name in ("model", "training", "database")}, indent=2),
    )


def _of_other_states(facts: dict[str, Any]) -> list[str]:
    """Results that are of another checkpoint, database or text than the scores."""
    kinds = [kind for kind in ("near_duplicates", "sweep", "examples") if facts[kind]]
    return [kind for kind in kinds if any(facts[kind][name] != facts["scores"][name] for name in _FINGERPRINTS)]


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}%}"


def _change(gain: float | None) -> str:
    """A share of bits that is saved, as the change that it is."""
    return "" if gain is None or math.isnan(gain) else f"{-gain:+.1%}"


def _fewer(gain: float) -> str:
    """The same in words."""
    return f"{abs(gain):.1%} {'fewer' if gain >= 0 else 'more'}"


def _bits(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"
