"""Files of JSON lines, as tests write and read them."""

import json
from pathlib import Path
from typing import Any


def write_lines(path: str | Path, *lines: Any) -> Path:
    """Write a file of objects, and of bytes where a line shall be none."""
    written = (
        line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines
    )
    path = Path(path)
    path.write_bytes(b"".join(written))
    return path


def read_lines(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line]
