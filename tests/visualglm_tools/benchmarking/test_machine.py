"""What a report says about the machine, and does not."""

from visualglm_tools.benchmarking.machine import public_command


def test_a_published_command_has_no_paths():
    words = ["--model", "/home/me/visualglm", "int4=/data/low", "llama.cpp=/opt/llama-bench -m /data/m.gguf -o json"]
    assert public_command(words) == "--model visualglm int4=low 'llama.cpp=llama-bench -m m.gguf -o json'"
