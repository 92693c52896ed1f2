"""Which way a call goes into its op."""

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import has_torch_function_variadic
from torch.utils._device import DeviceContext

from .random import in_functorch


def is_overridden(*tensors: object) -> bool:
    """Whether a tensor's type or a function mode is to see the call. That of torch.set_default_device is not: it has to
    do with functions that make tensors from nothing."""
    if not has_torch_function_variadic(*tensors):
        return False
    modes = (torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack()))
    if not all(isinstance(mode, DeviceContext) for mode in modes):
        return True
    own = (getattr(t, "__torch_function__", None) for t in tensors if type(t) not in (Tensor, Parameter))
    return any(function not in (None, torch._C._disabled_torch_function_impl) for function in own)


def is_autocast(like: Tensor) -> bool:
    """Whether autocast is on for the tensor's device. Torch does not know the answer for the meta device."""
    device = like.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def through_torch(*tensors: object) -> bool:
    """Whether a call goes through torch.ops: where something other than the kernels may be asked."""
    return torch.compiler.is_compiling() or in_functorch() or is_overridden(*tensors)
