"""Diff pruning (Guo et al. 2021, "Parameter-Efficient Transfer Learning with Diff Pruning")."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from qlora_engine.peft.base import Method, MethodConfig, MethodError, register
from qlora_engine.peft.blocks import features, find_blocks, linear_targets
from qlora_engine.peft.gates import GatedDelta, Stretch
from qlora_engine.peft.parts import Attached
from qlora_engine.peft.sparse_delta import INDEX, VALUES, Largest, SparseDelta, deltas_of, load_deltas
from qlora_engine.peft.weights import change_weight, check_mergeable

GROUPS = ("none", "matrix", "block")
SEEDS = 2**20  # steps after which one part's noise is that of the next at the start


@dataclasses.dataclass
class DiffPruning(MethodConfig):
    """Trains a change of the weights that is driven to be sparse: `W + z_group z w`, with gates z in [0, 1].

    Training adds `method.penalty()` to the loss, calls `method.after_step(step)` after each step, which draws new
    gates, and at the end `method.finish()`, which leaves a sparse change. After step `fix_at` the entries that are
    kept are chosen, the largest of all layers; the gates are gone from then on, and those entries alone are trained.
    Guo et al. found this important: a dense change loses too much when it is pruned at the end. While it trains, the
    change takes 8 bytes a weight, with the optimizer's state 24. What is left, and saved, is sparse.

    Attributes:
        share: how many of the weights of the chosen layers have a change at the end, in (0, 1].
        fix_at: steps after which the entries that are kept are chosen. None: after two thirds of the steps where
            `method.plan(steps)` is called before the first, as `qlora finetune` does; without that call `finish`
            chooses, and nothing is trained behind it. The number of all steps does the same.
        penalty: factor of the expected share of open gates (the L0 norm of the change), which is added to the loss.
            Guo et al. penalize the number: their 1.25e-7 is 12.5 for 10^8 weights.
        structured: "none": a gate for each weight alone; "matrix": with a gate that a weight matrix shares; "block":
            one that the matrices of a block share.
        target_modules: patterns (see `QLoRAConfig`) of the linear layers; default: all but output heads.
        open_at: location of the gates at the start; sigmoid(5) leaves nearly all open.
        low, high: the interval that gates are stretched to.
        gate_lr: learning rate of the gates in `parameter_groups`.
        seed: of the gates' noise.

    >>> from qlora_engine.peft import apply
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> method = apply(model, DiffPruning(share=0.25, fix_at=2))
    >>> optimizer = torch.optim.Adam(method.parameter_groups(lr=1e-2))
    >>> for step in range(1, 4):
    ...     optimizer.zero_grad()
    ...     loss, penalty = model(torch.randn(10, 4)).square().sum(), method.penalty()
    ...     (loss if penalty is None else loss + penalty).backward()
    ...     optimizer.step()
    ...     method.after_step(step)
    >>> method.finish()
    >>> print(method.report())
    diff_pruning: 12 of 58 parameters are trained (20.690%), pruned True, share 0.25
    """

    name: ClassVar[str] = "diff_pruning"
    share: float = 0.005
    fix_at: int | None = None
    penalty: float = 1.0
    structured: str = "none"
    target_modules: Sequence[str] = ()
    open_at: float = 5.0
    low: float = -1.5
    high: float = 1.5
    gate_lr: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if not 0.0 < self.share <= 1.0:
            raise MethodError(f"the share is {self.share}; expected a number above 0 and at most 1")
        whole = isinstance(self.fix_at, int) and not isinstance(self.fix_at, bool)
        if self.fix_at is not None and not (whole and self.fix_at >= 1):
            raise MethodError(
                f"fix_at is {self.fix_at!r}; expected a number of steps, at least 1, or None for two thirds of them"
            )
        if self.structured not in GROUPS:
            raise MethodError(f"structured={self.structured!r}; expected one of {', '.join(GROUPS)}")
        if not (self.low < 0.0 and self.high > 1.0):
            raise MethodError(f"gates are stretched to [{self.low}, {self.high}]; expected low < 0 and high > 1")
        if self.penalty < 0.0:
            raise MethodError(f"the penalty is {self.penalty}; expected a number of at least 0")


@register
class DiffPruningMethod(Method):
    """Dense gated changes while training, sparse ones after `finish`.

    Attributes:
        pruned: whether `finish` has been called, here or before the file was saved.
    """

    config_class = DiffPruning

    def _install(self) -> None:
        config: DiffPruning = self.config
        self.pruned = False
        targets = linear_targets(self.model, config.target_modules)
        groups = self._groups(targets)
        names = list(dict.fromkeys(groups.values()))
        stretch, parts = Stretch(config.low, config.high), {}
        self._group_gates: dict[str, nn.Parameter] = {}
        for number, path in enumerate(targets):
            layer, group = self.model.get_submodule(path), groups.get(path)
            if group is not None and group not in self._group_gates:
                gate = torch.tensor(float(config.open_at), device=layer.weight.device)
                self._group_gates[group] = nn.Parameter(gate)
            order = number, len(targets) + (names.index(group) if group else 0)
            seeds = tuple((config.seed * 2**16 + place) * SEEDS for place in order)
            shape = tuple(reversed(features(layer)))
            shared = self._group_gates.get(group)
            parts[path] = GatedDelta(shape, config.open_at, stretch, shared, seeds, layer.weight.device)
        self._total = sum(part.delta.numel() for part in parts.values())
        self._attached = Attached(self.model, parts, "diff_pruning")

    def _groups(self, targets: list[str]) -> dict[str, str]:
        """Path of a layer -> name of its group."""
        if self.config.structured == "none":
            return {}
        blocks = [block.path for block in find_blocks(self.model)] if self.config.structured == "block" else []
        return {path: next((b for b in blocks if path.startswith(f"{b}.")), path) for path in targets}

    @property
    def fixed(self) -> bool:
        """Whether the entries that are kept have been chosen."""
        return self.pruned or all(part.fixed for part in self._attached.parts.values())

    def plan(self, steps: int) -> None:
        """Sets `fix_at`, where it is None, to two thirds of the steps.

        Raises:
            MethodError: where there are fewer than `fix_at`.
        """
        fix_at = self.config.fix_at
        if fix_at is None:
            self.config = dataclasses.replace(self.config, fix_at=max(1, 2 * steps // 3))
        elif fix_at > steps:
            raise MethodError(
                f"diff_pruning: fix_at is {fix_at}, but there are {steps} steps; expected at most as many. Lower it, "
                "or leave it out for two thirds of the steps"
            )

    def penalty(self) -> torch.Tensor | None:
        """`penalty * (expected number of open gates) / (number of gates)`, float32 `[]`; None once they are fixed."""
        if self.fixed:
            return None
        counts = [part.expected_open() for part in self._attached.parts.values()]
        return sum(count.to(counts[0].device) for count in counts) * (self.config.penalty / self._total)

    def after_step(self, step: int) -> None:
        """New gates are drawn for the next step; after step `fix_at` the entries that are kept are chosen instead.

        Raises:
            MethodError: where they are to be chosen, and nothing was learnt.
        """
        if self.pruned:
            return
        if not self.fixed and self.config.fix_at is not None and step >= self.config.fix_at:
            self._fix()
        for part in self._attached.parts.values():
            if part.fixed:
                part.clear()
            else:
                part.draw(step)

    def _fix(self) -> None:
        kept = self._largest()
        for path, part in self._attached.parts.items():
            part.fix(kept.get(path))
        with torch.no_grad():
            for gate in self._group_gates.values():
                gate.fill_(torch.inf)

    def _largest(self) -> dict[str, torch.Tensor]:
        """Path -> flat positions of the entries that are kept, if they are chosen now."""
        largest = Largest(max(1, round(self.config.share * self._total)))
        for path, part in self._attached.parts.items():
            largest.add(path, part.change().abs())
        found = largest.positions()
        if not found:
            raise MethodError("every change is zero: nothing was learnt, or the penalty closed all gates")
        return found

    def resume(self, step: int, progress: Mapping[str, torch.Tensor] | None = None) -> None:
        """The gates that were drawn after that step; whether they are fixed, `tensors` say."""
        if not self.fixed:
            for part in self._attached.parts.values():
                part.draw(step)

    def parameter_groups(self, lr: float, **options) -> list[dict[str, Any]]:
        """Gates have a learning rate of their own, and no weight decay."""
        named = self.trainable_parameters()
        gates = [name for name in named if name.endswith((".gate", ".group"))]
        found = [{"params": [p for name, p in named.items() if name not in gates], "lr": lr, **options}]
        if gates:
            without = {**options, "weight_decay": 0.0}
            found.append({"params": [named[name] for name in gates], "lr": self.config.gate_lr, **without})
        return found

    def finish(self) -> None:
        """Prunes: the entries that were chosen at `fix_at` stay, whatever their size is by now, and no others.

        Where none were chosen yet, the `share` of all weights whose change is largest keeps it. What is left can be
        trained further, with an optimizer that is made anew; it has no gates.

        Raises:
            MethodError: where it has been done already, or nothing was learnt.
        """
        if self.pruned:
            raise MethodError("the change is pruned already")
        if not self.fixed:
            self._fix()
        sparse = {}
        for path, part in self._attached.parts.items():
            index = part.kept()
            if len(index):
                sparse[path] = SparseDelta(index, tuple(part.delta.shape), part.delta.detach().flatten()[index])
        self._replace(sparse)

    def _replace(self, sparse: dict[str, SparseDelta]) -> None:
        self._attached.detach()
        self._attached = Attached(self.model, sparse, "diff_pruning")
        self._attached.enable(self.enabled)
        self._group_gates, self.pruned = {}, True

    def _uninstall(self) -> None:
        self._attached.detach()

    def _switch(self, enabled: bool) -> None:
        self._attached.enable(enabled)

    def tensors(self) -> dict[str, torch.Tensor]:
        names = (INDEX, VALUES) if self.pruned else ("delta", "gate")
        parts = self._attached.parts.items()
        found = {f"{path}.{name}": getattr(part, name) for path, part in parts for name in names}
        return found | {f"{group}.group": gate for group, gate in self._group_gates.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if not self.pruned and any(name.endswith(f".{INDEX}") for name in state):
            self._replace(deltas_of(self.model, state))
            return
        if self.pruned:
            load_deltas(self._attached.parts, state, super().load_state_dict)
        else:
            super().load_state_dict(state)
            for part in self._attached.parts.values():
                part.fixed = bool(part.gate.isinf().all())

    def merge(self) -> nn.Module:
        """Adds the change to the weights; 4-bit weights are quantized again, which rounds most of it away."""
        self._check_applied()
        parts = self._attached.parts
        learnt = self.tensors().values() if self.pruned else (part.change() for part in parts.values())
        check_mergeable(self.model, parts, learnt)
        for path, part in parts.items():
            add = part.add_to if self.pruned else lambda weight, part=part: weight + part.change()
            change_weight(self.model.get_submodule(path), add)
        return self.remove()

    def notes(self) -> dict[str, Any]:
        parts = self._attached.parts.values()
        if self.pruned:
            return {"pruned": True, "share": sum(len(part.values) for part in parts) / self._total}
        with torch.no_grad():
            opened = sum(float(part.expected_open()) for part in parts)
        return {"pruned": False, "expected share of open gates": round(opened / self._total, 4)}
