"""Stand-in for `sglang-kernel`"""
import torch

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is not available on the CPU")
    missing.__name__ = name
    return missing
