# SPDX-License-Identifier: Apache-2.0
"""Pictures that are not here yet: web addresses to bytes. The only model file that opens a connection.

Standard library only. For programs that a user runs; a server must decide itself which addresses it lets others name.
"""

import http.client
import urllib.request
from collections.abc import Callable, Mapping


DOWNLOAD_TIMEOUT = 30  # seconds
MAX_DOWNLOAD_BYTES = 64 * 1024**2
LONGEST_NAME = 200  # characters of a URL, and of what is wrong with it, shown in an error


def fetch_picture(source):
    """Return the bytes behind an http(s) URL; anything else (path, base64, image, bytes, …) as it is.

    Args:
        source: what `open_picture` takes, or a URL, also as the "path" of a row of datasets.

    Raises:
        ValueError: the URL cannot be read, or is larger than `MAX_DOWNLOAD_BYTES`.
    """
    if isinstance(source, Mapping) and "path" in source and source.get("bytes") is None:
        source = source["path"]
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        return download(source)
    return source


def download(url: str, open_url: Callable = urllib.request.urlopen, max_bytes: int = MAX_DOWNLOAD_BYTES) -> bytes:
    """Return the bytes behind `url`; a `ValueError` as in `fetch_picture`. `open_url` may be choosier than urllib."""
    name = repr(url if len(url) <= LONGEST_NAME else f"{url[:LONGEST_NAME]}...")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "visualglm-hf"})
        with open_url(request, timeout=DOWNLOAD_TIMEOUT) as response:
            data = response.read(max_bytes + 1)
    # URLError and HTTPError are OSErrors; HTTPException for what is no HTTP, ValueError for a malformed URL.
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error)[:LONGEST_NAME]
        raise ValueError(f"Cannot download the picture {name}: {reason}. Save it and pass the file.") from error
    if len(data) > max_bytes:
        raise ValueError(f"The picture {name} is larger than {max_bytes} bytes; scale it down and try again.")
    return data
