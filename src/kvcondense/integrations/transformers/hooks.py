"""Where a module's forward is replaced, behind accelerate's hooks if it has any, and what such hooks load."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_PLACES = ("forward", "_old_forward")


class Ours(functools.partial):
    """The forward of a module that kvcondense runs."""


def is_ours(module: Any) -> bool:
    """Whether the module's forward is replaced by ``replace``."""
    return any(isinstance(vars(module).get(place), Ours) for place in _PLACES)


def is_replaced(module: Any) -> bool:
    """Whether somebody set another forward than that of its class; accelerate's hooks keep that one."""
    held = vars(module).get(_place(module))
    return held is not None and getattr(held, "__func__", None) is not type(module).forward


def replace(module: Any, forward: Callable[..., Any], *arguments: Any) -> None:
    """Let the module run ``forward(*arguments, module, ...)``; mutates it. Hooks go on to run around it."""
    setattr(module, _place(module), Ours(forward, *arguments, module))


def restore(module: Any) -> None:
    """Undo ``replace``, whether hooks have come or gone since; mutates the module."""
    if isinstance(vars(module).get("forward"), Ours):
        del module.forward
    if isinstance(vars(module).get("_old_forward"), Ours):
        module._old_forward = types.MethodType(type(module).forward, module)


def _place(module: Any) -> str:
    """The attribute that holds what runs in the end: accelerate keeps it aside and calls it."""
    return "_old_forward" if "_hf_hook" in vars(module) and "_old_forward" in vars(module) else "forward"


@contextmanager
def loaded(module: Any) -> Iterator[Any]:
    """The module with its own weights where they are computed with: what an offloading hook does around a call."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        yield module
        return
    hook.pre_forward(module)
    try:
        yield module
    finally:
        hook.post_forward(module, None)
