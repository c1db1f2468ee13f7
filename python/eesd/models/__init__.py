"""The backbone. All families so far are one, as `eesd.families` says."""

from eesd.models.llama import Llama

__all__ = ["Llama"]
