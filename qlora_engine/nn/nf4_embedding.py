"""`NF4Embedding`: a table in 4 bits, of which the rows asked for alone are decoded; and an output head tied to it."""

import math

import torch
from torch import nn

from qlora_engine import ops
from qlora_engine.nn.nf4_linear import QUANTIZED_BUFFERS, NF4Linear
from qlora_engine.nn.nf4_matrix import NF4Matrix, apply_beside_scales
from qlora_engine.quantization.codebook import NESTED_BLOCKSIZE, blocks_of
from qlora_engine.quantization.weight import NF4Weight, quantize


class NF4Embedding(NF4Matrix, nn.Module):
    """`y = W[ids]` with W `[num_embeddings, embedding_dim]` stored in 4 bits, frozen.

    The weight is plain tensors, as in `NF4Linear`: the whole table in blocks of its flat order. The bytes and scales
    of the rows asked for are gathered and decoded, nothing else. Where `embedding_dim` is a multiple of the block
    size that is all; else a row begins and ends inside blocks, and the blocks that it touches are decoded.

    It is no `nn.Embedding`, whose weight others read and write as numbers. A vocabulary is changed before it is
    quantized: transformers' `resize_token_embeddings` finds no rows in packed bytes, and fails.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: their size.
        padding_idx: row that stood for padding, for whoever asks. Nothing is trained here, so it changes nothing.
        blocksize: elements of the table that share a scale; a power of two from 32 to 4096.
        double_quant: whether the scales are stored in 8 bits.
        device: where the tensors are made; "meta" makes a module to load a `state_dict` into with `assign=True`.
        dtype: of the output; default: torch's. Casting the module changes it, and leaves bytes and scales alone.

    A module made this way has a table of zeros. Use `from_embedding`, or load a `state_dict`.

    >>> table = nn.Embedding(10, 64)
    >>> whole = quantize(table.weight).dequantize()
    >>> ids = torch.tensor([[3, 7]])
    >>> torch.equal(NF4Embedding.from_embedding(table)(ids), whole[ids])
    True
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.blocksize, self.weight_dtype = blocksize, dtype or torch.get_default_dtype()
        numel = num_embeddings * embedding_dim
        blocks = blocks_of(numel, blocksize)

        def zeros(*shape, dtype):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.weight = nn.Parameter(zeros(math.ceil(numel / 2), dtype=torch.uint8), requires_grad=False)
        self.register_buffer("absmax", zeros(blocks, dtype=torch.uint8 if double_quant else torch.float32))
        groups = blocks_of(blocks, NESTED_BLOCKSIZE)
        nested = (zeros(groups, dtype=torch.float32), zeros(dtype=torch.float32)) if double_quant else (None, None)
        self.register_buffer("nested_absmax", nested[0])
        self.register_buffer("nested_offset", nested[1])

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        scales: str = "absmax",
        device: torch.device | str | None = None,
    ):
        """Quantizes a table; its 16-bit weight is released.

        Args:
            embedding: an `nn.Embedding`, of no subclass, which could do more. Afterwards its `weight` is None.
            blocksize: elements of the table that share a scale.
            double_quant: whether the scales are stored in 8 bits.
            scales: how they are found: "absmax", "search" or "signed", as in `qlora_engine.quantize`.
            device: where to quantize and keep the table; default: where it is.

        Raises:
            TypeError: for another kind of module.
            ValueError: where the weight has already been released, vectors are normalized as they are read
                (`max_norm`), or there are no such scales.
        """
        reason = why_not_quantizable(embedding)
        if reason:
            raise TypeError(reason) if type(embedding) is not nn.Embedding else ValueError(reason)
        weight = embedding.weight.detach()
        w4 = quantize(weight if device is None else weight.to(device), blocksize, double_quant, scales)
        module = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            blocksize=blocksize,
            double_quant=double_quant,
            device="meta",
            dtype=weight.dtype,
        )
        module.set_nf4_weight(w4)
        module.train(embedding.training)
        embedding.register_parameter("weight", None)
        return module

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Of the decoded table."""
        return self.num_embeddings, self.embedding_dim

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded table `[num_embeddings, embedding_dim]`; default dtype: that of the output."""
        return self.nf4_weight.dequantize(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 or int32 `[...]` to `[..., embedding_dim]`, in `weight_dtype`: bit for bit `dequantize()[ids]`."""
        return rows_of(self.nf4_weight, ids)

    def _apply(self, fn, recurse=True):
        # a change of dtype reaches what the rows are decoded to, and neither bytes nor scales
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.weight.device)).dtype
        apply = super()._apply
        return apply_beside_scales(self, QUANTIZED_BUFFERS, fn, lambda: apply(fn, recurse))

    def reset_parameters(self) -> None:
        """Nothing: a quantized weight is not initialised in place."""

    def extra_repr(self) -> str:
        scales = "8-bit scales" if self.double_quant else "float32 scales"
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, nf4 blocks of {self.blocksize}, {scales}"


class TiedNF4Linear(NF4Linear):
    """An output head on the table of an `NF4Embedding`: `y = x W.T + bias`, with no weight of its own.

    `weight` and the scales are the embedding's, wherever it goes: they are moved, saved and counted once, there.

    Args:
        embedding: whose table is the weight, `[out_features, in_features]`.
        bias: `[out_features]`, or None.
    """

    def __init__(self, embedding: NF4Embedding, bias: torch.Tensor | None = None):
        nn.Module.__init__(self)
        self.__dict__["_source"] = (embedding,)  # in a tuple: it is a module of the model already, in its own place
        self.fan_in_fan_out = False
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def embedding(self) -> NF4Embedding:
        """The layer that holds the weight."""
        return self._source[0]

    weight = property(lambda self: self.embedding.weight)
    absmax = property(lambda self: self.embedding.absmax)
    nested_absmax = property(lambda self: self.embedding.nested_absmax)
    nested_offset = property(lambda self: self.embedding.nested_offset)
    blocksize = property(lambda self: self.embedding.blocksize)
    weight_dtype = property(lambda self: self.embedding.weight_dtype)
    in_features = property(lambda self: self.embedding.embedding_dim)
    out_features = property(lambda self: self.embedding.num_embeddings)

    def set_nf4_weight(self, w4: NF4Weight) -> None:
        """Replaces the weight of head and embedding."""
        self.embedding.set_nf4_weight(w4)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, the embedding's"


def why_not_quantizable(embedding: nn.Module) -> str | None:
    """Why a table cannot become an `NF4Embedding`, or None."""
    if type(embedding) is not nn.Embedding:
        return (
            f"{type(embedding).__name__} is not a table to quantize; expected nn.Embedding itself, as a subclass may "
            "do more than look rows up"
        )
    if embedding.weight is None:
        return "this table's weight was released when it was quantized before"
    if embedding.max_norm is not None:
        return (
            f"its vectors are normalized as they are read (max_norm={embedding.max_norm}), which frozen ones are not"
        )
    return None


def rows_of(w4: NF4Weight, ids: torch.Tensor) -> torch.Tensor:
    """Decoded rows of a 4-bit matrix, bit for bit those of the whole matrix decoded.

    Args:
        w4: a weight of shape `[rows, columns]`.
        ids: int64 or int32 `[...]`, from 0 to rows - 1.

    Returns:
        `[..., columns]` in the weight's dtype.

    Raises:
        IndexError, RuntimeError: on the CPU, for ids out of range; a GPU reports them later.
    """
    (rows, columns), blocksize = w4.shape, w4.blocksize
    flat = ids.reshape(-1)
    if columns % blocksize == 0:
        per_row = columns // blocksize
        packed = w4.packed.view(rows, columns // 2).index_select(0, flat)
        absmax = w4.absmax.view(rows, per_row).index_select(0, flat)
        blocks = flat.long().unsqueeze(1) * per_row + torch.arange(per_row, device=ids.device)
        decoded = _decode(w4, packed, absmax, blocks)
    else:
        torch._assert_async(((flat >= 0) & (flat < rows)).all(), f"an id is out of range; there are {rows} rows")
        start = flat.long().unsqueeze(1) * columns
        touched = blocks_of(columns - 1, blocksize) + 1  # blocks at most, however a row lies across them
        blocks = start // blocksize + torch.arange(touched, device=ids.device)
        halves = torch.arange(blocksize // 2, device=ids.device)
        bytes_ = (blocks.unsqueeze(2) * (blocksize // 2) + halves).flatten(1)
        blocks = blocks.clamp(max=w4.absmax.numel() - 1)  # behind the last row there is nothing to pick
        packed, absmax = w4.packed[bytes_.clamp(max=w4.packed.numel() - 1)], w4.absmax[blocks]
        whole = _decode(w4, packed, absmax, blocks)
        decoded = whole.gather(1, start % blocksize + torch.arange(columns, device=ids.device))
    return decoded.view(*ids.shape, columns)


def _decode(w4: NF4Weight, packed: torch.Tensor, absmax: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Gathered blocks `[n, k]` by their bytes and scales, to `[n, k blocksize]`."""
    if w4.double_quant:
        # `dequantize_absmax` of scales that are no neighbours any more; with scale 1 it gives the code itself
        code = torch.arange(256, dtype=torch.uint8, device=absmax.device)
        one, zero = torch.ones(1, device=absmax.device), torch.zeros((), device=absmax.device)
        levels = ops.dequantize_absmax(code, one, zero)[absmax.long()]
        absmax = levels * w4.nested_absmax[blocks // NESTED_BLOCKSIZE] + w4.nested_offset
    shape = (blocks.shape[0], blocks.shape[1] * w4.blocksize)
    return ops.dequantize_nf4(packed.view(-1), absmax.view(-1), None, None, w4.blocksize, shape, w4.dtype)
