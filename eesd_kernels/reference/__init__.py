"""The specification of every op in plain PyTorch, float64 or float32 inside.

One file an op, the op's name and signature. A kernel is measured against the function here and
never defines behaviour of its own. `import eesd_kernels.reference` needs torch alone.
"""

from eesd_kernels.reference.exit_draft import exit_draft
from eesd_kernels.reference.exit_topk import exit_topk
from eesd_kernels.reference.linear import linear
from eesd_kernels.reference.philox import philox_words
from eesd_kernels.reference.rms_norm import rms_norm
from eesd_kernels.reference.rollback_kv import rollback_kv
from eesd_kernels.reference.rope_cache_write import rope_cache_write
from eesd_kernels.reference.sample_beta import sample_beta
from eesd_kernels.reference.sample_draft import sample_draft
from eesd_kernels.reference.swiglu import swiglu
from eesd_kernels.reference.target_law import target_law
from eesd_kernels.reference.thompson_draft_length import thompson_draft_length
from eesd_kernels.reference.thompson_look import thompson_look
from eesd_kernels.reference.thompson_update import thompson_update
from eesd_kernels.reference.tree_attention import tree_attention
from eesd_kernels.reference.verify_linear import verify_linear
from eesd_kernels.reference.verify_tree import verify_tree

__all__ = [
    "exit_draft",
    "exit_topk",
    "linear",
    "philox_words",
    "rms_norm",
    "rollback_kv",
    "rope_cache_write",
    "sample_beta",
    "sample_draft",
    "swiglu",
    "target_law",
    "thompson_draft_length",
    "thompson_look",
    "thompson_update",
    "tree_attention",
    "verify_linear",
    "verify_tree",
]
