"""Letting go of weights that were mapped from a file: what has been read is given back, and nothing else."""

import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from tests.helpers import seeded
from visualglm_hf import mapped_files
from visualglm_hf.mapped_files import find_mappings, read_as, release_mappings, release_pages, stored_dtypes


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is released")
MIB = 2**20


@pytest.fixture
def file(tmp_path) -> Path:
    """32 MiB in a file."""
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"a": torch.randn(2048, 8192, generator=seeded()).half()}, path)
    return path


def resident_file_pages() -> int:
    """Bytes of files that count as this process's."""
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def mapped(path: Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as weights:
        tensor = weights.get_slice("a")[...]
    tensor.sum()
    return tensor


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_was_read_of_a_file_counts_no_more_and_is_found_again(file, tmp_path, kind):
    tensor = mapped(file)
    if kind == "bin":
        torch.save({"a": tensor.clone()}, tmp_path / "weights.bin")
        tensor = torch.load(tmp_path / "weights.bin", mmap=True)["a"]
    expected = tensor.clone()
    before = resident_file_pages()
    release_pages(tensor)
    assert resident_file_pages() < before - tensor.nbytes + 2 * MIB
    assert torch.equal(tensor, expected)


def test_what_was_changed_in_memory_stays_changed(file):
    tensor = mapped(file)
    tensor[100, 5] = -7
    release_pages(tensor)
    release_mappings(find_mappings([file]))
    assert tensor[100, 5] == -7


def test_memory_that_no_file_has_stays_as_it_is():
    tensor = torch.ones(2048, 1024)
    release_pages(tensor)
    assert bool((tensor == 1).all())


def test_where_the_system_does_not_tell_what_a_page_is_none_is_released(file, tmp_path, monkeypatch):
    tensor = mapped(file)
    monkeypatch.setattr(mapped_files, "PAGEMAP", tmp_path / "none")
    monkeypatch.setattr(mapped_files, "MAPS", tmp_path / "none")
    before = resident_file_pages()
    release_pages(tensor)
    assert find_mappings([file]) == set()
    assert resident_file_pages() > before - MIB


def test_a_whole_mapping_is_released_at_once(file):
    tensor = mapped(file)
    before = resident_file_pages()
    release_mappings(find_mappings([file]))
    assert resident_file_pages() < before - tensor.nbytes + 2 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_in_another_dtype_is_a_cast_that_leaves_no_pages(file, dtype):
    tensor = mapped(file)
    expected = tensor.to(dtype)
    before = resident_file_pages()
    assert torch.equal(read_as(tensor, dtype), expected)
    assert resident_file_pages() < before - tensor.nbytes + 2 * MIB
    assert torch.equal(read_as(torch.tensor(3), dtype), torch.tensor(3, dtype=dtype))


def test_of_a_large_tensor_a_few_pieces_at_most_count_while_it_is_copied(file, monkeypatch):
    tensor = mapped(file)
    release_pages(tensor)
    before, seen = resident_file_pages(), []

    def watch(piece: torch.Tensor) -> None:
        seen.append(resident_file_pages() - before)
        release_pages(piece)

    monkeypatch.setattr(mapped_files, "PIECE", MIB)
    monkeypatch.setattr(mapped_files, "release_pages", watch)
    read_as(tensor, torch.float32)
    assert len(seen) == 33 and max(seen) < 8 * MIB


def test_the_dtypes_of_files_are_told_without_reading_them(file, tmp_path):
    torch.save({"b": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "pytorch_model.bin")
    assert stored_dtypes([file, tmp_path / "pytorch_model.bin"]) == {"a": torch.float16, "b": torch.bfloat16}
