# shellcheck shell=bash
# CPUs. Sourced before a process starts; what is set already wins.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/default.sh"

# XLA allocates the temporaries of a program anew for each step. In pages of 4 kB the kernel spends as long on handing
# them out as some steps compute; with 2 MB pages the decoder of the quickstart trains 1.3 times as fast on two cores
# (benchmarks/large_pages.py).
# Takes effect where transparent huge pages are on or left to the program ("madvise"). Source: glibc's manual, tunables.
default_variable GLIBC_TUNABLES glibc.malloc.hugetlb=1
