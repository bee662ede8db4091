"""Progress bars, in one place so that all of them look alike and can be turned off."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int, description: str, *, unit: str, enabled: bool) -> tqdm:
    """A bar over `total` units on stderr, to be used in a `with` and moved by `.update(n)`; silent if not enabled."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, unit_scale=True, disable=not enabled)
