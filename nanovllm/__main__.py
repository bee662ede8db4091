"""`python -m nanovllm COMMAND`: the command line where the package lies in a folder and is not installed."""

from __future__ import annotations

import sys

from nanovllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
