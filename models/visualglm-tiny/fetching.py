# Copyright 2026 The visualglm-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Pictures that are not here yet: web addresses and base64 text to bytes. The only model file that opens a connection.

Standard library only. For programs that a user runs; a server must decide itself which addresses it lets others name.
"""

import base64
import binascii
import http.client
import os
import urllib.request
from collections.abc import Callable


DOWNLOAD_TIMEOUT = 30  # seconds
MAX_DOWNLOAD_BYTES = 64 * 1024**2
PICTURE_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


def fetch_picture(source):
    """Return the bytes of an http(s) URL or of base64 text; anything else (path, image, bytes, …) as it is.

    Raises:
        ValueError: the URL cannot be read, or is larger than `MAX_DOWNLOAD_BYTES`.
    """
    if not isinstance(source, str):
        return source
    if source.lower().startswith(("http://", "https://")):
        return download(source)
    decoded = None if os.path.exists(source) else decode_base64(source)
    return source if decoded is None else decoded


def download(url: str, open_url: Callable = urllib.request.urlopen, max_bytes: int = MAX_DOWNLOAD_BYTES) -> bytes:
    """Return the bytes behind `url`; a `ValueError` as in `fetch_picture`. `open_url` may be choosier than urllib."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "visualglm-hf"})
        with open_url(request, timeout=DOWNLOAD_TIMEOUT) as response:
            data = response.read(max_bytes + 1)
    # URLError and HTTPError are OSErrors; HTTPException for what is no HTTP, ValueError for a malformed URL.
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"Cannot download the picture {url!r}: {error}. Save it and pass the file.") from error
    if len(data) > max_bytes:
        raise ValueError(f"The picture {url!r} is larger than {max_bytes} bytes; scale it down and try again.")
    return data


def decode_base64(text: str) -> bytes | None:
    """The picture in base64 text, with or without line breaks; None if it is something else, such as a path."""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):  # ValueError for characters outside ASCII
        return None
    # A mistyped path can be base64 too ("photos"), but not of a picture.
    return data if data.startswith(PICTURE_SIGNATURES) else None
