"""`eesd info`: versions, devices, the implementation of each op, a model and its exit head."""

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "--model", default="demo", help="Hugging Face folder, or demo (default: demo)"
    )
    parser.add_argument("--exit-head", help="folder of an exit head (default: the model's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Print what is found; weights are not loaded."""
    import eesd_kernels

    report = {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "ops": eesd_kernels.implementations(),
        "model": _model(args.model, args.exit_head),
    }
    print(json.dumps(report) if args.json else _text(report))
    return 0


def _versions() -> dict[str, str | None]:
    import torch

    from eesd_kernels import __version__

    return {
        "eesd-kernels": __version__,
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "python": platform.python_version(),
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    from eesd_kernels import _C

    return {"isa": _C.isa(), "threads": _C.get_num_threads()}


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
        }
        for gpu in found
    ]


def _model(name: str, exit_head: str | None) -> dict[str, Any]:
    from pathlib import Path

    from eesd.config import ModelConfig
    from eesd.loading import HEAD_FOLDER, _is_head, demo_folder
    from eesd.weights import WeightFolder

    folder = demo_folder() if name == "demo" else Path(name)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder")
    config = ModelConfig.from_folder(folder)
    weights = WeightFolder(folder)
    own = folder / HEAD_FOLDER
    head = Path(exit_head) if exit_head else own if _is_head(own) else None
    return {
        "name": name,
        "architecture": config.architecture,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_size": config.head_size,
        "vocab_size": config.vocab_size,
        "max_position": config.max_position,
        "windows": config.windows,
        "dtype": config.dtype,
        "weight_bytes": sum(path.stat().st_size for path in weights.files),
        "exit_head": None if head is None else _exit_head(head, weights.fingerprint()),
    }


def _exit_head(folder: Any, fingerprint: str) -> dict[str, Any]:
    from eesd.config import ExitHeadConfig
    from eesd.weights import WeightFolder

    config = ExitHeadConfig.from_folder(folder)
    WeightFolder(folder)  # raises where a file is missing or cut
    measured = ("agreement", "sampled_acceptance", "mean_acceptance_length", "draft_length")
    return {
        "exit_layer": config.exit_layer,
        "own_lm_head": config.own_lm_head,
        "prior": [config.prior_alpha, config.prior_beta],
        "fits": config.backbone_fingerprint == fingerprint,
        **{name: config.recipe.get(name) for name in measured},
        "loss": config.recipe.get("loss"),
        "steps": config.recipe.get("steps"),
        "tokens": config.recipe.get("tokens"),
    }


def _text(report: dict[str, Any]) -> str:
    lines = ["versions"]
    lines += [
        f"  {name:<14}{value or 'not installed'}" for name, value in report["versions"].items()
    ]
    lines += [
        "devices",
        f"  cpu           {report['cpu']['isa']}, {report['cpu']['threads']} threads",
    ]
    lines += [
        f"  cuda:{i}        {gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        for i, gpu in enumerate(report["gpus"])
    ]
    if not report["gpus"]:
        lines.append("  cuda          none")
    width = max(map(len, report["ops"])) + 2
    lines.append("ops" + " " * (width - 1) + f"{'cpu':<20}cuda")
    lines += [
        f"  {name:<{width}}{by_device['cpu']:<20}{by_device['cuda']}"
        for name, by_device in report["ops"].items()
    ]
    model = report["model"]
    lines += [
        f"model {model['name']}",
        f"  {model['architecture']}: {model['layers']} layers, hidden {model['hidden_size']}, "
        f"feed-forward {model['intermediate_size']}",
        f"  {model['heads']} heads ({model['kv_heads']} for K and V) of {model['head_size']}, "
        f"vocabulary {model['vocab_size']:,}, {model['max_position']:,} positions",
        *_window_lines(model["windows"]),
        f"  {model['weight_bytes'] / 1e6:,.1f} MB of weights, {model['dtype']}",
    ]
    return "\n".join(lines + _head_lines(model["exit_head"]))


def _window_lines(windows: tuple[int | None, ...]) -> list[str]:
    sizes = [window for window in windows if window is not None]
    if not sizes:
        return []
    return [f"  sliding window of {sizes[0]:,} positions in {len(sizes)} of {len(windows)} layers"]


def _head_lines(head: dict[str, Any] | None) -> list[str]:
    if head is None:
        return ["exit head", "  none (train one with eesd distill)"]
    alpha, beta = head["prior"]
    owner = "its own" if head["own_lm_head"] else "the model's"
    lines = [
        "exit head",
        f"  after layer {head['exit_layer']}, LM head {owner}, prior Beta({alpha:g}, {beta:g})",
    ]
    if head["agreement"] is not None:
        lines.append(
            f"  on held-out text it gives the model's best token at {head['agreement']:.1%} of "
            "positions"
        )
    if not head["fits"]:
        lines.append("  DOES NOT FIT: it was trained on a backbone with other weights")
    return lines
