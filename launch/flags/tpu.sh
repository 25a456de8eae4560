# shellcheck shell=bash
# What the files of all TPU generations set. Sourced by them.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/default.sh"

# Weights that fsdp shards are gathered while the matrix units work on the layer before, in several steps beside one
# fusion: without overlap, every layer waits for its weights. Newer compilers do most of this by themselves; it is said
# here for the older ones. Source: XLA's flags guidance; the v5e, v5p and v6e recipes of MaxText set the same five.
default_flag LIBTPU_INIT_ARGS --xla_enable_async_all_gather=true
default_flag LIBTPU_INIT_ARGS --xla_tpu_enable_async_collective_fusion=true
default_flag LIBTPU_INIT_ARGS --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
default_flag LIBTPU_INIT_ARGS --xla_tpu_enable_async_collective_fusion_multiple_steps=true
default_flag LIBTPU_INIT_ARGS --xla_tpu_overlap_compute_collective_tc=true

# Between slices: the gradients' all-reduce of one layer runs during the gradient of the next, also where the sizes
# differ. Without slices they change nothing. Source: recipes of MaxText and compiler options of AXLearn.
default_flag LIBTPU_INIT_ARGS --xla_tpu_enable_data_parallel_all_reduce_opt=true
default_flag LIBTPU_INIT_ARGS --xla_tpu_data_parallel_opt_different_sized_ops=true
