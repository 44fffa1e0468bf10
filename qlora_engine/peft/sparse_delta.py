"""A sparse change of a frozen weight, in 4 bits or not: `y + x Δ.T` with memory for the entries of Δ alone.

Δ `[out, in]` is a sorted list of flat indices and their values. Two ways to multiply by it:

    few rows of x:   products of every entry with its column of x, summed row by row of Δ   M * entries operations
    many rows of x:  tiles of whole rows of Δ, made dense one after another                  a dense product's

The gradient of the values takes the entries out of the same tiles of `g.T x`. A tile has at most `TILE` elements, so
neither way needs memory of the weight's size where the weight is larger than a tile. Sums are taken in a fixed order:
the same input gives the same bits.
"""

from collections.abc import Mapping

import torch
from torch import nn

from qlora_engine.peft.base import MethodError
from qlora_engine.peft.blocks import features
from qlora_engine.peft.parts import Part

TILE = 2**24  # elements that are dense at once: 32 MiB in 16 bits
FEW = 2**20  # products of the first way that are held at once
INDEX, VALUES = "index", "values"

Tiles = tuple[tuple[int, int, int, int], ...]  # first and last row, first and last entry


class SparseDelta(Part):
    """Adds `x Δ.T` to a linear layer's output.

    Args:
        index: int64 `[entries]`, positions in the flattened `[out, in]`, ascending.
        values: float32 `[entries]`; default: zeros.
        shape: (out, in).

    Raises:
        MethodError: where the positions are not ascending or not inside the weight.
    """

    def __init__(self, index: torch.Tensor, shape: tuple[int, int], values: torch.Tensor | None = None):
        super().__init__()
        self.shape = shape
        small = shape[0] * shape[1] < 2**31
        self.register_buffer(INDEX, index.to(torch.int32 if small else torch.int64))
        values = torch.zeros(index.shape, device=index.device) if values is None else values.float()
        self.values = nn.Parameter(values)
        self.register_buffer("counts", None, persistent=False)
        self.refresh()

    def refresh(self) -> None:
        """Finds rows and tiles again, after the positions have changed.

        Raises:
            MethodError: as in the constructor.
        """
        rows, columns = self.shape
        index = self.index.long()
        check_positions(index, self.shape)
        self.counts = torch.bincount(index // columns, minlength=rows)
        step = max(1, TILE // columns)
        ends = [*range(step, rows, step), rows]
        entries = torch.searchsorted(
            index, torch.tensor([end * columns for end in ends], device=index.device)
        ).tolist()
        starts = zip([0, *ends[:-1]], ends, [0, *entries[:-1]], entries, strict=True)
        self.tiles: Tiles = tuple(tile for tile in starts if tile[2] < tile[3])

    def after(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + _SparseLinear.apply(x.to(y.dtype), self.values, self.index, self.counts, self.shape, self.tiles)

    @torch.no_grad()
    def add_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The sum of Δ and a float32 weight `[out, in]`."""
        flat = weight.reshape(-1)
        flat[self.index.long()] += self.values
        return flat.view(self.shape)

    def extra_repr(self) -> str:
        return f"{len(self.values)} of {list(self.shape)}"


def check_positions(index: torch.Tensor, shape: tuple[int, int]) -> None:
    """Whether positions are those of entries of a weight.

    Raises:
        MethodError: where they are not ascending or not inside it, or there are none.
    """
    index = index.long()
    inside = index.dim() == 1 and len(index) and int(index[0]) >= 0 and int(index[-1]) < shape[0] * shape[1]
    if not inside or not bool((index[1:] > index[:-1]).all()):
        raise MethodError(
            f"positions of a sparse change of a weight {list(shape)} are not ascending or not inside it"
        )


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, index, counts, shape, tiles):
        ctx.save_for_backward(x, values, index)
        ctx.shape, ctx.tiles = shape, tiles
        rows = x.reshape(-1, shape[1])
        if rows.shape[0] * len(values) <= FEW:
            columns = index.long() % shape[1]
            products = rows.float().T[columns] * values[:, None]
            change = torch.segment_reduce(products, "sum", lengths=counts, axis=0, unsafe=True).T
        else:
            change = rows.new_zeros(rows.shape[0], shape[0])
            for first, last, start, end in tiles:
                change[:, first:last] = rows @ _dense(values, index, shape, (first, last, start, end), x.dtype).T
        return change.to(x.dtype).reshape(*x.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx, gradient):
        x, values, index = ctx.saved_tensors
        rows, gradient = x.reshape(-1, ctx.shape[1]), gradient.reshape(-1, ctx.shape[0])
        of_x = rows.new_zeros(rows.shape, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        of_values = torch.zeros_like(values) if ctx.needs_input_grad[1] else None
        for tile in ctx.tiles:
            first, last, start, end = tile
            part = gradient[:, first:last]
            if of_x is not None:
                of_x += part @ _dense(values, index, ctx.shape, tile, part.dtype)
            if of_values is not None:
                inside = index[start:end].long() - first * ctx.shape[1]
                of_values[start:end] = (part.T @ rows).reshape(-1)[inside].to(values.dtype)
        return None if of_x is None else of_x.to(x.dtype).view(x.shape), of_values, None, None, None, None


def _dense(values, index, shape, tile, dtype) -> torch.Tensor:
    first, last, start, end = tile
    dense = torch.zeros((last - first) * shape[1], dtype=dtype, device=values.device)
    dense[index[start:end].long() - first * shape[1]] = values[start:end].to(dtype)
    return dense.view(last - first, shape[1])


def load_deltas(parts: Mapping[str, SparseDelta], state: Mapping[str, torch.Tensor], load) -> None:
    """Has `load(state)` write into parts, once positions of theirs in it have been found to fit.

    Raises:
        MethodError: where they do not, and what `load` raises; nothing has been written then.
    """
    for path, part in parts.items():
        index = state.get(f"{path}.{INDEX}")
        if index is not None and index.shape == part.index.shape and not index.is_floating_point():
            check_positions(index, part.shape)
    load(state)
    for part in parts.values():
        part.refresh()


class Largest:
    """The positions of the largest of many numbers, which are given layer by layer.

    Args:
        count: how many; memory is that of so many and those of one layer.
    """

    def __init__(self, count: int):
        self.count = count
        self._layers: list[str] = []
        self._scores: torch.Tensor | None = None

    def add(self, path: str, scores: torch.Tensor) -> None:
        """The numbers of one layer, `[out, in]`, which must not be negative."""
        best, where = scores.flatten().topk(min(self.count, scores.numel()))
        owner = torch.full_like(where, len(self._layers))
        self._layers.append(path)
        if self._scores is not None:
            best = torch.cat([self._scores, best.to(self._scores.device)])
            where = torch.cat([self._where, where.to(best.device)])
            owner = torch.cat([self._owner, owner.to(best.device)])
        kept = best.topk(min(self.count, len(best))).indices
        self._scores, self._where, self._owner = best[kept], where[kept], owner[kept]

    def positions(self) -> dict[str, torch.Tensor]:
        """Path -> ascending int64 positions of those that are above zero; layers without any are left out."""
        if self._scores is None:
            return {}
        alive = self._scores > 0
        where, owner = self._where[alive], self._owner[alive]
        found = {path: where[owner == number].sort().values for number, path in enumerate(self._layers)}
        return {path: positions for path, positions in found.items() if len(positions)}


def deltas_of(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, SparseDelta]:
    """Changes as a file has them: `PATH.index` and `PATH.values` of each layer.

    Raises:
        MethodError: where a layer is not there, or what is said of it does not fit.
    """
    if not state:
        raise MethodError("the file has no change of any layer")
    found = {}
    for path in sorted({name.rpartition(".")[0] for name in state}):
        index, values = state.get(f"{path}.{INDEX}"), state.get(f"{path}.{VALUES}")
        try:
            layer = model.get_submodule(path)
            shape = tuple(reversed(features(layer)))
        except AttributeError as error:
            raise MethodError(f"the file has a change of {path!r}, which is no linear layer of this model") from error
        if index is None or values is None or index.shape != values.shape or index.is_floating_point():
            raise MethodError(f"the file's change of {path} is not a list of positions with as many values")
        device = layer.weight.device
        found[path] = SparseDelta(index.to(device).long(), shape, values.to(device))
    return found
