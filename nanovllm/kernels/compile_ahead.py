"""Kernels compiled side by side: a start with an empty cache waits for some fifty of them, one or two seconds each.

Triton compiles a kernel at its first launch, one after the other while the other cores idle. Here threads do it: what
a compilation holds Python's lock for, 8 % of it with Triton 3.7 and 13 % with 3.6, is the way from Python to Triton's
first form of the kernel; MLIR, LLVM and ptxas need none. So nothing goes to other processes, and none can be left
behind. Which kernels there are is not derived but rehearsed: what the start will run is run with every launch replaced
by the order to compile. A start that finds its kernels in Triton's cache on disk rehearses nothing.

The place where this hooks in is that of Triton's own `AsyncCompileMode` (3.5 and later). With an older Triton, on a
machine with one core and for a kernel whose thread failed, the launch compiles, as it would without this module.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from typing import Any

from nanovllm.utils.device import usable_cores
from nanovllm.utils.progress import progress_bar

MAX_THREADS = 16  # the part that holds the lock leaves no work for more


class _Missing(BaseException):
    """A kernel had to be compiled: the work is abandoned, rehearsed, done again. No `except Exception` may stop it."""


@functools.cache
def kernel_class() -> type[Any]:
    """`triton.JITFunction` with launches that a rehearsal can replace; itself where Triton has no such mode."""
    import triton

    try:
        from triton.runtime._async_compile import active_mode
    except ImportError:
        return triton.JITFunction

    current, launcher = active_mode.get, triton.JITFunction.__getitem__  # every launch passes here

    class Kernel(triton.JITFunction):
        """A kernel of this package."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            """What launches it, or orders it if a rehearsal is on in this thread."""
            mode = current()
            if mode is not None and isinstance(mode, _Rehearsal):
                return functools.partial(mode.order, self)
            return launcher(self, grid)

    return Kernel


class _Later:
    """A kernel that a thread compiles. Triton takes it for the kernel, and may keep it."""

    def __init__(self, compile: Callable[[], Any], finalize: Callable[[Any], object], pool: Executor) -> None:
        self._compile, self._finalize = compile, finalize
        self.future: Future[Any] = pool.submit(_with_launcher, compile)
        self._kernel: Any = None

    def result(self) -> Any:
        """The kernel. What its thread did not manage is tried again here, and raises as a launch would."""
        if self._kernel is None:
            try:
                kernel = self.future.result()
            except Exception:  # of the compiler; or it was cancelled
                kernel = self._compile()
            self._finalize(kernel)
            self._kernel = kernel
        return self._kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.result(), name)


def _with_launcher(compile: Callable[[], Any]) -> Any:
    """The kernel, and in Triton's cache the C function that launches it, if this Triton makes one for each."""
    from triton.runtime import driver

    kernel = compile()
    driver.active.launcher_cls(kernel.src, kernel.metadata)  # what is wrong with it, the kernel's launch will say
    return kernel


class _Rehearsal:
    """What Triton calls a mode of asynchronous compilation: it hands kernels over that it would compile."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._seen: set[Any] = set()
        self.kernels: dict[str, _Later] = {}  # by Triton's own key

    def order(self, kernel: Any, *args: Any, **options: Any) -> None:
        """Have `kernel` compiled for these arguments. Layers repeat theirs, which Triton takes 0.3 ms to see."""
        kinds = tuple((arg.dtype, arg.data_ptr() % 16) if hasattr(arg, "data_ptr") else arg for arg in args)
        launch = (id(kernel), kinds, tuple(options.items()))
        if launch not in self._seen:
            self._seen.add(launch)
            kernel.run(*args, grid=None, warmup=True, **options)

    def submit(self, key: str, compile: Callable[[], Any], finalize: Callable[[Any], object]) -> _Later:
        """Triton's call, once a launch; returns what stands for the kernel."""
        if key not in self.kernels:
            self.kernels[key] = _Later(compile, finalize, self._pool)
        return self.kernels[key]


def compile_together(work: Callable[[], object], rehearse: Callable[[], object], show_progress: bool) -> None:
    """Run `work`; if it meets a kernel that has never been compiled, compile those of `rehearse` side by side first.

    `work` is then begun again, so it must bear to be abandoned at any launch: not inside a collective, whose other
    ranks may have found their kernels. `rehearse` runs without a single kernel of this package: what they would have
    written is undefined, and must neither be looked at nor decide anything. Both run in this thread. Raises what they
    raise.
    """
    import triton

    if usable_cores() == 1 or kernel_class() is triton.JITFunction:
        work()
        return
    try:
        with _watch.here():
            work()
        return
    except _Missing:
        pass  # out of here its traceback is gone, and with it the memory of the work's tensors
    # In a context of its own, Triton's mode ends with it, whatever happens.
    contextvars.copy_context().run(_rehearse, rehearse, show_progress)
    work()


class _Watch:
    """Triton's listener while starts run: it tells the user's, and raises in their threads.

    Starts may overlap in several threads: the first puts it in place, the last takes it away.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: set[int] = set()
        self._users: Callable[..., None] | None = None

    def __call__(self, **event: Any) -> None:
        if self._users is not None:
            self._users(**event)
        if not event["cache_hit"] and threading.get_ident() in self._threads:
            raise _Missing

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """`_Missing` in this thread when Triton has compiled a kernel. It is in the cache by then."""
        from triton import knobs

        settings: Any = knobs.compilation
        try:
            with self._lock:
                self._threads.add(threading.get_ident())
                if settings.listener is not self:
                    self._users, settings.listener = settings.listener, self
            yield
        finally:
            with self._lock:
                self._threads.discard(threading.get_ident())
                if not self._threads and settings.listener is self:
                    settings.listener = self._users


_watch = _Watch()


def _rehearse(rehearse: Callable[[], object], show_progress: bool) -> None:
    """Run `rehearse` with launches that compile, and wait for the kernels."""
    from triton.runtime._async_compile import active_mode

    threads = min(usable_cores(), MAX_THREADS)
    # Triton changes the filters of warnings and sets them back, which threads do to each other's: all is undone here.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads, thread_name_prefix="nanovllm-compile") as pool:
        rehearsal = _Rehearsal(pool)
        active_mode.set(rehearsal)
        try:
            rehearse()
            futures = [kernel.future for kernel in rehearsal.kernels.values()]
            with progress_bar(
                len(futures), f"Compiling kernels on {threads} cores", unit="kernel", enabled=show_progress
            ) as bar:
                for _ in as_completed(futures):
                    bar.update()
        except BaseException:  # an interrupt: wait for those that have begun, as for a compilation in this thread
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for kernel in rehearsal.kernels.values():
        if kernel.future.exception() is None:  # else its launch compiles it again, and says what is wrong
            kernel.result()
