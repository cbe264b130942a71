"""What Sluice adds to an engine's own Python environment.

An engine lives apart from the trainer, with its own lock of versions. This package needs nothing but the
standard library to be imported, so that it can be put on the engine's path whatever is installed there.

* `cpu`: the environment variables and the flags that start a stock SGLang on a CPU; `sluice` reads them too.
* `cpu_shim/`: put on the engine's PYTHONPATH by `cpu.environment`; stands in for the CUDA-only packages.
"""
