"""Make ``/weights_checker`` of SGLang 0.5.21 work on a CPU.

The .pth file in this folder imports this module at interpreter start. SGLang's checksum of the
weights waits for the GPU first, on every device (srt/utils/weight_checker.py), and that call fails
in a CPU build of torch. On a CPU there is nothing to wait for: the call becomes a no-op. The hash
stays SGLang's.
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
