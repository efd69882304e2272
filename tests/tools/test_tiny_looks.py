"""The tables of where the tiny model looks, and of what zooming in is worth."""

import json

import pytest
import torch

from tests.paths import TINY
from tools.tiny import looks, pictures, world
from tools.tiny.world import Subject


SUBJECT = Subject("star", "red", 105, 49, 10)  # in the patches of row 3 and columns 6 to 8


def peak_at(row: int, column: int) -> torch.Tensor:
    attention_map = torch.zeros(16, 16)
    attention_map[row, column] = 1
    return attention_map


@pytest.mark.parametrize(("row", "column", "distance"), [(3, 7, 0), (3, 6, 0.32), (3, 9, 1.32), (8, 7, 4.32)])
def test_a_peak_is_so_many_patches_from_the_square_around_a_subject(row, column, distance):
    found = looks.peak_distance(peak_at(row, column), SUBJECT)
    assert found == pytest.approx(distance, abs=0.3) and (found == 0) == (distance == 0)


def test_single_subjects_are_single_and_small_ones_small():
    for number in range(3):
        assert looks.single_scene(number).count == 1
        (subject,) = looks.single_small(number).subjects
        assert (2 * subject.radius / world.IMAGE_SIZE) ** 2 < pictures.LARGEST_SMALL + 1e-9


def test_what_an_oracle_cuts_out_shows_the_subject_in_the_middle_half():
    picture = looks.single_small(0)
    (subject,) = picture.subjects
    window = pictures.oracle_window(subject)
    crop = looks.cut_out(picture.whole(), window)
    assert crop.width == crop.height == round(6 * window.side)
    assert abs(crop.width - 24 * subject.radius) <= 1


def test_a_table_has_the_share_and_its_interval_in_each_cell():
    tally = looks.Tally()
    for hit in (True, True, True, False):
        tally.add("shape", "zoom", hit)
    tally.add("colour", "no zoom", False)
    head, line, shape, colour = tally.markdown("small").splitlines()
    assert head == "| small | zoom | no zoom |" and line == "|---|---|---|"
    assert shape == "| shape | 75.0 (30–95) |  |" and colour.startswith("| colour |  | 0.0 (0–")


FIRST, *OTHERS = looks.TABLES


@pytest.mark.parametrize("table", [FIRST, *(pytest.param(table, marks=pytest.mark.slow) for table in OTHERS)])
def test_each_table_is_printed_and_its_hits_are_written(table, tmp_path, capsys):
    hits = tmp_path / "hits.json"
    assert looks.main([str(TINY), "--table", table, "--pictures", "1", "--hits", str(hits)]) == 0
    rows = json.loads(hits.read_text())
    printed = capsys.readouterr().out
    assert rows and all(f"| {row} |" in printed for row in rows)
    if table == "looks":
        assert all(rows["one subject of usual size"]["peak inside it"])
        assert all(rows["one small subject"]["peak within a patch of it"])


def test_a_folder_that_is_none_is_one_line(tmp_path, capsys):
    assert looks.main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
