"""A picture of every timeline: `screenshot.png` beside each `timeline.html`, drawn by a headless Chromium.

python benchmarks/profiling/screenshot.py [FOLDER ...]      default: all folders of benchmarks/nsight_profiles
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

PROFILES = Path(__file__).resolve().parents[1] / "nsight_profiles"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> int:
    """Draw; status 1 and a sentence when there is no browser or a picture fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="*", type=Path)
    parser.add_argument("--one-layer", action="store_true", help="zoomed to one layer")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no browser found (tried {', '.join(BROWSERS)}): install chromium", file=sys.stderr)
        return 1
    pages = [folder / "timeline.html" for folder in args.folder] or sorted(PROFILES.glob("*/timeline.html"))
    failed = [page for page in pages if not shoot(browser, page, args.one_layer)]
    for page in failed:
        print(f"no picture of {page}", file=sys.stderr)
    return int(bool(failed))


def shoot(browser: str, page: Path, one_layer: bool) -> bool:
    """Draw one page, 1360 pixels wide; whether that worked."""
    target = page.with_name("screenshot.png")
    url = page.resolve().as_uri() + ("#one-layer" if one_layer else "")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1360,1240"]
    done = subprocess.run([*command, f"--screenshot={target}", url], capture_output=True, timeout=120, check=False)
    return done.returncode == 0 and target.exists()


if __name__ == "__main__":
    sys.exit(main())
