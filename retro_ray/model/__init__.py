"""The RETRO model in plain torch."""

from retro_ray.model.cache import DecodeCache
from retro_ray.model.retro import RetroModel

__all__ = ["DecodeCache", "RetroModel"]
