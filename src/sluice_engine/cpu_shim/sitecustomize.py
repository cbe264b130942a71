"""Lets a stock SGLang start where there are no CUDA wheels. Python imports this file by itself at start-up.

SGLang imports `triton` and `torchvision` when its own modules are imported, on a CPU too. The real triton is
1 GB that nothing would call, and the published torchvision is compiled against CUDA torch (it fails with
"operator torchvision::nms does not exist"). Both are replaced by placeholders: modules whose every attribute
exists, so that kernel *definitions* are valid Python. A package that is really installed always wins.

The standard library only: this runs in every Python process of the engine, before anything else.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Placeholder(ModuleType):
    """A module that has everything: capitalised attributes are classes, the others placeholders again."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value: Any = type(name, (), {"__module__": self.__name__})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a decorator, bare (`@triton.jit`) or with arguments (`@triton.jit(...)`): return the function."""
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda function: function


class PlaceholderFinder(MetaPathFinder, Loader):
    """Makes `import package` and `import package.any.thing` give placeholders.

    Args:
        packages: top-level name → what sets the attributes whose values matter, called once per module.
    """

    def __init__(self, packages: dict[str, Callable[[Any], None]]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        self.packages[module.__name__.partition(".")[0]](module)


def fill_triton(module: Any) -> None:
    if module.__name__ == "triton":
        module.__version__ = "3.0.0"  # torch reads it: AttributeError without

        class Config:
            def __init__(self, kwargs: Any = None, num_warps: int = 4, num_stages: int = 2, **extra: Any) -> None:
                self.kwargs, self.num_warps, self.num_stages = kwargs, num_warps, num_stages

        module.Config = Config  # called with arguments while kernels are defined: TypeError without
    if module.__name__ == "triton.backends":
        module.backends = {}  # torch looks for a CPU among them: TypeError without


def fill_torchvision(module: Any) -> None:
    if module.__name__ == "torchvision":
        module.__version__ = "0.28.0"  # transformers parses it: InvalidVersion without
    if module.__name__ == "torchvision.transforms":
        modes = ("NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
        # transformers maps the members at import: AttributeError without
        module.InterpolationMode = enum.Enum("InterpolationMode", {mode: mode.lower() for mode in modes})


# at the end of the path: only what no real finder knows
sys.meta_path.append(PlaceholderFinder({"triton": fill_triton, "torchvision": fill_torchvision}))
