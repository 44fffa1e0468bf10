"""Llama-3-8B's layer shapes with random weights, born in 4 bits: this engine's model, and PEFT on bitsandbytes.

No 16-bit model exists at any time: each layer's weight is drawn on the GPU, quantized, and gone. The same seed gives
both the same bytes, so that their losses can be compared.
"""

import harness
import peers
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine.models.prepare import replace_module
from qlora_engine.nn import NF4Linear

RANK = 16
VOCABULARY = 128256
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STD = 0.02
B_STD = 0.01  # adapters that act, so that a comparison sees them


def empty_model(layers: int) -> nn.Module:
    """The architecture on the meta device; its buffers, the rotary frequencies, are real."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with init_empty_weights(include_buffers=False):
        return LlamaForCausalLM(config)


def filled(model: nn.Module, make_linear, device: str) -> nn.Module:
    """The model with random weights on a device: `make_linear(weight)` gives a decoder's layer, the rest is bf16."""
    numbers = torch.Generator(device).manual_seed(0)

    def drawn(shape) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=STD, generator=numbers)

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            replace_module(model, path, make_linear(drawn(module.weight.shape)))
        elif "RMSNorm" in type(module).__name__:
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=torch.bfloat16, device=device))
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight = nn.Parameter(drawn(module.weight.shape))
    return model.to(device).train()


def fill_adapters(pairs) -> None:
    """Gives adapters, as (A, B), the same numbers in every model."""
    for index, (A, B) in enumerate(pairs):
        numbers = torch.Generator(A.device).manual_seed(1000 + index)
        for matrix, std in ((A, A.shape[1] ** -0.5), (B, B_STD)):
            drawn = torch.empty(matrix.shape, dtype=torch.float32, device=A.device).normal_(
                std=std, generator=numbers
            )
            matrix.data.copy_(drawn)


def adapters_of(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(A, B) of every adapted layer, in the order of the model's modules; ours and PEFT's."""
    found = []
    for module in model.modules():
        if isinstance(getattr(module, "lora_A", None), nn.ParameterDict | nn.ModuleDict) and len(module.lora_A):
            A, B = module.lora_A["default"], module.lora_B["default"]
            found.append((A, B) if isinstance(A, nn.Parameter) else (A.weight, B.weight))
    return found


def ours(layers: int, device: str) -> nn.Module:
    """This engine's model with adapters on all linear layers."""
    model = filled(empty_model(layers), lambda weight: NF4Linear.from_weight(qe.quantize(weight)), device)
    qe.prepare(model, qe.QLoRAConfig(r=RANK, alpha=RANK))
    fill_adapters(adapters_of(model))
    return model


def why_no_peft() -> str | None:
    """Why PEFT on bitsandbytes cannot be measured here, or None."""
    if not peers.bitsandbytes_functional():
        return "bitsandbytes is not installed"
    return "PEFT is not installed" if harness.version_of("peft") == peers.MISSING else None


def with_peft(model: nn.Module) -> nn.Module:
    """PEFT's LoRA with the same adapters."""
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, lora_dropout=0.0))
    fill_adapters(adapters_of(made))
    return made


def peft_on_bitsandbytes(layers: int, device: str) -> nn.Module:
    """The rival, as its documentation sets it up: norms, embeddings and head in float32, gradient checkpointing."""
    import bitsandbytes
    from peft import prepare_model_for_kbit_training

    def layer(weight):
        made = bitsandbytes.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        made.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to(device)
        return made

    model = filled(empty_model(layers), layer, device)
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    return with_peft(model).train()


def peft_on_16_bits(model: nn.Module, layers: int, device: str) -> nn.Module:
    """PEFT on 16-bit layers that hold what a model of ours decodes its 4-bit weights to."""
    decoded = (m.dequantize(torch.bfloat16) for m in model.modules() if isinstance(m, NF4Linear))

    def layer(_):
        weight = next(decoded)
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(weight, requires_grad=False)
        return made

    return with_peft(filled(empty_model(layers), layer, device))
