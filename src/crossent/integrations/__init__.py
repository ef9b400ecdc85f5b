"""crossent inside the libraries that people train with; each part needs its library."""

from __future__ import annotations

import importlib
from types import ModuleType

_PARTS = ("fastai", "huggingface", "sklearn", "torchmetrics", "trl")


def __getattr__(name: str) -> ModuleType:
    """A part is imported when it is used: ``crossent.integrations.huggingface.patch(model)``."""
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS})
