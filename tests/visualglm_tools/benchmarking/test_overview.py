"""The first table and the picture of the page of benchmarks: the wait for the first word, then the rate."""

import re
from xml.etree import ElementTree

import pytest

from visualglm_tools.benchmarking.overview import draw_picture, list_waits, name_machine, render_table


EPYC = {"cpu": "EPYC", "cpu_flags": ["avx2", "avx512f", "avx512_vnni"], "threads": 2}
H100 = {**EPYC, "gpu": "H100"}


def row(part: str, ms: float, context: int = 64, path: str = "", batch: int = 1) -> dict:
    return {"part": part, "batch": batch, "context": context, "ms": {"median": ms}, **({"path": path} if path else {})}


def report(machine: dict, date: str = "2026-11-28T00:00", peers: tuple = (), **variants: list) -> dict:
    subjects = [{"name": name, "rows": rows} for name, rows in variants.items()]
    return {"machine": machine, "date": date, "variants": subjects, "peers": list(peers)}


PICTURE = {"part": "encode", "batch": 1, "ms": {"median": 800.0}}
WHOLE = [PICTURE, row("prefill", 1000.0), row("decode", 200.0, path="generate, dynamic cache")]
PEER = {"name": "llama.cpp", "rows": [row("prefill", 1500.0), row("decode", 250.0)]}


def test_the_first_word_is_a_picture_a_prompt_and_a_step():
    (wait,) = list_waits([report(EPYC, int4=WHOLE)])
    assert (wait.machine, wait.who, wait.date) == ("EPYC, 2 threads, AVX-512 VNNI", "4 bits", "2026-11-28")
    assert wait.first_word == pytest.approx(2.0)
    assert wait.rate == pytest.approx(5.0)


def test_another_program_stands_beside_ours_without_a_picture():
    text = render_table(list_waits([report(EPYC, peers=(PEER,), int4=WHOLE)]))
    assert "| 4 bits | 2.0 s | 5 |" in text
    assert "| llama.cpp | 1.8 s without a picture | 4 |" in text


def test_a_step_is_what_generate_takes_by_the_fastest_of_its_ways():
    steps = [
        row("decode", 10.0, path="forward, compiled"),
        row("decode", 30.0, path="generate, dynamic cache"),
        row("decode", 20.0, path="generate, compiled"),
        row("decode", 5.0, 0, "products alone"),
        row("decode", 5.0, path="generate, compiled", batch=4),
        row("decode", 5.0, 512, "generate, compiled"),
    ]
    (wait,) = list_waits([report(EPYC, int4=[*steps, row("prefill", 1.0), row("prefill", 9.0, 512)])])
    assert wait.ms == {"prefill": 1.0, "decode": 20.0}


def test_runs_of_one_machine_complete_each_other_and_the_first_counts():
    prompts, steps = report(EPYC, "2026-11-27", int4=WHOLE[:2]), report(EPYC, "2026-11-26", int4=WHOLE[2:])
    late = report(EPYC, "2026-11-28", int4=[row("prefill", 1.0)])
    (wait,) = list_waits([prompts, steps, late])
    assert wait.first_word == pytest.approx(2.0)
    assert wait.date == "2026-11-28"
    assert list_waits([prompts]) == []  # no step, no rate


def test_machines_are_named_by_what_they_multiply_with():
    assert name_machine(H100) == "H100"
    assert name_machine({**EPYC, "cpu_flags": ["avx2"]}) == "EPYC, 2 threads, AVX2"
    assert name_machine({**EPYC, "cpu_flags": []}) == "EPYC, 2 threads"


def test_the_picture_has_a_bar_for_each_part_as_long_as_the_part_takes():
    waits = list_waits([report(EPYC, peers=(PEER,), int4=WHOLE), report(H100, bf16=WHOLE)])
    picture = draw_picture(waits)
    root = ElementTree.fromstring(picture)
    bars = [element for element in root.iter() if element.get("class") in ("encode", "prefill", "decode", "rate")]
    bars = [element for element in bars if element.get("width") != "12.0"]  # those of the legend
    assert len(bars) == 4 + 3 + 4
    widths = {(element.get("class"), index): float(element.get("width")) for index, element in enumerate(bars)}
    assert widths["encode", 0] / widths["prefill", 1] == pytest.approx(0.8, rel=0.01)
    assert widths["prefill", 4] / widths["prefill", 1] == pytest.approx(1.5, rel=0.01)
    assert widths["rate", 6] / widths["rate", 3] == pytest.approx(0.8, rel=0.01)
    assert widths["rate", 10] == widths["rate", 3]  # the largest of its kind of machine
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"EPYC, 2 threads, AVX-512 VNNI", "H100", "4 bits", "bfloat16", "llama.cpp", "2.0 s"} <= set(texts)


def test_the_picture_can_be_read_in_the_dark_and_nothing_in_it_leaves_its_frame():
    waits = list_waits([report(EPYC, peers=(PEER,), int4=WHOLE)])
    picture = draw_picture(waits)
    assert "prefers-color-scheme: dark" in picture
    width, height = (int(number) for number in re.search(r'viewBox="0 0 (\d+) (\d+)"', picture).groups())
    for element in ElementTree.fromstring(picture).iter():
        if element.get("x"):
            assert 0 <= float(element.get("x")) + float(element.get("width") or 0) < width
            assert 0 < float(element.get("y")) < height
    assert draw_picture(waits) == picture


def test_names_are_escaped():
    picture = draw_picture(list_waits([report({**EPYC, "cpu": "<A & B>"}, int4=WHOLE)]))
    assert "&lt;A &amp; B&gt;" in picture
    ElementTree.fromstring(picture)
