"""The parameters of one device, with their paged state, and one step of them."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch

from qlora_engine.ops import adamw as ops
from qlora_engine.optim.arena import Arena
from qlora_engine.optim.layout import decode_8bit, encode_8bit, flat_view, logical_shape
from qlora_engine.optim.sharded import is_sharded, local_part, local_state, with_local


@dataclass
class Member:
    """A parameter of a bucket: the group it is in, and how its state is kept."""

    param: torch.Tensor
    group: int
    layout: int

    @property
    def tensor(self) -> torch.Tensor:
        """What this process holds of the parameter: its part where the parameter is sharded."""
        return local_part(self.param)


class Bucket:
    """Parameters of one device.

    Args:
        device: theirs.
        budget: see `Arena`.
        backend: see `Arena`.
    """

    def __init__(self, device: torch.device, budget: int | None, backend: str):
        self.device = device
        self.members: list[Member] = []
        self.sharded = False  # whether any parameter is
        self.arena = Arena(device, budget, backend)
        self.steps = torch.zeros(0, device=device)
        self._flat: list[torch.Tensor] = []  # every parameter's elements; made anew where a parameter's memory is
        # what the launches read; one for each operator, so that neither rewrites the other's
        self._tables: dict[str, tuple[tuple[int, int, int], list[torch.Tensor]]] = {}

    def extend(self, members: Sequence[Member]) -> None:
        """Adds parameters with zeroed state, and their master copies."""
        first = len(self.members)
        self.members.extend(members)
        self.sharded = self.sharded or any(is_sharded(m.param) for m in members)
        self.arena.extend([m.tensor.numel() for m in members], [m.layout for m in members])
        self.steps = torch.cat([self.steps, torch.zeros(len(members), device=self.device)])
        copies = {i: m for i, m in enumerate(self.members[first:], first) if m.layout & ops.MASTER_COPY}
        if copies:
            self.load({i: {"master": m.tensor.detach()} for i, m in copies.items()})

    def gradients(self) -> list[torch.Tensor | None]:
        """Every parameter's gradient as a flat contiguous tensor in the order of the parameter's memory."""
        found: list[torch.Tensor | None] = []
        for member in self.members:
            grad = member.param.grad
            if grad is None:
                found.append(None)
                continue
            param, grad = member.tensor, local_part(grad)
            if grad.is_sparse:
                raise RuntimeError("a gradient is sparse; use torch.optim.SparseAdam for its parameter")
            if grad.dtype != param.dtype:
                raise RuntimeError(
                    f"a gradient is {grad.dtype}, its parameter {param.dtype}; expected one dtype for both"
                )
            plain = grad.is_contiguous() and param.is_contiguous()
            found.append(grad if plain else flat_view(grad, like=param).contiguous())
        return found

    def _parameters(self) -> list[torch.Tensor]:
        """Every parameter as a flat contiguous tensor that aliases it."""
        known, members = self._flat, self.members
        if len(known) != len(members):
            self._flat = [flat_view(m.tensor.detach()) for m in members]
            return self._flat
        for i, (flat, member) in enumerate(zip(known, members, strict=True)):
            if flat.data_ptr() != member.tensor.data_ptr():
                known[i] = flat_view(member.tensor.detach())
        return known

    def norm(self, grads: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """The L2 norm of all gradients, float32 []."""
        return ops.gradient_norm(grads, self.arena.page_table, self._launch_table("gradient_norm", 0, 0))

    def step(
        self,
        grads: Sequence[torch.Tensor | None],
        hyper: Sequence[float],
        multiplier: torch.Tensor | None,
        skip: torch.Tensor | None,
        seed: int,
    ) -> None:
        """One AdamW step; see `ops.adamw_step`."""
        ops.adamw_step(
            self._parameters(),
            grads,
            self.steps,
            self.arena.slabs,
            self.arena.page_table,
            self.arena.cold_pages,
            self._launch_table("adamw_step", len(hyper) // ops.HYPERPARAMETERS, len(self.arena.slabs)),
            hyper,
            [m.group for m in self.members],
            [m.layout for m in self.members],
            multiplier,
            skip,
            seed,
        )

    def _launch_table(self, operator: str, groups: int, slabs: int) -> list[torch.Tensor]:
        size = (len(self.members), groups, slabs)
        if operator not in self._tables or self._tables[operator][0] != size:
            self._tables[operator] = (size, ops.launch_table(*size, self.device))
        return self._tables[operator][1]

    def export(self, decode: bool) -> list[dict[str, torch.Tensor]]:
        """The state of every parameter in CPU memory, shaped like the parameter; a DTensor where that is one.

        Args:
            decode: 8-bit state as float32 exp_avg and exp_avg_sq, and no master copy: torch.optim.AdamW's form. Else
                exp_avg_codes, exp_avg_absmax, exp_avg_sq_codes, exp_avg_sq_absmax as they are, flat; that of a
                sharded parameter is decoded all the same, as blocks of another number of processes are others.
        """
        exported = []
        parts = self._flat_parts(range(len(self.members)))
        for member, whole, step in zip(self.members, parts, self.steps.tolist(), strict=True):
            state = {"step": torch.tensor(step, dtype=torch.float32)}
            sharded, param = is_sharded(member.param), member.tensor
            for name in ("exp_avg", "exp_avg_sq"):
                values = whole.get(name, torch.empty(0))
                if values.dtype != torch.uint8:
                    state[name] = logical_shape(values, param)
                elif decode or sharded:
                    signed = name == "exp_avg"
                    state[name] = logical_shape(decode_8bit(values, whole[f"{name}_absmax"], signed), param)
                else:
                    state[f"{name}_codes"], state[f"{name}_absmax"] = values, whole[f"{name}_absmax"]
            if "master" in whole and not decode:
                state["master"] = logical_shape(whole["master"], param)
            exported.append(with_local(state, member.param) if sharded else state)
        return exported

    def load(self, states: dict[int, dict[str, torch.Tensor]]) -> None:
        """Overwrites the state of parameters, converting between 32 and 8 bits.

        Args:
            states: for members by index, what `export` gives in either form, of a sharded parameter whole or sharded
                as it is; what is absent keeps its value, but the
                master copy is that of the parameter where moments come without one.
        """
        if not states:
            return
        current = self._flat_parts(states)
        parts = {}
        for index, state in states.items():
            member = self.members[index]
            if "step" in state:
                self.steps[index] = float(state["step"])
            parts[index] = {**current[index], **_parts_of(state, member)}
        self.arena.write(parts)

    def _flat_parts(self, wanted: Container[int]) -> list[dict[str, torch.Tensor]]:
        """Every part of the wanted members' state, flat, in CPU memory; {} for the others."""
        flat: list[dict[str, list[torch.Tensor]]] = [{} for _ in self.members]
        for page, views in self.arena.read():
            if page.parameter in wanted:
                for name, view in views.items():
                    count = page.count if not name.endswith("_absmax") else len(view)
                    flat[page.parameter].setdefault(name, []).append(view[:count].clone())
        return [{name: torch.cat(pieces) for name, pieces in parts.items()} for parts in flat]


def _parts_of(state: dict[str, torch.Tensor], member: Member) -> dict[str, torch.Tensor]:
    """Flat CPU tensors of the member's layout from a saved state of any layout."""
    param, parts = member.tensor, {}
    state = local_state(state, member.param)
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        codes = state.get(f"{name}_codes")
        if codes is not None:
            _check_numel(name, codes, param)
            absmax = state[f"{name}_absmax"].cpu()
            if member.layout & ops.EIGHT_BIT_STATE:
                parts[name], parts[f"{name}_absmax"] = codes.cpu(), absmax
            else:
                parts[name] = decode_8bit(codes.cpu(), absmax, signed)
        elif name in state:
            _check_numel(name, state[name], param)
            values = _flat(state[name], param)
            if member.layout & ops.EIGHT_BIT_STATE:
                parts[name], parts[f"{name}_absmax"] = encode_8bit(values, signed)
            else:
                parts[name] = values
    if member.layout & ops.MASTER_COPY and ("master" in state or "exp_avg" in parts):
        source = state.get("master", param.detach())
        _check_numel("master", source, param)
        parts["master"] = _flat(source, param)
    return parts


def _flat(values: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """float32 `[n]` in CPU memory, in the order of the parameter's memory."""
    return flat_view(values.detach().float().cpu().reshape(param.shape), like=param).reshape(-1)


def _check_numel(name: str, values: torch.Tensor, param: torch.Tensor) -> None:
    if values.numel() != param.numel():
        raise ValueError(
            f"the saved {name} has {values.numel()} elements, its parameter of shape {tuple(param.shape)} "
            f"{param.numel()}; load a checkpoint of the same parameters in the same order"
        )
