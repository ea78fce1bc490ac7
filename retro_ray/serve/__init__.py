"""The HTTP service: `serve run retro_ray.serve:app`."""

from retro_ray.serve.app import app

__all__ = ["app"]
