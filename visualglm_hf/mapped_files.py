# SPDX-License-Identifier: Apache-2.0
"""Weights that are mapped from their files: what is stored there, and letting go of what has been read.

Not here: reading files, which transformers does, and what becomes of the weights (`quantization.py`).

Mapped pages count as a process's own memory as soon as they have been read, until nothing refers to their file any
more, that is until the last weight is loaded. So a checkpoint that is quantized or cast on its way is counted twice,
unless its pages are released one tensor after the other. They stay in the system's cache: nothing is read twice.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers.modeling_utils import load_state_dict


PIECE = 2**24  # bytes of a file that are read and released at a time
MADV_DONTNEED = 4  # Linux: unmap; pages of a file are found there again
# Linux, Documentation/admin-guide/mm/pagemap.rst: an entry of 64 bits for each page of this process.
MAPS, PAGEMAP, ENTRY_BYTES = Path("/proc/self/maps"), Path("/proc/self/pagemap"), 8
IS_OF_A_FILE = 1 << 61
IS_PRESENT = torch.iinfo(torch.int64).min | 1 << 62  # in memory, or swapped out: the two highest bits


def stored_dtypes(files: Iterable[str | Path]) -> dict[str, torch.dtype]:
    """The dtype of each tensor in some files of weights, .safetensors or .bin, without reading them."""
    return {name: tensor.dtype for file in files for name, tensor in load_state_dict(file, map_location="meta").items()}


def is_unchanged_file(start: int, length: int) -> bool:
    """Whether all pages between two page boundaries are a file's, and none was written to since it was mapped."""
    try:
        with PAGEMAP.open("rb", buffering=0) as pagemap:
            pagemap.seek(start // mmap.PAGESIZE * ENTRY_BYTES)
            entries = bytearray(pagemap.read(length // mmap.PAGESIZE * ENTRY_BYTES))
    except OSError:  # no /proc, or one that says nothing
        return False
    if len(entries) * mmap.PAGESIZE != length * ENTRY_BYTES:
        return False
    pages = torch.frombuffer(entries, dtype=torch.int64)
    return bool((((pages & IS_PRESENT) == 0) | ((pages & IS_OF_A_FILE) != 0)).all())


def release(start: int, stop: int) -> None:
    """Let go of the whole pages between two addresses, if a file has them as they are."""
    start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop and is_unchanged_file(start, stop - start):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED)


def release_pages(tensor: torch.Tensor) -> None:
    """Let go of the memory of a tensor that was mapped from a file and has been read; of any other, nothing happens.

    Who reads the tensor again finds the same numbers. Elsewhere than on Linux, nothing happens either.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu":
        release(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def find_mappings(files: Iterable[str | Path]) -> set[tuple[int, int]]:
    """Addresses, from and to, at which this process has mapped files; none where the system does not tell."""
    paths = {os.path.realpath(file) for file in files}
    try:
        lines = os.fsdecode(MAPS.read_bytes()).splitlines()
    except OSError:
        return set()
    fields = (line.split(maxsplit=5) for line in lines)
    spans = (each[0].split("-") for each in fields if len(each) == 6 and each[5] in paths)
    return {(int(start, 16), int(stop, 16)) for start, stop in spans}


def release_mappings(mappings: Iterable[tuple[int, int]]) -> None:
    """Let go of what has been read of mapped files."""
    for first, last in mappings:
        for start in range(first, last, PIECE):
            release(start, min(start + PIECE, last))


def read_as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copy a tensor that is mapped from a file into memory, in another dtype; its pages are released meanwhile."""
    result = torch.empty_like(tensor, dtype=dtype)
    if tensor.nbytes <= PIECE:
        result.copy_(tensor)
    else:
        pieces = -(-tensor.nbytes // PIECE)
        for source, target in zip(tensor.chunk(pieces), result.chunk(pieces), strict=True):
            target.copy_(source)
            release_pages(source)
    release_pages(tensor)  # and what lies across borders of pieces
    return result
