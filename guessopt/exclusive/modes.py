"""``Modes``: torch's modes and switches before a step. However the step ends, they are put back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.utils.checkpoint
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _python_dispatch

#: What a step replaces in torch.
_ATTRIBUTES: tuple[tuple[Any, str], ...] = (
    (torch.autograd.Function, "apply"),
    (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator"),
    (torch.amp.GradScaler, "scale"),
    *(
        (_python_dispatch, name)
        for name in (
            "_is_in_torch_dispatch_mode",
            "_is_in_non_infra_torch_dispatch_mode",
            "_is_in_any_mode_without_ignore_compile_internals",
        )
        if hasattr(_python_dispatch, name)
    ),
)
#: What a step, or torch within it, switches for the whole process: how to ask, and how to set.
_FLAGS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    (_functorch._is_vmap_fallback_enabled, _functorch._set_vmap_fallback_enabled),  # type: ignore[attr-defined]
    *(
        (getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}"))
        for name in ("cudnn", "flash", "mem_efficient", "math", "overrideable")
        if hasattr(torch._C, f"_get_{name}_sdp_enabled")
    ),
)


class Modes:
    """The modes and switches of torch that a step changes, as they are when this object is made."""

    def __init__(self) -> None:
        self.grad, self.forward = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        self.stack = _get_current_function_mode_stack()
        self.dispatch = _python_dispatch._get_current_dispatch_mode_stack()
        self.level = forward_ad._current_level
        self.transforms = _functorch.get_dynamic_layer_stack_depth()
        self.attributes = [(owner, name, vars(owner)[name]) for owner, name in _ATTRIBUTES]
        self.flags = [(switch, asked()) for asked, switch in _FLAGS]
        kinds = ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",)
        self.autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self.nesting = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()

    def restore(self) -> None:
        for owner, name, value in self.attributes:
            setattr(owner, name, value)
        while torch._C._len_torch_function_stack():
            _pop_mode()
        for mode in self.stack:
            _push_mode(mode)
        if _python_dispatch._get_current_dispatch_mode_stack() != self.dispatch:
            while torch._C._len_torch_dispatch_stack():
                top = torch._C._get_dispatch_stack_at(torch._C._len_torch_dispatch_stack() - 1)
                torch._C._pop_torch_dispatch_stack(getattr(top, "_mode_key", None))
            for mode in self.dispatch:
                _python_dispatch._push_mode(mode)
        for switch, value in self.flags:
            switch(value)
        if _functorch.get_dynamic_layer_stack_depth() > self.transforms:
            _functorch.pop_dynamic_layer_stack_and_undo_to_depth(self.transforms)
        if self.level < 0:
            forward_ad._current_level = -1
            with suppress(RuntimeError):  # a level that was entered and not yet noted
                torch._C._exit_dual_level(level=0)
        torch._C._set_fwd_grad_enabled(self.forward)
        torch._C._set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.autocast_increment_nesting()
        while torch.autocast_decrement_nesting() > self.nesting:
            pass
