"""One repair of Triton 3.6's interpreter, which turns a number into an index in a way that NumPy 2.4 refuses.

For processes that run nothing but kernels in the interpreter; what is compiled for a GPU is not touched.
"""

from __future__ import annotations

import importlib.metadata

import numpy as np


def repair() -> bool:
    """Let a one-element tensor bound a loop, as later interpreters do; return whether that was necessary."""
    version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    if version >= (3, 7) or np.lib.NumpyVersion(np.__version__) < "2.4.0":
        return False
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patched
    return True
