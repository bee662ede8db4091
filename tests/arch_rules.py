"""The house rules as functions of source text, for `test_architecture.py`.

Each rule takes one parsed `Module` and returns its violations as `path:line: sentence`. The rules read the syntax
tree, so imports inside functions count and nothing has to be installed or imported. What a rule cannot see: names
built at run time (`importlib.import_module(f"...")`), which is why `nanovllm/__init__.py` has a runtime test as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120

# Which parts of the package each part may import. A part is the name after `nanovllm.`; "" is the package itself.
# utils <- kernels <- layers <- models <- engine <- llm <- server, cli; fusion sits beside models.
CONTRACT = {"config", "outputs", "sampling_params"}  # plain data that users and engine share
ALLOWED: dict[str, set[str]] = {
    "utils": {"utils"},
    "config": {"utils"},
    "outputs": {"utils"},
    "sampling_params": {"config", "utils"},
    "kernels": {"kernels", "utils"},
    "layers": {"layers", "kernels", "config", "sampling_params", "utils"},
    "models": {"models", "layers", "kernels", "config", "utils"},
    "fusion": {"fusion", "layers", "kernels", "config", "utils"},
    "loader": {"loader", "config", "utils"},
    "engine": {"engine", "models", "fusion", "layers", "kernels", "loader", "utils"} | CONTRACT,
    "llm": {"llm", "engine", "loader", "utils"} | CONTRACT,
    "async_llm": {"async_llm", "llm", "engine", "loader", "utils"} | CONTRACT,
    "profiling": {"profiling", "llm", "utils"} | CONTRACT,
    "": {"llm", "async_llm", "fusion"} | CONTRACT,
}
BELOW_THE_TOP = set(ALLOWED)
ALLOWED["server"] = {"server"} | BELOW_THE_TOP
ALLOWED["tuning"] = {"tuning", "kernels", "config", "utils"}  # measures kernels; only the command line imports it
ALLOWED["cli"] = {"cli", "server", "tuning"} | BELOW_THE_TOP
ALLOWED["__main__"] = {"cli"}

OUTSIDE = {"benchmarks", "tests", "examples", "scripts"}  # the package never imports its own surroundings

# Modules that run without torch, triton and numpy, whatever they import in turn.
PURE = {f"nanovllm.engine.{name}" for name in ("sequence", "block_manager", "scheduler", "batch")} | {
    *(
        f"nanovllm.profiling.{name}"
        for name in ("trace", "recording", "attribute", "facts", "distil", "report", "timeline", "nsys", "ncu", "drive")
    ),
    "nanovllm",
    "nanovllm.config",
    "nanovllm.outputs",
    "nanovllm.sampling_params",
    "nanovllm.kernels.launch_config",
    "nanovllm.kernels.fusion_config",
    "nanovllm.kernels.fusion_table",
    "nanovllm.tuning.turns",
}
HEAVY = {"torch", "triton", "numpy", "transformers"}

# Third-party packages with one home: the only file (or folder) that may import them, and why.
HOMES = {
    "triton": ("nanovllm/kernels/", "jitted code and its launch live there"),
    "flash_attn": ("nanovllm/layers/attention/flash.py", "optional backend"),
    "flash_attn_interface": ("nanovllm/layers/attention/flash.py", "optional backend"),
    "flashinfer": ("nanovllm/layers/attention/flashinfer.py", "optional backend"),
    "transformers": ("nanovllm/loader/tokenizer.py", "the fallback for tokenizers that exist nowhere else"),
    "starlette": ("nanovllm/server/", "the optional extra"),
    "uvicorn": ("nanovllm/server/", "the optional extra"),
    "llguidance": ("nanovllm/server/grammar.py", "the optional extra"),
}
# Of the extra `server`, which only the command line imports, and in a function.
EXTRA = {"starlette", "uvicorn", "llguidance"}
LAZY = set(HOMES) - {"triton"} - EXTRA  # imported inside a function, when they are asked for

MUTATORS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """One source file: its path relative to the repository, its text and its tree."""

    path: str
    source: str
    tree: ast.Module

    @classmethod
    def parse(cls, path: str, source: str) -> Module:
        return cls(path, source, ast.parse(source, path))

    @property
    def name(self) -> str:
        """Dotted name: nanovllm/engine/__init__.py is `nanovllm.engine`."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def part(self) -> str:
        """The name after `nanovllm.`, or "" for the package itself."""
        return (self.name.split(".") + [""])[1]

    def at(self, node: ast.AST, sentence: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {sentence}"


@dataclass(frozen=True)
class Import:
    """One imported name: `target` as written (made absolute), and when it happens."""

    node: ast.AST
    target: str
    typing_only: bool  # under `if TYPE_CHECKING`
    in_function: bool

    @property
    def top(self) -> str:
        return self.target.split(".")[0]


def read_tree(root: Path, folder: str) -> list[Module]:
    """All Python files under `root/folder`, in order of their paths."""
    files = sorted((root / folder).rglob("*.py"))
    return [Module.parse(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def imports(module: Module) -> Iterator[Import]:
    """Every import of a module, those inside functions and under TYPE_CHECKING included."""

    def visit(node: ast.AST, typing_only: bool, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node, alias.name, typing_only, in_function)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            for alias in node.names:
                yield Import(node, f"{base}.{alias.name}", typing_only, in_function)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            for name in (a.value for a in node.args[:1] if isinstance(a, ast.Constant)):
                yield Import(node, str(name), typing_only, in_function)
        if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
            for child in node.body:
                yield from visit(child, True, in_function)
            for child in node.orelse:
                yield from visit(child, typing_only, in_function)
            return
        in_function = in_function or isinstance(node, FUNCTIONS)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, typing_only, in_function)

    yield from visit(module.tree, False, False)


def _name(node: ast.AST) -> str:
    """The last name of a dotted expression: `jit` for `triton.jit` and for `triton.jit(...)`."""
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """The module that a `from ... import` names, relative dots resolved."""
    if not node.level:
        return node.module or ""
    package = module.name.split(".") if module.path.endswith("__init__.py") else module.name.split(".")[:-1]
    parts = package[: len(package) - node.level + 1] + ([node.module] if node.module else [])
    return ".".join(parts)


def directions(module: Module) -> list[str]:
    """Imports follow ALLOWED; annotations (TYPE_CHECKING) do so too."""
    if module.part not in ALLOWED:
        return [module.at(module.tree, f"part {module.part!r} has no place in arch_rules.ALLOWED: give it one")]
    found = []
    for item in imports(module):
        if item.top in OUTSIDE:
            found.append(module.at(item.node, f"the package must not import {item.top}"))
        if item.top != "nanovllm" or item.target == "nanovllm.__version__":
            continue
        part = (item.target.split(".") + [""])[1]
        if part in ALLOWED and part not in ALLOWED[module.part] and part != module.part:
            found.append(module.at(item.node, f"{module.part or 'nanovllm'} must not import {part} ({item.target})"))
        elif part not in ALLOWED and module.part != "":  # `from nanovllm import LLM` inside the package
            found.append(module.at(item.node, f"import {item.target} from the module that defines it"))
    return found


def homes(module: Module) -> list[str]:
    """Optional and hardware-bound packages are imported only where HOMES says, the LAZY ones only in functions."""
    found = []
    for item in imports(module):
        if item.top in HOMES and not module.path.startswith(HOMES[item.top][0]):
            place, why = HOMES[item.top]
            found.append(module.at(item.node, f"{item.top} may be imported only in {place}: {why}"))
        elif item.top in LAZY and not (item.in_function or item.typing_only):
            found.append(module.at(item.node, f"{item.top} must be imported inside the function that needs it"))
    return found


def purity(modules: list[Module]) -> list[str]:
    """PURE modules reach no HEAVY package, not even through what they import (or through a package's __init__)."""
    by_name = {module.name: module for module in modules}
    found = []
    for start in sorted(PURE & set(by_name)):
        seen, todo = {start}, [(start, start)]
        while todo:
            name, chain = todo.pop()
            for item in imports(by_name[name]):
                if item.typing_only or (start == "nanovllm" and item.in_function):
                    continue
                if item.top in HEAVY:
                    found.append(by_name[start].at(item.node, f"{chain} must stay free of {item.top}"))
                pieces = item.target.split(".")
                for reached in (".".join(pieces[: i + 1]) for i in range(len(pieces))):
                    if reached in by_name and reached not in seen and reached != "nanovllm":
                        seen.add(reached)
                        todo.append((reached, f"{chain} -> {reached}"))
    return found


def is_jitted(function: ast.AST) -> bool:
    """Whether Triton compiles a function: decorated with `jit`, `triton.jit` or a call of either."""
    return any(_name(decorator) == "jit" for decorator in getattr(function, "decorator_list", []))


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions with their qualified names, methods and nested ones included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            name = f"{prefix}{node.name}"
            if isinstance(node, FUNCTIONS):
                yield name, node
            yield from functions(node, f"{name}.")
        else:
            yield from functions(node, prefix)


def lines_of(node: ast.AST) -> int:
    """Lines from `def` to the end, decorators not counted."""
    return (node.end_lineno or 0) - node.lineno + 1  # type: ignore[attr-defined]


def sizes(module: Module, exceptions: dict[str, str]) -> list[str]:
    """Files and functions stay small; `exceptions` maps "path" or "path:function" to the reason why not."""
    found = []
    total = len(module.source.splitlines())
    if total > MAX_FILE_LINES and module.path not in exceptions:
        found.append(module.at(module.tree, f"{total} lines; a file has at most {MAX_FILE_LINES}"))
    for name, node in functions(module.tree):
        limit = MAX_KERNEL_LINES if is_jitted(node) else MAX_FUNCTION_LINES
        if lines_of(node) > limit and f"{module.path}:{name}" not in exceptions:
            found.append(module.at(node, f"{name} has {lines_of(node)} lines; at most {limit}"))
    return found


def _local_names(function: ast.AST) -> set[str]:
    """Names that a function binds itself: parameters, and assignments that no `global` redirects."""
    names, redirected = set(), set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Global):
            redirected.update(node.names)
    return names - redirected


def _base(node: ast.AST) -> str | None:
    """The variable under a chain of attributes and subscripts: `a` for `a.b[c].d`."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def shared_state(module: Module) -> list[str]:
    """No module-level "current context": no function changes a module's variables or a class's attributes."""
    variables, classes = set(), set()
    for statement in module.tree.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            variables.update(t.id for t in targets if isinstance(t, ast.Name))
        elif isinstance(statement, ast.ClassDef):
            classes.add(statement.name)
        elif isinstance(statement, ast.ImportFrom):
            classes.update(a.asname or a.name for a in statement.names if (a.asname or a.name)[:1].isupper())
    found = []
    for name, function in functions(module.tree):
        shared = (variables | classes) - _local_names(function)
        for node in ast.walk(function):
            changed = None
            if isinstance(node, ast.Global):
                changed = ", ".join(node.names)
            elif isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
                changed = _base(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                changed = _base(node.func) if _base(node.func) in variables else None
            if isinstance(node, ast.Global) or (changed in shared):
                found.append(module.at(node, f"{name} changes the module-level {changed}: pass it as an argument"))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and _name(node) == "ContextVar":
            found.append(module.at(node, "a context variable is a hidden argument: pass it"))
    return found


def errors(module: Module) -> list[str]:
    """No `assert` outside kernels (users must not meet it), and no exception is swallowed."""
    inside_kernels = {
        id(inner) for _, function in functions(module.tree) if is_jitted(function) for inner in ast.walk(function)
    }
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assert) and id(node) not in inside_kernels:
            found.append(module.at(node, "raise an error with a sentence instead of `assert`"))
        elif isinstance(node, ast.ExceptHandler):
            caught = {_name(n) for n in ast.walk(node.type)} if node.type else {"BaseException"}
            broad = caught & {"Exception", "BaseException"}
            silent = all(isinstance(s, (ast.Pass, ast.Continue)) or _is_ellipsis(s) for s in node.body)
            if node.type is None:
                found.append(module.at(node, "name the exception: bare `except:` also catches KeyboardInterrupt"))
            elif broad and silent:
                found.append(module.at(node, "a broad `except` must do something with the error"))
        elif isinstance(node, ast.Call) and _name(node.func) == "suppress":
            broad = {_name(argument) for argument in node.args} & {"Exception", "BaseException"}
            found += [module.at(node, "suppress(Exception) swallows every error")] if broad else []
    return found


def _is_ellipsis(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def no_autotune(module: Module) -> list[str]:
    """Launch configurations are data: no `@triton.autotune`."""
    return [
        module.at(node, "kernels never tune themselves: put the configuration into launch_config")
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.Name, ast.Attribute)) and _name(node) == "autotune"
    ]


def docstrings(module: Module) -> list[str]:
    """Every file says what it is, and every public class and function of a module what it does."""
    found = []
    if not ast.get_docstring(module.tree):
        found.append(module.at(module.tree, "the module has no docstring"))
    for node in module.tree.body:
        public = isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            found.append(module.at(node, f"{node.name} has no docstring"))
    return found


def annotations(module: Module) -> list[str]:
    """Functions are annotated, arguments and result; Triton's pointers have no type to write, so kernels need none."""
    found = []
    for name, node in functions(module.tree):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [a.arg for a in arguments if a and a.annotation is None and a.arg not in ("self", "cls")]
        if (bare or node.returns is None) and not is_jitted(node):
            found.append(module.at(node, f"{name} lacks annotations: {', '.join(bare) or 'its result'}"))
    return found
