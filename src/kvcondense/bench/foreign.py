"""Loads an engine's source file without the engine: whatever it imports of its own packages is a stub here.

A stub is a module that has a few real values and otherwise stand-ins, which may be named, subclassed and subscripted:
they raise as soon as the file wants to know more of them. Stubs are there only for as long as a file is loaded.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from kvcondense.errors import UnsupportedError

_ENGINES = ("vllm", "rtp_llm")
_HOME = "kvcondense_peer.a.b.c"
"""The package of a file that is loaded: deep enough for its relative imports."""
KNOWN = "known are vLLM's files up to 0.33.0 and RTP-LLM's up to November 2026"


def load(path: Path) -> ModuleType:
    """The file as a module, run once. Raises UnsupportedError with the file's name if it cannot be."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise UnsupportedError(f"--peer-file {path}", "Python source", error) from None
    specification = importlib.util.spec_from_file_location(f"{_HOME}.{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    with _stubs({*_imported(tree), *_values()}, path):
        sys.modules[module.__name__] = module
        try:
            specification.loader.exec_module(module)
        except UnsupportedError:
            raise
        except Exception as error:
            raise UnsupportedError(
                f"--peer-file {path}", "a file that can be loaded", f"{type(error).__name__}: {error}", KNOWN
            ) from error
        finally:
            sys.modules.pop(module.__name__, None)
    return module


def entry(path: Path, owner: Any, name: str, *, named: Sequence[str] = (), exactly: Sequence[str] = ()) -> Any:
    """``owner``'s ``name``, a function or kernel that is called with the arguments ``named``, or has ``exactly`` these.

    Raises UnsupportedError if it is not there, or if its parameters are others.
    """
    found = getattr(owner, name, None)
    if found is None:
        raise UnsupportedError(f"--peer-file {path}", name, "a file without it", KNOWN)
    parameters = _parameters(found)
    if exactly:
        fits = list(parameters) == list(exactly)
    else:
        required = {
            n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        fits = required <= set(named) and (anything or set(named) <= set(parameters))
    if not fits:
        expected = exactly or named
        lacks = [n for n in expected if n not in parameters]
        more = [n for n in parameters if n not in expected]
        got = f"lacks {', '.join(lacks) or 'none'}; beside them {', '.join(more) or 'none'}; of {', '.join(parameters)}"
        raise UnsupportedError(f"--peer-file {path}", f"{name}({', '.join(expected)})", got, KNOWN)
    return found


def _parameters(found: Any) -> dict[str, inspect.Parameter]:
    """Of a function, or of the function that a kernel was compiled from."""
    while hasattr(found, "fn"):
        found = found.fn
    try:
        return dict(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return {}


class _Unknown:
    """In the place of an engine's function, class or value that nothing here knows."""

    def __init__(self, name: str, path: Path) -> None:
        self._name, self._path = name, path

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedError(f"--peer-file {self._path}", "a file that does without it", self._name, KNOWN)

    __call__ = __bool__ = __iter__ = __len__ = __int__ = __float__ = __index__ = _refuse

    def __getitem__(self, _: object) -> _Unknown:
        return self

    def __getattr__(self, name: str) -> _Unknown:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unknown(f"{self._name}.{name}", self._path)

    def __mro_entries__(self, _: object) -> tuple[type, ...]:
        return ()


def _values() -> dict[str, dict[str, Any]]:
    """What files ask of the modules that they import, by module. A name may have moved: it is in both places."""
    import triton
    from triton import language

    class Generic:
        def __class_getitem__(cls, _: object) -> type:
            return cls

    def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def no(*_: Any, **__: Any) -> bool:
        return False

    return {
        "vllm.platforms": {"current_platform": SimpleNamespace(is_rocm=no)},
        "vllm.platforms.rocm": {"_ON_GFX950": False},
        "vllm.triton_utils": {"tl": language, "triton": triton},
        "vllm.utils.math_utils": {
            "next_power_of_2": triton.next_power_of_2,
            "cdiv": triton.cdiv,
            "round_up": lambda x, y: triton.cdiv(x, y) * y,
        },
        "vllm.utils.deep_gemm": {"mqa_logits_use_mx_scales": no},
        "vllm.model_executor.warmup.jit_warmup": {"kernel_launcher": as_it_is},
        "vllm.model_executor.warmup.jit_warmup_triton_helper": {
            "LaunchSpec": object, "TritonWarmupTensor": object, "VllmTritonJitKernel": Generic,
            "kernel_launcher": as_it_is,
        },
        "rtp_llm.models_py.modules.dsv4.fp8._trap_utils": {
            "validate_slot_mapping": no, "validate_block_table_lookup": no, "trap_invalid_kv_access_enabled": no,
            "invalid_kv_access_validation_enabled": no,
        },
    }  # fmt: skip


def _imported(tree: ast.Module) -> Iterator[str]:
    """Modules of engines that a file imports, those of relative imports in ``_HOME``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in _ENGINES)
        elif isinstance(node, ast.ImportFrom) and node.level:
            levels = _HOME.split(".")
            base = levels[: max(1, len(levels) + 1 - node.level)]
            yield ".".join([*base, *([node.module] if node.module else [])])
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in _ENGINES:
            yield node.module


@contextlib.contextmanager
def _stubs(names: set[str], path: Path) -> Iterator[None]:
    """Modules of these names and their parents; an installed engine is set aside, with all that was imported of it."""
    values = _values()
    everything = {".".join(n.split(".")[:i]) for n in (*names, _HOME) for i in range(1, 1 + n.count(".") + 1)}
    roots = {n.split(".")[0] for n in everything}
    before = {n: m for n, m in sys.modules.items() if n.split(".")[0] in roots}
    for name in before:
        del sys.modules[name]
    for name in sorted(everything):
        stub = ModuleType(name)
        vars(stub).update(values.get(name, {}), __path__=[], __getattr__=_Unknown(name, path).__getattr__)
        sys.modules[name] = stub
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, stub)
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] in roots]:
            del sys.modules[name]
        sys.modules.update(before)
