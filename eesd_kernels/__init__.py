"""Kernels for early-exit speculative decoding: faster text, the same text.

The ops know tensors and never models. `generate` is the front door to the orchestrator `eesd`,
loaded only when asked for.
"""

from typing import Any

from eesd_kernels._library import implementations
from eesd_kernels._version import __version__
from eesd_kernels.exit_draft import exit_draft
from eesd_kernels.exit_topk import exit_topk
from eesd_kernels.laws import Law, Purpose, Rule
from eesd_kernels.linear import linear
from eesd_kernels.rms_norm import rms_norm
from eesd_kernels.rollback_kv import rollback_kv
from eesd_kernels.rope_cache_write import rope_cache_write
from eesd_kernels.sample_beta import sample_beta
from eesd_kernels.sample_draft import sample_draft
from eesd_kernels.swiglu import swiglu
from eesd_kernels.thompson_draft_length import thompson_draft_length
from eesd_kernels.thompson_look import thompson_look
from eesd_kernels.thompson_update import thompson_update
from eesd_kernels.tree_attention import tree_attention
from eesd_kernels.verify_linear import verify_linear
from eesd_kernels.verify_tree import verify_tree

__all__ = [
    "Law",
    "Purpose",
    "Rule",
    "__version__",
    "exit_draft",
    "exit_topk",
    "generate",
    "implementations",
    "linear",
    "rms_norm",
    "rollback_kv",
    "rope_cache_write",
    "sample_beta",
    "sample_draft",
    "swiglu",
    "thompson_draft_length",
    "thompson_look",
    "thompson_update",
    "tree_attention",
    "verify_linear",
    "verify_tree",
]


def __getattr__(name: str) -> Any:
    if name == "generate":  # the only upward edge
        from eesd import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
