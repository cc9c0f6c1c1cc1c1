"""Lets torchvision's CUDA build be imported beside a CPU-only torch.

Package indexes that serve a CPU-only torch often have torchvision with CUDA alone. It registers kernels for
operators that such a torch has never heard of, and its import fails, with that of lpips and transformers.
"""

from __future__ import annotations

import torch


def declare() -> None:
    """Declares the missing operators, once. Call it before the first import of torchvision."""
    if torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    global _declarations  # they last as long as this object
    _declarations = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _declarations.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
