"""Triton's interpreter without most of its cost: it patches triton.language anew at every call of a device function.

That is a walk over hundreds of names, several times what the functions themselves take. It is left out where all of it
is patched already: the results are the same. A signal waits until a patch is whole, since half of one breaks what
comes after it.
"""

import signal
from functools import cache, wraps
from inspect import ismodule


def patch_once():
    """Teach this process's interpreter, if Triton is installed."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return

    patch, builtin = _undisturbed(interpreter._patch_lang), tl.core.is_builtin

    @cache
    def languages(fn):
        return [m for m in fn.__globals__.values() if ismodule(m) and m in (tl, tl.core)]

    def patch_lang(fn):
        spoken = languages(fn)
        if not spoken or builtin(tl.tensor.__add__) or any(builtin(language.load) for language in spoken):
            scope = patch(fn)
            scope.restore = _undisturbed(scope.restore)
            return scope
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang


def _undisturbed(call):
    """``call`` with the signals of tests held back meanwhile."""

    @wraps(call)
    def inner(*args):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGINT})
        try:
            return call(*args)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    return inner
