"""Lets ``import torchvision`` pass on a CPU build of torch. A .pth file imports this at interpreter
start.

PyPI's torchvision links CUDA libraries; without them its operators stay undeclared and its import
fails at the first one it describes. SGLang imports torchvision whatever the model, and calls none
of these operators for text.
"""

import importlib.abc
import sys

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[object] = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is first looked for, then steps aside."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            library = torch.library.Library("torchvision", "DEF")
            for operator in _OPERATORS:
                library.define(operator)
            _declared.append(library)  # an operator lives as long as its library


sys.meta_path.insert(0, _BeforeTorchvision())
