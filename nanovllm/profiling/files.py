"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path` and rename it into place.

    OSError with one sentence when that fails (say, the disk is full); the old file is then as it was and nothing is
    left beside it. An interrupt leaves the old file too.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror or error}): free some space or choose another folder; "
                      "what was there before is unchanged") from error  # fmt: skip
    finally:
        partial.unlink(missing_ok=True)
