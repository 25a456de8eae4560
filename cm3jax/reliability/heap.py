"""Memory of the host that compiling has used and freed, handed back to the system."""

import ctypes
import platform


def return_freed_memory() -> None:
    """Gives the free pages of the C heap back; without it a process keeps the peak of its compilations for ever.

    Does nothing where the C library is not GNU's.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
