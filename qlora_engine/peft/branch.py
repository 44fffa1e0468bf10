"""A low-rank product beside a layer, added to its output by a hook."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from qlora_engine.nn.qlora_linear import LoRASettings
from qlora_engine.peft.base import MethodError
from qlora_engine.peft.layers import expand, factor_shapes, is_embedding, project, weight_matrix


class Branch(nn.Module):
    """What changes a layer's output, as a submodule of the layer with a forward hook.

    A subclass writes `change`, `delta` (or `merged`) and `named_tensors`.
    """

    def __init__(self):
        super().__init__()
        self.active = True

    def base_changed(self, layer: nn.Module) -> None:
        """Told when the layer's weight has been changed under the branch; for branches that keep something of it."""

    def attach(self, layer: nn.Module, name: str) -> None:
        """Becomes the layer's submodule of that name, and acts on its output.

        Raises:
            MethodError: where the layer has something of that name.
        """
        if hasattr(layer, name):
            raise MethodError(f"there is {name!r} on a {type(layer).__name__} already; choose another adapter_name")
        layer.add_module(name, self)
        self.handle = layer.register_forward_hook(self.act, with_kwargs=True)

    def detach(self, layer: nn.Module, name: str) -> None:
        """Undoes `attach`."""
        self.handle.remove()
        del layer._modules[name]

    def act(self, layer: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        """The layer's output with the branch's; a forward hook."""
        if not self.active:
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        return self.change(layer, x, output)

    def merged(self, layer: nn.Module) -> torch.Tensor:
        """The weight that does what the layer and this branch do: float32 `[out, in]`."""
        return weight_matrix(layer) + self.delta()


class LowRank(Branch):
    """`y += scaling * B(A(drop(x)))` beside a layer.

    Hu et al. 2021, "LoRA", equation 3. A linear layer's A is `[r, in]` and B `[out, r]`; a convolution's A has the
    layer's kernel and B the kernel 1; for embeddings A is `[r, vocabulary]` and is looked up. A is Kaiming-uniform
    and B zero, except that embeddings start with A zero and B normal, as in PEFT.

    Args:
        layer: what it is put beside; it is not a part of this module.
        settings: rank, scaling, dropout.
        dtype: dtype of A and B.
    """

    def __init__(self, layer: nn.Module, settings: LoRASettings, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.settings = settings
        shape_A, shape_B = factor_shapes(layer, settings.r)
        device = layer.weight.device
        A, B = (torch.zeros(shape, dtype=dtype, device=device) for shape in (shape_A, shape_B))
        self.is_lookup = is_embedding(layer)
        if self.is_lookup:
            nn.init.normal_(B)
            self.lora_embedding_A, self.lora_embedding_B = nn.Parameter(A), nn.Parameter(B)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        if self.is_lookup:
            return self.lora_embedding_A, self.lora_embedding_B
        return self.lora_A, self.lora_B

    @property
    def start(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B whose product is taken off, where there are any."""
        return None if self.start_A is None else (self.start_A, self.start_B)

    def take_off_start(self) -> None:
        """From now on the product of today's A and B is taken off: the output is the base's until they change."""
        self.start_A, self.start_B = (factor.detach().clone() for factor in self.factors)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """What a file must have, by the ends of the names in PEFT's files; `start_A` and `start_B` beside them."""
        A, B = self.factors
        ends = ("lora_embedding_A", "lora_embedding_B") if self.is_lookup else ("lora_A.weight", "lora_B.weight")
        found = dict(zip(ends, (A, B), strict=True))
        return found if self.start is None else found | {"start_A": self.start_A, "start_B": self.start_B}

    def delta(self) -> torch.Tensor:
        """The change of the layer's weight: float32 `[out, in]`."""
        A, B = (factor.detach().float().flatten(1) for factor in self.factors)
        product = B @ A
        if self.start is not None:
            A, B = (factor.float().flatten(1) for factor in self.start)
            product -= B @ A
        return self.settings.scaling * product

    def change(self, layer: nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """`output + scaling * B(A(drop(x)))`, in the dtype of `output`."""
        return output + self.settings.scaling * self.product(layer, x, output.dtype)

    def product(self, layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`B(A(drop(x)))`, less the product that is taken off, in `dtype`."""
        A, B = self.factors
        dropped = x if self.is_lookup else F.dropout(x, self.settings.dropout, self.training)
        product = expand(layer, project(layer, dropped, A, dtype), B, dtype)
        if self.start is not None:
            product = product - expand(layer, project(layer, x, self.start_A, dtype), self.start_B, dtype)
        return product

    def extra_repr(self) -> str:
        s = self.settings
        return f"r={s.r}, scaling={s.scaling:g}" + (f", dropout={s.dropout:g}" if s.dropout else "")
