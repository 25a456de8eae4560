# shellcheck shell=bash
# TPU v5e. Sourced before a process starts; what is set already wins.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

# All-reduces, too, run beside matrix products; off by itself. Source: XLA's flags guidance, its lines on v5e.
default_flag LIBTPU_INIT_ARGS --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
