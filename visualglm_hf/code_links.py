# SPDX-License-Identifier: Apache-2.0
"""Links among the code in a folder, as `models/visualglm-tiny` has them: nothing may be written where they lead.

Not here: what is saved, and the writing, which are transformers'.
"""

from os import PathLike
from pathlib import Path


def replace_links(folder: str | PathLike) -> None:
    """Make the code in a folder its own, before code is saved there, since transformers writes through links.

    A link becomes a copy of the file it leads to; one that leads nowhere disappears. There need not be such a folder.
    """
    for path in Path(folder).glob("*.py"):
        if path.is_symlink():
            content = path.read_bytes() if path.is_file() else None
            path.unlink(missing_ok=True)  # every process of a distributed run may be here
            if content is not None:
                path.write_bytes(content)
