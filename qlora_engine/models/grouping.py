"""Which layers of a model act together, found by structure: `group_layers` installs it, `ungroup_layers` removes it.

A module that has q, k and v projections, or gate and up, lets them share the reads of their input. A module whose
forward is `down(act(gate(x)) * up(x))` becomes one autograd node; whether it is that, a probe decides by numbers.
"""

from collections.abc import Callable

import torch
from torch import nn

from qlora_engine.nn.grouped import GatedMLPForward, SharedInput, gated_mlp, plain_projection
from qlora_engine.nn.qlora_linear import QLoRALinear
from qlora_engine.reference.gated import ACTIVATIONS, activate

# Names of layers that read one input, as the architectures of transformers and of Llama's own code call them
ATTENTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("wq", "wk", "wv"))
GATED_MLPS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
PACKED_MLPS = (("gate_up_proj", "down_proj"),)  # gate and up in one layer, one below the other
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")
PROBE_ROWS = 3
# relative RMS between a module's forward and `qlora_mlp` of the same layers: roundings of six products, no more
PROBE_BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def group_layers(model: nn.Module) -> None:
    """Lets layers with adapters act together wherever the model's structure allows it. In place, reversible.

    Names, parameters and classes of modules stay as they are, and so do files. A layer that is not in the simple
    state (several adapters or none act, hooks) computes by itself.
    """
    ungroup_layers(model)
    for module in model.modules():
        for names in ATTENTIONS:
            _share_input(module, names)
        for names in (*GATED_MLPS, *PACKED_MLPS):
            layers = [getattr(module, name, None) for name in names]
            if not all(isinstance(layer, QLoRALinear) for layer in layers):
                continue
            activation = _activation_of_module(module, names)
            if activation and is_gated_mlp(module, names, activation):
                module.forward = GatedMLPForward(module, names, activation)
            elif len(names) == 3:
                _share_input(module, names[:2])


def ungroup_layers(model: nn.Module) -> None:
    """Undoes `group_layers`: every layer computes by itself."""
    for module in model.modules():
        if isinstance(module, QLoRALinear):
            module.group = None
        if isinstance(module.__dict__.get("forward"), GatedMLPForward):
            del module.forward


def _share_input(module: nn.Module, names: tuple[str, ...]) -> None:
    layers = [getattr(module, name, None) for name in names]
    if not all(isinstance(layer, QLoRALinear) for layer in layers) or len(set(layers)) < len(layers):
        return
    if len({layer.in_features for layer in layers}) > 1:
        return
    group = SharedInput(layers)
    for layer in layers:
        layer.group = group


def _activation_of_module(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The activation of a gated MLP that has nothing else in it than that and its layers; else None."""
    if "forward" in module.__dict__:
        return None
    found = [name for name in ACTIVATION_NAMES if callable(getattr(module, name, None))]
    if len(found) != 1 or set(dict(module.named_children())) - {*names, *found}:
        return None
    return activation_name(getattr(module, found[0]))


def activation_name(function: Callable) -> str | None:
    """Which of the fused activations a function is, by its values; None for another.

    >>> activation_name(torch.nn.functional.silu), activation_name(torch.relu)
    ('silu', None)
    """
    x = torch.linspace(-6, 6, 241, dtype=torch.float32)
    try:
        with torch.no_grad():
            y = function(x)
    except Exception:  # whatever it is, it is not an elementwise function
        return None
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        return None
    # exact GELU and its tanh approximation are up to 5e-4 apart
    return next((name for name in ACTIVATIONS if torch.allclose(y, activate(x, name), rtol=0, atol=1e-5)), None)


def is_gated_mlp(module: nn.Module, names: tuple[str, ...], activation: str) -> bool:
    """Whether a module's forward is `down(act(gate(x)) * up(x))` of its layers, tried out on numbers.

    `names` are those of gate, up and down, or of one layer for gate and up, and down.

    The module is left as it was, and torch's generators are not used.
    """
    layers = [getattr(module, name) for name in names]
    gate, *_, down = layers
    wide = gate.out_features if len(layers) == 3 else gate.out_features // 2
    sizes = {(layer.in_features, layer.out_features) for layer in layers[:-1]}
    if len(sizes) > 1 or down.in_features != wide or (len(layers) == 2 and gate.out_features % 2):
        return False
    device, dtype = gate.weight.device, gate.weight_dtype
    if device.type == "meta" or dtype not in PROBE_BOUNDS:
        return False
    training = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = False
        projections = [plain_projection(layer) for layer in layers]
        if any(p is None for p in projections):
            return False
        numbers = torch.arange(PROBE_ROWS * gate.in_features, device=device, dtype=torch.float32)
        x = (2 * torch.sin(numbers * 1.7)).to(dtype).reshape(1, PROBE_ROWS, gate.in_features)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            expected = type(module).forward(module, x).float()
            actual = gated_mlp(x, projections, activation).float()
    except Exception:  # a forward that takes other arguments, or needs what only the model gives it
        return False
    finally:
        for layer, was_training in zip(layers, training, strict=True):
            layer.training = was_training
    if actual.shape != expected.shape or not float(expected.norm()) > 0:
        return False
    return float((actual - expected).norm() / expected.norm()) <= PROBE_BOUNDS[dtype]
