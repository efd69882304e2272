"""Running another program to its end: what it prints, and the last thing it said when it failed."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence


def run_program(name: str, words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a command while what it says on stderr passes through; return what it printed on stdout.

    Raises:
        ValueError: it cannot be started, or failed; with its last words.
    """
    said = ""
    # A file, since a pipe that nobody reads would stop the program while it talks on stderr.
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8") as printed:
        try:
            process = subprocess.Popen(
                words, stdout=printed, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", env=environment
            )
        except OSError as error:
            raise ValueError(f"{name} cannot be started: {error}") from error
        with process:
            for line in process.stderr:
                sys.stderr.write(line)
                said = line.strip() or said
        if process.returncode:
            raise ValueError(f"{name} ended with exit status {process.returncode}: {said or 'it said nothing'}")
        printed.seek(0)
        return printed.read()
