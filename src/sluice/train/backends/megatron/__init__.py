"""The Megatron trainer: real megatron-core, tensor, pipeline, context and data parallel, on GPUs and on the CPU.

One rank holds `MegatronTrainer`, which `MegatronWorker` calls; the controller's side is `train.ranks`. Nothing here is
imported in the controller's process: process groups are global to a process, and so is the shim.
"""
