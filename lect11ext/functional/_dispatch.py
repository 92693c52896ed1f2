"""Which way a call goes into its op."""

import torch
from torch.overrides import has_torch_function_variadic

from .random import in_functorch


def through_torch(*tensors: object) -> bool:
    """Whether a call goes through torch.ops: where something other than the kernels may be asked."""
    return torch.compiler.is_compiling() or in_functorch() or has_torch_function_variadic(*tensors)
