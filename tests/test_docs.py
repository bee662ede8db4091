"""The documents are true: their Python runs and prints what they say, their paths exist, their links lead somewhere.

Conventions for `docs/*.md` and `README.md`:
* a ```python block runs; the blocks of one file share a namespace, in a process of its own without a GPU;
* a ```text block right below a ```python block is what that block prints, to the letter;
* `<!-- not run: reason -->` right above a ```python block (one that needs a model, say): it must only compile.
`python tests/test_docs.py` rewrites the printed text; read the difference before you keep it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("README.md")])]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.*-->\s*$")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
OUR_PATH = re.compile(r"(?:nanovllm|tests|benchmarks|examples|scripts|docs)/[\w./-]*")
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)

# Reads [{"line", "code"}] and prints [what each block printed]; a failing block is named by its line in the document.
RUNNER = """
import contextlib, io, json, sys
namespace = {"__name__": "__main__"}
printed = []
for block in json.load(sys.stdin):
    out = io.StringIO()
    code = compile("\\n" * block["line"] + block["code"], sys.argv[1], "exec")
    with contextlib.redirect_stdout(out):
        exec(code, namespace)
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


class Block(NamedTuple):
    """A ```python block: where its code starts, whether it runs, and what it is said to print."""

    line: int
    code: str
    runs: bool
    output: str | None
    span: tuple[int, int]  # of the output in the document


def python_blocks(text: str) -> list[Block]:
    """The Python blocks of a document, in order."""
    blocks = []
    for match in FENCE.finditer(text):
        if match[1] != "python":
            continue
        below = FENCE.match(text, len(text) - len(text[match.end() :].lstrip("\n")))
        shown = below if below and below[1] == "text" else None
        runs = not NOT_RUN.search(text[: match.start()])
        output, span = (shown[2], shown.span(2)) if shown else (None, (0, 0))
        blocks.append(Block(text.count("\n", 0, match.start(2)), match[2], runs, output, span))
    return blocks


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", text)


def missing_paths(text: str) -> list[str]:
    """Paths of this repository, written as code in the prose, that do not exist."""
    paths = [span for span in CODE_SPAN.findall(prose(text)) if OUR_PATH.fullmatch(span)]
    return [path for path in paths if not (ROOT / path).exists()]


def anchors(text: str) -> set[str]:
    """The anchors GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: str, text: str) -> list[str]:
    """Relative links that lead to no file, or to no heading of a document."""
    broken = []
    for link in (inline or reference for inline, reference in LINK.findall(prose(text))):
        if re.match(r"\w+:", link):
            continue  # the web is not tested
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def run_blocks(document: str, blocks: list[Block]) -> list[str]:
    """Run the blocks in a fresh interpreter, on the CPU; returns what each printed."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    sent = json.dumps([{"line": block.line, "code": block.code} for block in blocks])
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, document],
        input=sent,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=env,
    )
    assert done.returncode == 0, f"{document}: {done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_runs_and_prints_what_is_written(document: str) -> None:
    blocks = python_blocks((ROOT / document).read_text(encoding="utf-8"))
    for block in blocks:
        compile(block.code, f"{document}:{block.line}", "exec")
    running = [block for block in blocks if block.runs]
    if not running:
        return
    for block, printed in zip(running, run_blocks(document, running), strict=True):
        if block.output is not None:
            assert printed.rstrip() == block.output.rstrip(), f"{document}:{block.line} prints something else"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    assert not (missing := missing_paths((ROOT / document).read_text(encoding="utf-8"))), missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_somewhere(document: str) -> None:
    assert not (broken := broken_links(document, (ROOT / document).read_text(encoding="utf-8"))), broken


def test_the_checks_can_fail() -> None:
    """Each check, shown a document that breaks it."""
    bad = "# 1\n`nanovllm/nowhere.py`, [a](gone.md), [b](#two), [c]\n\n[c]: gone_too.md\n\n```python\nprint(1)\n```\n\n"
    assert missing_paths(bad) == ["nanovllm/nowhere.py"]
    assert broken_links("docs/x.md", bad)[0] == "gone.md" and len(broken_links("docs/x.md", bad)) == 3
    (block,) = python_blocks(bad + "```text\n2\n```\n")
    assert (block.code, block.runs, block.output) == ("print(1)\n", True, "2\n")
    assert run_blocks("x.md", [block]) == ["1\n"]
    assert not python_blocks("<!-- not run: needs a model -->\n```python\nboom\n```\n")[0].runs
    with pytest.raises(AssertionError, match="line 3"):
        run_blocks("x.md", [Block(2, "1 / 0", True, None, (0, 0))])


def test_there_are_documents() -> None:
    assert DOCUMENTS


def rewrite(document: str) -> None:
    """Put what the blocks print today into the document."""
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    running = [block for block in python_blocks(text) if block.runs]
    for block, printed in reversed(list(zip(running, run_blocks(document, running), strict=True))):
        if block.output is not None:
            start, end = block.span
            text = text[:start] + printed.rstrip() + "\n" + text[end:]
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in DOCUMENTS:
        rewrite(name)
