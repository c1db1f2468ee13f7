"""The orchestrator of early-exit speculative decoding: models, cache, rounds, `generate`.

Names are loaded when first asked for, so that `eesd --help` needs no torch. No submodule bears the
name of one of them: an import would then put the module where users expect the function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eesd.generation import GenerateOutput, generate
    from eesd.generation_config import GenerationConfig
    from eesd.loading import Model, load
    from eesd.posterior import Posterior
    from eesd.synthetic_models import synthetic

__all__ = [
    "GenerateOutput",
    "GenerationConfig",
    "Model",
    "Posterior",
    "generate",
    "load",
    "synthetic",
]

_HOMES = {
    "GenerateOutput": "eesd.generation",
    "GenerationConfig": "eesd.generation_config",
    "Model": "eesd.loading",
    "Posterior": "eesd.posterior",
    "generate": "eesd.generation",
    "load": "eesd.loading",
    "synthetic": "eesd.synthetic_models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
