"""Configuration: frozen pydantic models, one file per part. Imports neither torch nor ray."""

from sluice.config.run import RunConfig

__all__ = ["RunConfig"]
