"""Memory of a training: what is freed is kept on CPUs, how much is left, and which errors say that it is not enough.

glibc gives large blocks back to the kernel as soon as they are freed, and gets them anew at each step, with a page
fault every 4 KiB. At 224 pixels these are a large part of a training step; at 32 pixels they are nothing.
"""

import ctypes
import math
import os
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
OF_USERS = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")
# Limit and usage, and where it says what of that are files that the kernel can drop.
CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "could not create a memory object", "bad_alloc")


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, where it uses glibc's allocator; return whether it does so now.

    An allocator that was preloaded, or settings of glibc's in the environment, stay as they are.
    """
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in OF_USERS):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version  # noqa: B018 - musl has none
    except (OSError, AttributeError):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))


def free_memory(device: torch.device) -> float:
    """Return how many bytes this process may still take on a device; infinite where that is not known.

    The processes of a training on one machine share its memory evenly.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return math.inf
    kept = _kept_by_glibc()
    left = [psutil.virtual_memory().available + kept]
    for limit, usage, statistics, cached in CGROUPS:  # of version 2, and of version 1
        try:
            files = [int(line.split()[1]) for line in _text(statistics).splitlines() if line.split()[0] in cached]
            left.append(int(_text(limit)) - int(_text(usage)) + sum(files) + kept)
        except (OSError, ValueError):  # there is none, or no limit
            continue
    left = [min(left) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))]
    if sys.platform != "win32":
        import resource

        limit_of_process = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit_of_process != resource.RLIM_INFINITY:
            left.append(limit_of_process - psutil.Process().memory_info().vms + kept)
    return float(min(left))


def _text(name: str) -> str:
    return Path("/sys/fs/cgroup", name).read_text().strip()


class _Mallinfo2(ctypes.Structure):
    """What glibc tells of its allocator."""

    _fields_ = [("numbers", ctypes.c_size_t * 10)]


def _kept_by_glibc() -> int:
    """Return how many bytes are free within the allocator of this process; 0 where it is not glibc's from 2.33 on."""
    try:
        mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return 0
    mallinfo2.restype = _Mallinfo2
    return mallinfo2().numbers[8]  # fordblks


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there was too little memory, of a device or of the machine."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)
    )
