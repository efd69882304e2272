"""Reports of several variants in one run, and the page that is made of saved ones."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.benchmarking_helpers import QUICK, decode_rows, rows_of, run_apart
from tests.paths import ROOT
from visualglm_tools.benchmarking.growth import measure_growth
from visualglm_tools.benchmarking.report import read_run, render_files, render_run, write_page, write_run


@pytest.fixture(scope="module")
def several(peer_command, tmp_path_factory) -> tuple[int, dict, Path]:
    """Two variants, a peer and one that fails, in one run."""
    saved = tmp_path_factory.mktemp("several") / "run.json"
    failing = shlex.join([sys.executable, "-c", "raise SystemExit('no such model')"])
    peers = ("--peer", f"llama.cpp={peer_command}", "--peer", f"broken={failing}")
    completed = run_apart(*QUICK, "--parts", "decode", "--variants", "fp32", "int4-torch", *peers, "--save", saved)
    return completed.returncode, json.loads(completed.stdout.splitlines()[-1]), saved


def test_variants_and_peers_are_measured_side_by_side(several):
    _, report, _ = several
    assert [variant["name"] for variant in report["variants"]] == ["fp32", "int4-torch"]
    assert all(len(rows_of(variant, "decode")) == 5 for variant in report["variants"])
    assert all(variant["limits"]["read_gb_per_s"] > 0 for variant in report["variants"])
    assert [peer["name"] for peer in report["peers"]] == ["llama.cpp"]
    text = render_run(report)
    assert "time over llama.cpp's" in text
    forward = next(row for row in rows_of(report["variants"][0], "decode") if row["context"] == 40)
    assert f"| {forward['ms']['median'] / 2:.2f} |" in text


def test_who_fails_costs_the_others_nothing(several):
    code, report, _ = several
    assert code == 1
    assert report["failed"] == [{"name": "broken", "message": "broken ended with exit status 1: no such model"}]
    assert "- broken: broken ended with exit status 1: no such model" in render_run(report)


def test_a_saved_report_is_the_printed_one(several):
    _, report, saved = several
    assert read_run(saved) == report
    assert max(map(len, saved.read_text().splitlines())) < 1000


# ---------------------------------------------------------------- the page
DOCS = ROOT / "docs"


def test_the_published_pages_and_their_picture_are_what_the_files_say():
    files = sorted((DOCS / "benchmarks").glob("*.json"))
    rendered = render_files(DOCS / "benchmarks" / "page.md", files, DOCS / "benchmarks.md")
    names = ["benchmarks-archive.md", "benchmarks.md", "overview.svg"]
    assert sorted(file.name for file in rendered) == names
    assert [file.name for file, text in rendered.items() if file.read_text(encoding="utf-8") != text] == []


def test_a_page_is_its_template_with_runs_in_place_and_their_growth_drawn(several, tmp_path):
    _, report, _ = several
    report = {**report, "variants": [{**report["variants"][0], "rows": decode_rows(lambda context: 900 + context)}]}
    report["variants"][0]["growth"] = measure_growth(report["variants"][0]["rows"])
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("named", "other"):
        write_run({**report, "title": f"The {name} run"}, folder / f"{name}.json")
    template = folder / "page.md"
    template.write_text("# Title\n\n<!-- run named -->\n\n<!-- other runs -->\n\nThe end.\n")
    files = [folder / "named.json", folder / "other.json"]
    write_page(tmp_path / "page.md", template, files)
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text.index("![") < text.index("## Other runs\n\n### The other run\n") < text.index("The end.")
    assert "](benchmarks/named.png)" in text and (folder / "named.png").is_file()
    assert "The named run" not in text  # the template has its own heading
    assert not (tmp_path / "page-archive.md").exists() and not (folder / "overview.svg").exists()
    with pytest.raises(ValueError, match=r"wants named\.json, which was not given"):
        render_files(template, files[1:], tmp_path / "page.md")
    template.write_text("# Title\n\n<!-- run named -->\n")
    with pytest.raises(ValueError, match=r"has no place for other\.json"):
        render_files(template, files, tmp_path / "page.md")


def test_older_runs_stand_in_an_archive_and_not_among_the_others(several, tmp_path):
    _, report, _ = several
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("new", "old"):
        write_run({**report, "notes": f"The {name} run."}, folder / f"{name}.json")
    template, files = folder / "page.md", [folder / "new.json", folder / "old.json"]
    template.write_text("# Title\n\n<!-- other runs -->\n\nThe end.\n")
    (folder / "archive.md").write_text("# Old\n\n<!-- run old -->\n")
    write_page(tmp_path / "page.md", template, files)
    page, archive = ((tmp_path / name).read_text(encoding="utf-8") for name in ("page.md", "page-archive.md"))
    assert "The new run." in page and "The old run." not in page
    assert "The old run." in archive and "The new run." not in archive and "from archive.md" in archive
    (folder / "archive.md").write_text("# Old\n\n<!-- run older -->\n")
    with pytest.raises(ValueError, match=r"archive\.md wants older\.json, which was not given"):
        write_page(tmp_path / "page.md", template, files)
