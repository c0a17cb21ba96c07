"""rayrlhf: the whole InstructGPT recipe as Ray actors.

    from rayrlhf import load_config, run
    run(load_config("configs/demo.yaml", ["ppo.steps=10"]))

Names are imported when first used: `import rayrlhf` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["Config", "RayRLHFError", "__version__", "load_config", "run"]
__version__ = "0.1.0"

_HOMES = {"Config": "rayrlhf.config", "RayRLHFError": "rayrlhf.errors", "load_config": "rayrlhf.config"}


def run(config: Any, dry_run: bool = False, verify_step: int | None = None) -> Any:
    """Run the stages of a `Config`; returns the run's folder (a `Path`). See `rayrlhf.stages.run.run`."""
    from rich.console import Console

    from rayrlhf.stages.run import run as run_stages

    return run_stages(config, Console(), dry_run, verify_step)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
