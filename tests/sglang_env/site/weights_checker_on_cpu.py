"""Lets SGLang 0.5.21 answer ``/weights_checker`` on a CPU. The .pth file beside it imports this at
interpreter start.

Its checksum of the weights waits for the GPU first, on every device (srt/utils/weight_checker.py),
and a CPU build of torch refuses that call. There is nothing to wait for: the call becomes a no-op.
What is hashed, and how, is SGLang's.
"""

import importlib.abc
import sys


class _BeforeSglang(importlib.abc.MetaPathFinder):
    """Replaces the call when sglang is first looked for, then steps aside."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname != "sglang":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            torch.cuda.synchronize = lambda device=None: None


sys.meta_path.insert(0, _BeforeSglang())
