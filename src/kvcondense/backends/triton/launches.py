"""Launches written down and not run: for each, what Triton's JIT would compile on a device of some architecture.

Ahead-of-time compilation, ``kvcondense warm`` and the tests that count compiles all ask the JIT itself, by launching
the kernels in ``recorded``, so that nothing is compiled that no step asks for, and nothing is missed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from kvcondense.backends.triton import tuning
from kvcondense.backends.triton.fences import proxy_fence
from kvcondense.errors import UnsupportedError


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel: types of the arguments, values and alignments that it is compiled for."""

    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.__name__

    @property
    def constants(self) -> Any:
        """The ``Constants`` that the kernel is compiled for."""
        return self.constexprs[self.kernel.arg_names.index("c"),]

    @property
    def block(self) -> int:
        """Channels that a program takes at a time; of the planner, entries."""
        names = self.kernel.arg_names
        return self.constants.block if "c" in names else self.constexprs[names.index("BLOCK"),]

    def compile(self, arch: str) -> Any:
        """Triton's compiled kernel, which its cache on disk then holds."""
        import triton
        from triton.compiler import ASTSource

        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)
        with proxy_fence():
            return triton.compile(source, target=target(arch), options=self.options)


def target(arch: str) -> Any:
    """Triton's name for an architecture; raises UnsupportedError for one that it does not compile for."""
    from triton.backends.compiler import GPUTarget

    if re.fullmatch(r"sm_\d+", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if re.fullmatch(r"gfx9\w+", arch):
        return GPUTarget("hip", arch, 64)
    raise UnsupportedError("arch", "sm_90, gfx942, or another sm_NN or gfx9NN", repr(arch))


@contextlib.contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """Kernels launched within, on tensors of any device, run nowhere: the list gets each specialisation once."""
    from triton import runtime

    jit, driver = cast("Any", runtime.JITFunction), cast("Any", runtime.driver)
    found: list[Launch] = []
    device = _Device(target(arch))

    def write_down(
        kernel: Any, key: str, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> Any:
        del warmup
        found.append(Launch(kernel, signature, constexprs, attrs, dict(vars(options))))
        kernel.device_caches[device][0][key] = _NoKernel()
        return kernel.device_caches[device][0][key]

    real, before = jit._do_compile, driver._active
    jit._do_compile = write_down
    driver.set_active(device)
    try:
        with tuning.stand_in(arch):
            yield found
    finally:
        jit._do_compile = real
        driver._active = before
        for launch in found:
            launch.kernel.device_caches.pop(device, None)


class _Device:
    """A driver, and the device that it names: a target is all that Triton asks of it before it compiles."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> Any:
        return self

    def get_current_stream(self, device: Any) -> int:
        del device
        return 0

    def get_current_target(self) -> Any:
        return self.target


class _NoKernel:
    """What stands for a compiled kernel: it launches nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None: ...

    def run(self, *_: Any) -> None: ...
