"""Backbones by architecture; adding a family touches one file and this table."""

from eesd.models.llama import Llama

FAMILIES = {"LlamaForCausalLM": Llama}

__all__ = ["FAMILIES", "Llama"]
