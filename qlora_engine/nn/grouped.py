"""Layers that act together: projections of one input in one pass, and a gated MLP in one autograd node.

Nothing about a model's modules changes but what these put on instances: `QLoRALinear.group`, and a `forward` on a
gated MLP. Both stand aside, and the layers compute by themselves, whenever a layer is not in the simple state:
exactly one adapter acts, and nothing listens to the layer's calls.
"""

import weakref

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from qlora_engine import functional
from qlora_engine.nn.qlora_linear import QLoRALinear

PATIENCE = 3  # times that the results of a shared pass may go unused before it is given up


def plain_projection(layer: nn.Module) -> functional.QLoRAProjection | None:
    """What a layer computes, for use in a group; None where its own forward has to run.

    That is: it is no `QLoRALinear`, other than one adapter acts, or hooks or a replaced forward would be passed by.
    """
    if type(layer) is not QLoRALinear or "forward" in layer.__dict__:
        return None
    if not torch.compiler.is_compiling() and _has_any_global_hook():
        return None
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return None if any(len(hook) for hook in hooks) else layer.projection()


class SharedInput:
    """Projections that a module applies to one tensor, one after another, computed in one pass.

    The first layer's call computes all; the calls of the others, with the very same tensor, find theirs waiting. A
    call with another tensor, or while `torch.compile` traces, computes that layer alone. Where results go unused
    PATIENCE times in a row, the layers are not used in this way, and each computes alone from then on.

    Args:
        layers: two or three layers with inputs of one size, in the order in which they are called.
    """

    def __init__(self, layers: tuple[QLoRALinear, ...]):
        self.layers = tuple(layers)
        self.unused = 0
        self._forget()

    def product(self, layer: QLoRALinear, x: torch.Tensor) -> torch.Tensor | None:
        """A layer's output for x, or None where it has to compute it itself."""
        if torch.compiler.is_compiling() or self.unused >= PATIENCE:
            return None
        index = next((i for i, member in enumerate(self.layers) if member is layer), None)
        if index is None:  # a replica of the layer, which shares this object
            return None
        if index:
            found = self.waiting.pop(index, None) if self._is_input(x) else None
            if not self.waiting:
                self._forget()
                self.unused = 0
            return found
        if self.waiting:
            # a checkpoint that recomputes must find the choice of its forward
            self.unused += torch._C._current_graph_task_id() == -1
            self._forget()
            if self.unused >= PATIENCE:
                return None
        projections = [layer.projection(), *(plain_projection(member) for member in self.layers[1:])]
        if any(p is None for p in projections) or len({p.dropout_p for p in projections}) > 1:
            return None
        first, *others = functional.qlora_group(x, *projections)
        self.input, self.state = weakref.ref(x), _state(x)
        self.waiting = dict(enumerate(others, 1))
        return first

    def _is_input(self, x: torch.Tensor) -> bool:
        return self.input is not None and self.input() is x and self.state == _state(x)

    def _forget(self) -> None:
        self.input, self.state, self.waiting = None, None, {}

    def __getstate__(self):
        return self.layers

    def __setstate__(self, layers):
        self.__init__(layers)


def _state(x: torch.Tensor) -> tuple:
    """What else decides the result of a product with x."""
    version = None if x.is_inference() else x._version
    return version, torch.is_grad_enabled(), functional.compute_dtype(x)


def gated_mlp(x: torch.Tensor, projections: list[functional.QLoRAProjection], activation: str) -> torch.Tensor:
    """`functional.qlora_mlp` of gate, up and down, or of gate and up in one projection, and down."""
    gate, *up, down = projections
    return functional.qlora_mlp(x, gate, up[0] if up else None, down, activation)


class GatedMLPForward:
    """The forward of a module that computes `down(act(gate(x)) * up(x))`: `functional.qlora_mlp` where it can be.

    Args:
        module: the module; its class's forward is what runs where it cannot.
        names: of the layers gate, up and down in it, or of one for gate and up, and down.
        activation: as in `functional.qlora_mlp`.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...], activation: str):
        self.module, self.names, self.activation = module, names, activation

    def __call__(self, x: torch.Tensor, *arguments, **options) -> torch.Tensor:
        if not arguments and not options:
            projections = [plain_projection(getattr(self.module, name)) for name in self.names]
            if all(p is not None for p in projections) and len({p.dropout_p for p in projections[:-1]}) == 1:
                return gated_mlp(x, projections, self.activation)
        return type(self.module).forward(self.module, x, *arguments, **options)
