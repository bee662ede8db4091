"""The package obeys its architecture: import directions, purity, sizes, no hidden state, no swallowed errors.

`pytest tests/test_architecture.py -s` prints the sizes. The rules are in `arch_rules.py`; the second half of this
file shows each of them a source that breaks it, so that a rule that sees nothing fails here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from arch_rules import (
    EXTRA,
    HEAVY,
    LAZY,
    PURE,
    Module,
    annotations,
    directions,
    docstrings,
    errors,
    functions,
    homes,
    imports,
    is_jitted,
    lines_of,
    no_autotune,
    purity,
    read_tree,
    shared_state,
    sizes,
)

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = read_tree(ROOT, "nanovllm")
AROUND = [module for folder in ("benchmarks", "examples", "scripts") for module in read_tree(ROOT, folder)]
RULES = {
    rule.__name__: rule for rule in (directions, homes, shared_state, errors, no_autotune, docstrings, annotations)
}

# "path" or "path:function" -> why it may be longer than the rule says. An entry that is no longer needed fails.
SIZE_EXCEPTIONS: dict[str, str] = {}


# ---------------------------------------------------------------------------------------------- the package itself


@pytest.mark.parametrize("rule", RULES)
def test_package_obeys(rule: str) -> None:
    violations = [violation for module in PACKAGE for violation in RULES[rule](module)]
    assert not violations, "\n" + "\n".join(violations)


def test_pure_modules_reach_no_heavy_package() -> None:
    missing = sorted(name for name in PURE if name not in {module.name for module in PACKAGE})
    assert not missing, f"pure modules that do not exist: {missing}"
    assert not (violations := purity(PACKAGE)), "\n" + "\n".join(violations)


def test_sizes() -> None:
    for module in sorted(PACKAGE, key=lambda m: -len(m.source.splitlines())):
        longest = max(((lines_of(node), name) for name, node in functions(module.tree)), default=(0, "-"))
        print(f"{len(module.source.splitlines()):5d} lines  {module.path:50s} longest: {longest[1]} ({longest[0]})")
    print(f"{sum(len(m.source.splitlines()) for m in PACKAGE):5d} lines in {len(PACKAGE)} files")
    violations = [violation for module in PACKAGE + AROUND for violation in sizes(module, SIZE_EXCEPTIONS)]
    assert not violations, "\n" + "\n".join(violations)


def test_every_size_exception_is_needed_and_explained() -> None:
    sources = {module.path: module for module in PACKAGE + AROUND}
    for key, reason in SIZE_EXCEPTIONS.items():
        path = key.split(":")[0]
        assert len(reason) > 20, f"{key}: say why"
        assert path in sources, f"{key}: no such file"
        without = {k: v for k, v in SIZE_EXCEPTIONS.items() if k != key}
        assert sizes(sources[path], without), f"{key} is within the limits: remove the exception"


def test_imports_are_declared_dependencies() -> None:
    """What the package imports stands in pyproject.toml, and what stands there is imported."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    declared = {name.lower() for name in re.findall(r'^\s+"([A-Za-z0-9_]+)', block.group(1), re.MULTILINE)}
    used = {item.top for module in PACKAGE for item in imports(module) if not item.typing_only}
    third_party = used - set(sys.stdlib_module_names) - {"nanovllm"} - LAZY
    assert third_party == declared | EXTRA
    extra = re.search(r"^server = \[(.*)\]$", text, re.MULTILINE)
    assert extra is not None and set(re.findall(r'"([a-z_]+)>=', extra.group(1))) == EXTRA


def test_the_extra_is_imported_when_it_is_asked_for() -> None:
    """The command line must start without it."""
    for module in PACKAGE:
        for item in imports(module):
            if item.target.startswith("nanovllm.server") and module.part != "server" and not item.typing_only:
                assert item.in_function, module.at(item.node, f"{item.target} needs the extra: import it in a function")


def test_pins_cover_the_declared_dependencies() -> None:
    pins = {}
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-model.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(("#", "-r")):
                match = re.match(r"([A-Za-z0-9_.-]+)==[0-9][0-9.a-z+]*(?:$|;)", line)
                assert match is not None, f"{name}: {line!r} is not an exact pin"
                pins.setdefault(match.group(1).lower(), name)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = {name.lower() for name in re.findall(r'^\s+"([A-Za-z0-9_]+)>=', text, re.MULTILINE)}
    assert declared <= {name for name, file in pins.items() if file == "requirements.txt"}


# ------------------------------------------------------------------------------- the rules see what they are for

DOC = '"""Says what it is."""\n'

BROKEN = {
    # rule, path, source, a piece of the sentence that must come
    "kernels import layers": (
        "directions",
        "nanovllm/kernels/a.py",
        "from nanovllm.layers.norm import RMSNorm",
        "layers",
    ),
    "layers import models": ("directions", "nanovllm/layers/a.py", "import nanovllm.models.llama", "models"),
    "models import engine": ("directions", "nanovllm/models/a.py", "from nanovllm.engine import batch", "engine"),
    "engine imports llm": ("directions", "nanovllm/engine/a.py", "from nanovllm.llm import LLM", "llm"),
    "kernels import config": (
        "directions",
        "nanovllm/kernels/a.py",
        "from nanovllm.config import ModelConfig",
        "config",
    ),
    "loader imports models": ("directions", "nanovllm/loader/a.py", "from nanovllm.models import registry", "models"),
    "fusion imports models": ("directions", "nanovllm/fusion/a.py", "from nanovllm.models import llama", "models"),
    "llm imports cli": ("directions", "nanovllm/llm.py", "from nanovllm.cli import main", "cli"),
    "engine imports tuning": ("directions", "nanovllm/engine/a.py", "from nanovllm.tuning import cases", "tuning"),
    "kernels import tuning": ("directions", "nanovllm/kernels/a.py", "import nanovllm.tuning.table", "tuning"),
    "engine imports server": ("directions", "nanovllm/engine/a.py", "import nanovllm.server.api", "server"),
    "in a function": ("directions", "nanovllm/layers/a.py", "def f():\n    from nanovllm.engine import x", "engine"),
    "by name": ("directions", "nanovllm/layers/a.py", "import_module('nanovllm.engine.x')", "engine"),
    "relative": ("directions", "nanovllm/layers/attention/a.py", "from ...engine import batch", "engine"),
    "from the package": ("directions", "nanovllm/layers/a.py", "from nanovllm import models", "models"),
    "the facade": ("directions", "nanovllm/engine/a.py", "from nanovllm import LLM", "the module that defines it"),
    "for annotations": (
        "directions",
        "nanovllm/layers/a.py",
        "if TYPE_CHECKING:\n    from nanovllm.engine import x",
        "engine",
    ),
    "benchmarks": ("directions", "nanovllm/cli.py", "from benchmarks.harness import run", "benchmarks"),
    "unknown part": ("directions", "nanovllm/misc/a.py", "x = 1", "no place"),
    "triton in layers": ("homes", "nanovllm/layers/a.py", "import triton.language as tl", "triton"),
    "flash_attn elsewhere": ("homes", "nanovllm/layers/a.py", "def f():\n    import flash_attn", "flash_attn"),
    "flashinfer elsewhere": ("homes", "nanovllm/engine/a.py", "def f():\n    from flashinfer import x", "flashinfer"),
    "flash_attn eagerly": (
        "homes",
        "nanovllm/layers/attention/flash.py",
        "import flash_attn",
        "inside the function",
    ),
    "starlette in cli": ("homes", "nanovllm/cli/a.py", "def f():\n    import starlette.routing", "the optional extra"),
    "transformers in engine": ("homes", "nanovllm/engine/a.py", "def f():\n    import transformers", "transformers"),
    "global": ("shared_state", "nanovllm/engine/a.py", "_X = None\ndef f(x):\n    global _X\n    _X = x", "_X"),
    "item of a module variable": ("shared_state", "nanovllm/a.py", "X = {}\ndef f(k):\n    X[k] = 1", "X"),
    "attribute of a module variable": ("shared_state", "nanovllm/a.py", "c = C()\ndef f(k):\n    c.now = k", "c"),
    "append to a module variable": ("shared_state", "nanovllm/a.py", "X = []\ndef f(k):\n    X.append(k)", "X"),
    "class attribute": ("shared_state", "nanovllm/a.py", "class S:\n    n = 1\ndef f():\n    S.n = 2", "S"),
    "imported class's attribute": ("shared_state", "nanovllm/a.py", "from x import S\ndef f():\n    S.n = 2", "S"),
    "context variable": (
        "shared_state",
        "nanovllm/a.py",
        "import contextvars\nx = contextvars.ContextVar('x')",
        "hidden",
    ),
    "assert": ("errors", "nanovllm/a.py", "def f(x):\n    assert x", "assert"),
    "bare except": ("errors", "nanovllm/a.py", "try:\n    x()\nexcept:\n    raise", "KeyboardInterrupt"),
    "except Exception: pass": ("errors", "nanovllm/a.py", "try:\n    x()\nexcept Exception:\n    pass", "broad"),
    "in a tuple": ("errors", "nanovllm/a.py", "try:\n    x()\nexcept (OSError, Exception) as e:\n    ...", "broad"),
    "continue": (
        "errors",
        "nanovllm/a.py",
        "for i in y:\n    try:\n        x()\n    except Exception:\n        continue",
        "broad",
    ),
    "suppress": ("errors", "nanovllm/a.py", "with contextlib.suppress(Exception):\n    x()", "swallows"),
    "autotune": ("no_autotune", "nanovllm/kernels/a.py", "@triton.autotune(configs=[], key=[])\ndef k(): ...", "tune"),
    "no function docstring": ("docstrings", "nanovllm/a.py", DOC + "def f():\n    return 1", "f has no docstring"),
    "no class docstring": ("docstrings", "nanovllm/a.py", DOC + "class A:\n    x = 1", "A has no docstring"),
    "bare argument": ("annotations", "nanovllm/a.py", "class A:\n    def f(self, x, y: int) -> int: ...", "A.f lacks"),
    "bare result": ("annotations", "nanovllm/a.py", "def f(x: int): ...", "its result"),
    "bare keyword": ("annotations", "nanovllm/a.py", "def f(*, x) -> int: ...", "x"),
    "bare variable arguments": ("annotations", "nanovllm/a.py", "def f(*args, **kwargs) -> int: ...", "args, kwargs"),
    "no module docstring": ("docstrings", "nanovllm/a.py", "x = 1", "module has no docstring"),
}

SOUND = {
    "downwards": ("directions", "nanovllm/engine/a.py", "from nanovllm.models.registry import build_model"),
    "relative inside": ("directions", "nanovllm/layers/attention/a.py", "from .backend import AttentionBackend"),
    "cli imports server": ("directions", "nanovllm/cli.py", "from nanovllm.server import api"),
    "the version": ("directions", "nanovllm/cli/a.py", "from nanovllm import __version__"),
    "flash_attn at home": ("homes", "nanovllm/layers/attention/flash.py", "def f():\n    import flash_attn"),
    "local of the same name": ("shared_state", "nanovllm/a.py", "x = {}\ndef f():\n    x = {}\n    x['a'] = 1"),
    "own attributes": (
        "shared_state",
        "nanovllm/a.py",
        "class A:\n    def f(self):\n        self.x = [1]\n        self.x.pop()",
    ),
    "assert in a kernel": ("errors", "nanovllm/kernels/a.py", "@triton.jit\ndef k(N):\n    assert N"),
    "assert in a lazy kernel": ("errors", "nanovllm/kernels/a.py", "@jit(unaligned=())\ndef k(N):\n    assert N"),
    "handled": ("errors", "nanovllm/a.py", "try:\n    x()\nexcept Exception as error:\n    log(error)"),
    "narrow": ("errors", "nanovllm/a.py", "try:\n    x()\nexcept OSError:\n    pass"),
    "annotated": ("annotations", "nanovllm/a.py", "class A:\n    def f(self, x: int, *a: int) -> None: ..."),
    "kernel": ("annotations", "nanovllm/kernels/a.py", "@jit()\ndef k(x_ptr, N: tl.constexpr): ..."),
    "private": ("docstrings", "nanovllm/a.py", DOC + "def _f():\n    return 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_rule_catches(case: str) -> None:
    rule, path, source, piece = BROKEN[case]
    violations = RULES[rule](Module.parse(path, source))
    assert any(piece in violation for violation in violations), violations


@pytest.mark.parametrize("case", SOUND)
def test_rule_accepts(case: str) -> None:
    rule, path, source = SOUND[case]
    assert RULES[rule](Module.parse(path, source)) == []


@pytest.mark.parametrize("heavy", sorted(HEAVY))
@pytest.mark.parametrize(
    ("helper", "statement"),
    [
        ("engine/scheduler.py", "import {}"),
        ("engine/scheduler.py", "def f():\n    import {}"),
        ("engine/__init__.py", "import {}"),
        ("utils/helper.py", "from {} import x"),
    ],
)
def test_purity_catches_what_is_reached_indirectly(heavy: str, helper: str, statement: str) -> None:
    sources = {
        "engine/__init__.py": "",
        "engine/scheduler.py": "from nanovllm.utils.helper import x\nimport nanovllm.engine",
        "utils/helper.py": "",
    }
    sources[helper] += "\n" + statement.format(heavy)
    violations = purity([Module.parse(f"nanovllm/{path}", source) for path, source in sources.items()])
    assert any(f"must stay free of {heavy}" in violation for violation in violations)


def test_purity_accepts_annotations() -> None:
    source = "if TYPE_CHECKING:\n    import torch\nimport heapq"
    assert purity([Module.parse("nanovllm/engine/scheduler.py", source)]) == []


@pytest.mark.parametrize(
    ("head", "lines", "caught"),
    [
        ("def f():", 60, False),
        ("def f():", 61, True),
        ("async def f():", 61, True),
        ("@triton.jit\ndef f():", 120, False),
        ("@jit(unaligned=('x',))\ndef f():", 121, True),
        ("class A:\n  def f(self):", 61, True),
    ],
)
def test_sizes_of_functions(head: str, lines: int, caught: bool) -> None:
    module = Module.parse("nanovllm/a.py", head + "\n    x = 1" * (lines - 1))
    assert bool(sizes(module, {})) is caught
    name = "A.f" if head.startswith("class") else "f"
    assert sizes(module, {f"nanovllm/a.py:{name}": "a reason"}) == []


@pytest.mark.parametrize(("lines", "caught"), [(400, False), (401, True)])
def test_sizes_of_files(lines: int, caught: bool) -> None:
    assert bool(sizes(Module.parse("nanovllm/a.py", "x = 1\n" * lines), {})) is caught


def test_jitted_functions_are_recognised() -> None:
    tree = Module.parse("a.py", "@jit()\ndef a(): ...\n@triton.jit\ndef b(): ...\n@functools.cache\ndef c(): ...").tree
    assert [is_jitted(node) for _, node in functions(tree)] == [True, True, False]
