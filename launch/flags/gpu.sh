# shellcheck shell=bash
# NVIDIA GPUs. Sourced before a process starts; what is set already wins.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/default.sh"

# Products by cuBLAS alone: the update of eight layers of 7b takes 2 % less time than with Triton among the candidates, that
# of 350m as long, and both compile in less (one H100). Source: JAX-Toolbox's page, benchmarks/train_step.py --gpu.
default_flag XLA_FLAGS --xla_gpu_enable_triton_gemm=false

# Collectives start as early and end as late as data allows, so that they run beside matrix products; the pipelined ones
# move across iterations of the scan over layers. Source: JAX's GPU performance tips, JAX-Toolbox's GPU performance page.
default_flag XLA_FLAGS --xla_gpu_enable_latency_hiding_scheduler=true
default_flag XLA_FLAGS --xla_gpu_enable_pipelined_all_gather=true
default_flag XLA_FLAGS --xla_gpu_enable_pipelined_reduce_scatter=true
default_flag XLA_FLAGS --xla_gpu_enable_pipelined_all_reduce=true

# One collective carries at least the weights of a layer (7b: 0.4 GB in bf16): small ones leave the links idle.
# Source: JAX-Toolbox's page, which asks for thresholds not below a layer's weights.
default_flag XLA_FLAGS --xla_gpu_all_gather_combine_threshold_bytes=536870912
default_flag XLA_FLAGS --xla_gpu_reduce_scatter_combine_threshold_bytes=536870912

# A collective that some GPUs never enter ends the process after this, and the run is started again; by itself XLA waits
# for ever. Longer than the slowest save or evaluation, shorter than the watchdog's half hour. Source: XLA's source (the
# termination timeout of a rendezvous, where negative means never); reports say that not every hang is caught by it.
default_flag XLA_FLAGS --xla_gpu_nccl_termination_timeout_seconds=900

# JAX takes 75 % of the memory by itself; what CUDA, cuDNN and NCCL need beside it fits in 10. Source: JAX-Toolbox.
default_variable XLA_PYTHON_CLIENT_MEM_FRACTION 0.9
