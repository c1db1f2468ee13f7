"""Self-distillation of an exit head; loads torch only when `distill` itself is asked for."""

from typing import TYPE_CHECKING, Any

from eesd.distill.settings import DistillResult, DistillSettings

if TYPE_CHECKING:
    from eesd.distill.run import distill

__all__ = ["DistillResult", "DistillSettings", "distill"]


def __getattr__(name: str) -> Any:
    if name == "distill":
        from eesd.distill.run import distill

        return distill
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
