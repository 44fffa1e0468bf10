"""What a model's configuration says about its size: layers and bytes, without a weight being read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qlora_engine.models.config import QLoRAConfig
from qlora_engine.models.grouping import ATTENTIONS, GATED_MLPS, PACKED_MLPS
from qlora_engine.models.targets import find_embedding, find_experts, find_targets, is_linear, kept_in_float32
from qlora_engine.nn.nf4_experts import expert_projections
from qlora_engine.nn.nf4_linear import is_transposed_linear
from qlora_engine.quantization.codebook import NESTED_BLOCKSIZE, blocks_of
from qlora_engine.training.errors import ModelError, as_usage_error
from qlora_engine.training.source import HUB_ID

# names of the projection that takes what attention computed
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o", "proj")
# and of one projection for queries, keys and values, of which attention then keeps the whole output
PACKED_ATTENTIONS = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
# settings of models whose logits are scaled or capped
LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
    "lm_head_multiplier",
)
# bytes that a score of attention written out in torch keeps: softmax in float32 and the compute dtype; with a cap,
# its tanh as well
SCORE_BYTES, CAPPED_SCORE_BYTES = 6, 9


@dataclass(frozen=True)
class Layer:
    """A decoder layer, in elements a token.

    Attributes:
        hidden: width of the residual stream.
        norms: widths of the inputs of all normalizations.
        inputs: widths of the distinct inputs that layers with adapters keep for backward, but for those that
            attention or the MLP keep anyway.
        queries: width of all query heads, which attention's output has too.
        keys: width of all key heads; the values' as well.
        packed_attention: whether queries, keys and values are one projection's output.
        heads: query heads.
        score: bytes that each of attention's scores keeps, length times heads a token; 0 with a fused attention.
        norm_after_mlp: whether the MLP's output is normalized.
        ranks: of all adapters, one after another.
        mlp_kept: what the MLP keeps for backward besides its input.
        mlp_working: what comes and goes inside the MLP in its backward.
        largest_weight: elements of the largest 4-bit matrix (not a token's).
        adapter: elements of the adapters (not a token's).
    """

    hidden: int
    norms: int
    inputs: int
    queries: int
    keys: int
    packed_attention: bool
    heads: int
    score: int
    norm_after_mlp: bool
    ranks: int
    mlp_kept: int
    mlp_working: int
    largest_weight: int
    adapter: int


@dataclass(frozen=True)
class Architecture:
    """A model as an estimate needs it.

    Attributes:
        name: of the model's class.
        parameters: elements of the model, tensors that are shared counted once.
        quantized: bytes of the 4-bit matrices with their scales.
        rest: elements of everything else: norms, biases, and embeddings and head unless they are in 4 bits.
        rest_float32: elements among `rest` that stay in float32.
        adapters: elements of each adapter matrix.
        layers: the decoder layers.
        hidden: width of the residual stream.
        vocabulary: rows of the output head.
        plain_head: whether logits are the product of the last hidden states with the head, and nothing else.
        packed_head: whether the head is in 4 bits.
        fused_attention: whether attention is torch's scaled_dot_product_attention.
        notes: what the estimate does not know of this model.
    """

    name: str
    parameters: int
    quantized: int
    rest: int
    rest_float32: int
    adapters: tuple[int, ...]
    layers: tuple[Layer, ...]
    hidden: int
    vocabulary: int
    plain_head: bool = True
    packed_head: bool = False
    fused_attention: bool = True
    notes: tuple[str, ...] = ()


def config_folder(name: str) -> Path:
    """The folder of a model's config.json: a local one, or the hub's cache after config.json alone was downloaded.

    Raises:
        ModelError: where there is none.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".json":
        return path.parent
    if (path / "config.json").is_file():
        return path
    if path.exists() or not HUB_ID.fullmatch(name):
        raise ModelError(f"there is no config.json at {name}; expected a model folder, a config.json or a hub id")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json")).parent
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{name} is not a folder, and its config.json could not be had from the hub: {error}"
        ) from error


def read_architecture(name: str, config: QLoRAConfig) -> Architecture:
    """The architecture of a model folder, a config.json, or a hub id.

    Args:
        name: where config.json is; weights are not needed.
        config: what is quantized and adapted. A model that was saved in 4 bits counts as if quantized by `config`.

    Raises:
        ModelError: where there is no configuration, or one that transformers does not know.
        UsageError: where a pattern of `config` matches nothing.
    """
    from qlora_engine.models.checkpoint import empty_model, read_config

    folder = config_folder(name)
    with as_usage_error(ModelError):
        model = empty_model(folder, read_config(folder))
    with as_usage_error():
        return architecture_of(model, config)


def architecture_of(model: nn.Module, config: QLoRAConfig) -> Architecture:
    """The architecture of a model that is not quantized yet; its weights may be on the meta device.

    Raises:
        TargetError: where a pattern of `config` matches nothing.
    """
    quantized, adapted, saved = find_targets(model, config)
    ranks = dict.fromkeys(adapted, config.r)
    packed = {f"{path}.weight": 1 for path in quantized}  # name of a 4-bit weight -> matrices in it
    embedding, tied_head = find_embedding(model, config)
    if embedding is not None:
        packed[f"{embedding}.weight"] = 1
    for path in find_experts(model, config):
        experts = model.get_submodule(path)
        packed |= {f"{path}.{name}": experts.num_experts for name in expert_projections(experts)}
    rest = rest_float32 = parameters = 0
    for path, parameter in model.named_parameters():
        parameters += parameter.numel()
        if path not in packed:
            rest += parameter.numel()
            rest_float32 += parameter.numel() * kept_in_float32(model, path, model.dtype)
    text = model.config.get_text_config()
    blocks = _decoder_layers(model, text.num_hidden_layers)
    names = {id(block): path for path, block in model.named_modules()}
    eager = getattr(model.config, "_attn_implementation", "sdpa") == "eager"
    layers = tuple(_layer(block, names[id(block)], ranks, text, eager) for block in blocks)
    head = model.get_output_embeddings()
    notes = []
    if saved:
        notes.append("modules_to_save are trained whole, which is not in this estimate")
    if any(layer.mlp_kept == 0 for layer in layers):
        notes.append("some layers have no MLP of a known form; what they keep for backward is not in this estimate")
    elif not all(_is_gated(block) for block in blocks):
        notes.append(
            "the MLPs are not gated ones: what their activations keep is a guess, and may be several times it"
        )
    return Architecture(
        name=type(model).__name__,
        parameters=parameters,
        quantized=sum(
            count * packed_bytes(model.get_parameter(name).numel() // count, config) for name, count in packed.items()
        ),
        rest=rest,
        rest_float32=rest_float32,
        adapters=tuple(r * size for path, r in ranks.items() for size in _sizes(model.get_submodule(path))),
        layers=layers,
        hidden=text.hidden_size,
        vocabulary=head.weight.shape[0] if head is not None else 0,
        packed_head=tied_head is not None or any(model.get_submodule(path) is head for path in quantized),
        plain_head=head is not None and head.bias is None and not any(_acts(text, name) for name in LOGIT_CHANGES),
        fused_attention=not eager,
        notes=tuple(notes),
    )


def _acts(text, name: str) -> bool:
    return getattr(text, name, None) not in (None, 1, 1.0)


def packed_bytes(numel: int, config: QLoRAConfig) -> int:
    """Bytes of a 4-bit weight of `numel` elements with its scales.

    >>> packed_bytes(4096 * 4096, QLoRAConfig()) * 8 / 4096**2
    4.126955032348633
    """
    scales = blocks_of(numel, config.blocksize)
    nested = scales + 4 * blocks_of(scales, NESTED_BLOCKSIZE) + 4
    return blocks_of(numel, 2) + (nested if config.double_quant else 4 * scales)


def _decoder_layers(model: nn.Module, count: int) -> list[nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count and count]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of {count} layers; this model cannot be estimated")
    return list(max(lists, key=lambda found: sum(p.numel() for p in found.parameters())))


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)"""
    rows, columns = linear.weight.shape
    return (rows, columns) if is_transposed_linear(linear) else (columns, rows)


def _layer(block: nn.Module, path: str, ranks: Mapping[str, int], text, eager: bool) -> Layer:
    hidden, heads = text.hidden_size, text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or hidden // heads
    linears = {name: module for name, module in block.named_modules() if is_linear(module)}
    adapted = {name: ranks[f"{path}.{name}"] for name in linears if ranks.get(f"{path}.{name}")}
    norms = sum(
        _norm_width(name, module, hidden, heads, keys, width)
        for name, module in block.named_modules()
        if "norm" in type(module).__name__.lower() and not list(module.children())
    )
    inputs: dict[str, int] = {}
    mlp_kept = mlp_working = 0
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in linears):
        own = {name.rpartition(".")[2]: linears[name] for name in linears if name.rpartition(".")[0] == parent}
        with_adapter = {leaf for leaf in own if f"{parent}.{leaf}".lstrip(".") in adapted}
        gated = next((names for names in (*GATED_MLPS, *PACKED_MLPS) if set(names) <= set(own)), None)
        shared = next((names for names in ATTENTIONS if set(names) <= set(own)), ())
        if gated or (not shared and "attn" not in parent and "attention" not in parent):
            kept, working = _mlp(own, gated, with_adapter)
            mlp_kept, mlp_working = mlp_kept + kept, max(mlp_working, working)
            first = set(gated[:-1] if gated else list(own)[:1]) & with_adapter
            if first:
                inputs[parent] = _sizes(own[next(iter(first))])[0]
        else:
            reading = [leaf for leaf in with_adapter if leaf not in OUTPUT_PROJECTIONS]
            inputs |= {f"{parent}.{_sizes(own[leaf])[0]}": _sizes(own[leaf])[0] for leaf in reading}
    sizes = {name: _sizes(module) for name, module in linears.items()}
    return Layer(
        hidden=hidden,
        norms=norms,
        inputs=sum(inputs.values()),
        queries=heads * width,
        keys=keys * width,
        packed_attention=any(name.rpartition(".")[2] in PACKED_ATTENTIONS for name in linears),
        heads=heads,
        score=(CAPPED_SCORE_BYTES if getattr(text, "attn_logit_softcapping", None) else SCORE_BYTES) * eager,
        norm_after_mlp=any(name.startswith(("post_feedforward", "post_mlp")) for name, _ in block.named_children()),
        ranks=sum(adapted.values()),
        mlp_kept=mlp_kept,
        mlp_working=mlp_working,
        largest_weight=max((a * b for a, b in sizes.values()), default=0),
        adapter=sum(rank * sum(sizes[name]) for name, rank in adapted.items()),
    )


def _mlp(own: Mapping[str, nn.Module], gated, with_adapter: set[str]) -> tuple[int, int]:
    """(elements a token that an MLP keeps besides its input, those that come and go in its backward)"""
    *_, last = gated or own
    inner = _sizes(own[last])[0]
    if gated and set(gated) <= with_adapter:
        return 2 * inner, inner  # one autograd node: gate and up
    # the activation keeps what it reads, the product of a gated MLP both factors, an adapter its input
    kept = (3 if gated else 1) * inner + (inner if last in with_adapter else 0)
    return kept, (3 if gated else 2) * inner


def _is_gated(block: nn.Module) -> bool:
    """Whether a layer has an MLP of two projections and a product, by the names of its layers."""
    for module in block.modules():
        own = {name for name, child in module.named_children() if is_linear(child)}
        if any(set(names) <= own for names in (*GATED_MLPS, *PACKED_MLPS)):
            return True
    return False


def _norm_width(name: str, module: nn.Module, hidden: int, heads: int, keys: int, width: int) -> int:
    weight = getattr(module, "weight", None)
    size = weight.numel() if weight is not None else hidden
    leaf = name.rpartition(".")[2]
    if size == width and leaf.startswith(("q_", "query")):  # of each head
        return size * heads
    if size == width and leaf.startswith(("k_", "key")):
        return size * keys
    return size
