"""PagedAdamW: AdamW whose state lies where there is room, in one launch a step."""

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch

from qlora_engine.ops import adamw as ops
from qlora_engine.optim.arena import check_backend
from qlora_engine.optim.bucket import Bucket, Member
from qlora_engine.optim.layout import is_dense
from qlora_engine.optim.sharded import global_norm, local_part

NONFINITE = ("skip", "raise", "propagate")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with paged state; a drop-in for torch.optim.AdamW.

    Loshchilov & Hutter 2019, "Decoupled weight decay regularization", algorithm 2, in the order of torch's own
    operations. The moments of all parameters lie in pages: those within `device_budget` on the GPU, the others in
    host memory that the kernel streams across the bus in place, so that no step waits for memory to migrate (the
    paged optimizer of Dettmers et al. 2023, "QLoRA", section 3, without its page faults). One launch updates
    everything.

    Of parameters that `qlora_engine.distributed.shard`, or torch's `fully_shard`, has sharded, each process keeps and
    updates the state of its own part; the norm of the gradients is that over all processes.

    Args:
        params: parameters or groups of them; float32, float16 or bfloat16. A group may set lr, betas, eps,
            weight_decay, maximize, and bits.
        lr: learning rate; a float, or a CPU tensor of one element.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        bits: 32, or 8: moments in blocks of 256 with dynamic maps (Dettmers et al. 2022, "8-bit optimizers via
            block-wise quantization").
        device_budget: bytes of state that may lie on the GPU; None: as much as fits, 0: none. For CPU parameters
            it means nothing.
        backend: where the rest lies: "managed" or "pinned" host memory, "auto" for the former where host and GPU may
            share it, or "device": nowhere, running out of memory is an error.
        maximize: ascend instead.
        amsgrad: must be False.
        master_weights: keep a float32 copy of each 16-bit parameter and round it to the parameter after each step.
        stochastic_rounding: round bfloat16 parameters up or down at random, so that small updates count on average.
        max_grad_norm: scale all gradients down together to this L2 norm; `last_grad_norm` is the norm before.
        nonfinite: what a step does where a gradient holds NaN or infinity: "skip" it whole (`skipped_steps` counts),
            "raise" FloatingPointError (waits for the GPU each step), or "propagate" as torch does.
        min_8bit_size: parameters with fewer elements keep 32 bits.
        spill_under_pressure: halve the state on the GPU when torch's allocator had to flush its cache since the last
            step.
        seed: of stochastic rounding.

    Raises:
        ValueError: for an argument outside its range, for a parameter of another dtype or layout.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = PagedAdamW([weight], lr=0.1, weight_decay=0.0)
    >>> weight.square().sum().backward()
    >>> _ = optimizer.step()
    >>> [round(w, 6) for w in weight.tolist()]
    [0.9, -1.9]
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 32,
        device_budget: int | None = None,
        backend: str = "auto",
        maximize: bool = False,
        amsgrad: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        nonfinite: str = "skip",
        min_8bit_size: int = 4096,
        spill_under_pressure: bool = False,
        seed: int = 0,
    ):
        if device_budget is not None and device_budget < 0:
            raise ValueError(f"device_budget is {device_budget}; expected bytes, 0 or more, or None for what fits")
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite is {nonfinite!r}; expected one of {', '.join(NONFINITE)}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; expected a positive number, or None not to clip")
        if master_weights and stochastic_rounding:
            raise ValueError(
                "master_weights and stochastic_rounding are two answers to one problem; give one of them"
            )
        self._budget, self._backend = device_budget, backend
        self._master_weights, self._stochastic_rounding = master_weights, stochastic_rounding
        self._max_grad_norm, self._nonfinite = max_grad_norm, nonfinite
        self._min_8bit_size, self._seed = min_8bit_size, seed
        self._spill_under_pressure = spill_under_pressure
        self._buckets: dict[torch.device, Bucket] = {}
        self._place: dict[torch.Tensor, tuple[torch.device, int]] = {}
        self._skipped: torch.Tensor | None = None
        self._allocator_retries: dict[torch.device, int] = {}
        self.last_grad_norm: torch.Tensor | None = None
        # torch.amp.GradScaler then leaves unscaling and the check for infinities to the kernel
        self._step_supports_amp_scaling = True
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "amsgrad": amsgrad,
            "bits": bits,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters; their state is made at the next step.

        Raises:
            ValueError: for a hyperparameter outside its range, or a parameter of another dtype or layout.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if isinstance(lr, torch.Tensor) and (lr.numel() != 1 or lr.device.type != "cpu"):
            raise ValueError(
                "lr is a tensor on a GPU or of several elements; expected a number or a CPU tensor of one"
            )
        if not 0 <= float(lr) < math.inf:
            raise ValueError(f"lr is {lr}; expected a number of at least 0")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"betas are {group['betas']}; expected two numbers from 0 up to but not 1")
        if not group["eps"] >= 0:
            raise ValueError(f"eps is {group['eps']}; expected a number of at least 0")
        if not group["weight_decay"] >= 0:
            raise ValueError(f"weight_decay is {group['weight_decay']}; expected a number of at least 0")
        if group["amsgrad"]:
            raise ValueError("amsgrad=True is not supported; use torch.optim.AdamW(amsgrad=True)")
        if group["bits"] not in (8, 32):
            raise ValueError(f"bits is {group['bits']}; expected 32 or 8")
        for param in group["params"]:
            if param.dtype not in DTYPES:
                raise ValueError(
                    f"a parameter is {param.dtype}; expected float32, float16 or bfloat16. Of a model with 4-bit "
                    "weights, give it those that are trained: [p for p in model.parameters() if p.requires_grad]"
                )
            if not is_dense(local_part(param)):
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} has gaps or overlaps in "
                    "memory; expected a dense tensor: call .contiguous() before making it a Parameter"
                )
            check_backend(self._backend, self._budget, param.device)

    def _layout(self, param: torch.Tensor, bits: int) -> int:
        layout = ops.EIGHT_BIT_STATE if bits == 8 and param.numel() >= self._min_8bit_size else 0
        if self._master_weights and param.dtype != torch.float32:
            layout |= ops.MASTER_COPY
        if self._stochastic_rounding and param.dtype == torch.bfloat16:
            layout |= ops.STOCHASTIC_ROUNDING
        return layout

    def _prepare(self) -> None:
        """State for parameters that have none yet."""
        new: dict[torch.device, list[Member]] = {}
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param not in self._place:
                    new.setdefault(param.device, []).append(Member(param, index, self._layout(param, group["bits"])))
        for device, members in new.items():
            if device not in self._buckets:
                self._buckets[device] = Bucket(device, self._budget, self._backend)
            bucket = self._buckets[device]
            for i, member in enumerate(members, len(bucket.members)):
                self._place[member.param] = (device, i)
            bucket.extend(members)
        if new:
            for bucket in self._buckets.values():
                for i, member in enumerate(bucket.members):
                    self.state[member.param] = {"step": bucket.steps[i]}

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step of every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: for a sparse gradient, or one of another dtype than its parameter's.
            FloatingPointError: with nonfinite="raise", where a gradient holds NaN or infinity; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._prepare()
        if self._spill_under_pressure:
            self._yield_memory()
        grads = {device: bucket.gradients() for device, bucket in self._buckets.items()}
        multiplier, skip = self._scaling(grads)
        hyper = [number for group in self.param_groups for number in self._numbers(group)]
        for device, bucket in self._buckets.items():
            if any(g is not None for g in grads[device]):
                moved = [None if t is None else t.to(device, torch.float32) for t in (multiplier, skip)]
                bucket.step(grads[device], hyper, *moved, self._seed)
        return loss

    @staticmethod
    def _numbers(group: dict[str, Any]) -> list[float]:
        sign = -1.0 if group["maximize"] else 1.0
        return [float(group["lr"]), *group["betas"], group["eps"], float(group["weight_decay"]), sign]

    def _scaling(self, grads) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What gradients are multiplied by, and whether the step is left out; float32 [] each, or None."""
        scale = getattr(self, "grad_scale", None)  # both set by torch.amp.GradScaler around a step
        skip = getattr(self, "found_inf", None)
        multiplier = None if scale is None else scale.float().reciprocal().reshape(())
        skip = None if skip is None else skip.float().reshape(())
        if self._nonfinite == "propagate" and self._max_grad_norm is None:
            return multiplier, skip
        norms = [global_norm(self._buckets[d], g) for d, g in grads.items() if any(x is not None for x in g)]
        if not norms:
            return multiplier, skip
        norm = norms[0] if len(norms) == 1 else torch.stack([n.to(norms[0].device) for n in norms]).norm()
        if multiplier is not None:
            norm = norm * multiplier.to(norm.device)
        self.last_grad_norm = norm
        bad = (~torch.isfinite(norm)).float()
        if self._nonfinite == "raise" and bool(bad):
            raise FloatingPointError(
                f"the norm of the gradients is {norm.item()}; the step was not made. Lower the learning rate, clip "
                "with max_grad_norm, or pass nonfinite='skip'"
            )
        if self._nonfinite == "skip":
            skip = bad if skip is None else torch.maximum(bad, skip.to(bad.device))
            self._skipped = bad.clone() if self._skipped is None else self._skipped + bad
        if self._max_grad_norm is not None:
            clip = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            multiplier = clip if multiplier is None else multiplier.to(clip.device) * clip
        return multiplier, skip

    @property
    def skipped_steps(self) -> int:
        """Steps that were left out because a gradient was not finite. Waits for the GPU."""
        return 0 if self._skipped is None else int(self._skipped)

    @property
    def device_bytes(self) -> int:
        """Bytes of state on the parameters' devices."""
        return sum(b.arena.device_bytes for b in self._buckets.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of state of GPU parameters in host memory."""
        return sum(b.arena.host_bytes for b in self._buckets.values())

    def rebalance(self, device_budget: int | None) -> None:
        """Moves state between GPU and host memory for a new budget; no number changes.

        Args:
            device_budget: bytes of state on each GPU; None: as much as fits.

        Raises:
            ValueError: for a negative budget, or any where backend="device".
        """
        if device_budget is not None and device_budget < 0:
            raise ValueError(f"device_budget is {device_budget}; expected bytes, 0 or more, or None for what fits")
        for device in {p.device for group in self.param_groups for p in group["params"]}:
            check_backend(self._backend, device_budget, device)
        self._budget = device_budget
        for bucket in self._buckets.values():
            bucket.arena.rebalance(device_budget)

    def _yield_memory(self) -> None:
        for device, bucket in self._buckets.items():
            if device.type != "cuda":
                continue
            retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
            if retries > self._allocator_retries.setdefault(device, retries):
                bucket.arena.rebalance(bucket.arena.device_bytes // 2)
                # what is given back would otherwise stay in the allocator's cache, and what it holds in pieces too
                torch.cuda.empty_cache()
                retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
            self._allocator_retries[device] = retries

    def close(self) -> None:
        """Gives all state back to the system at once; the next step starts from zeros.

        Deleting the optimizer does the same, but a scheduler that wraps it keeps it alive.
        """
        self._buckets.clear()
        self._place.clear()
        self.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.AdamW's form, in CPU memory; loads there, and here at any budget, backend and number of bits.

        8-bit state is saved as it is, in keys of its own (exp_avg_codes, exp_avg_absmax, ...), so that a run resumes
        exactly; `torch_state_dict` gives it in torch's form. Master copies are a key that torch ignores.
        """
        return self._state_dict(decode=False)

    def torch_state_dict(self) -> dict[str, Any]:
        """`state_dict` with 8-bit state decoded to float32 and without master copies, for torch.optim.AdamW."""
        return self._state_dict(decode=True)

    def _state_dict(self, decode: bool) -> dict[str, Any]:
        views = dict(self.state)
        for bucket in self._buckets.values():
            for member, state in zip(bucket.members, bucket.export(decode), strict=True):
                self.state[member.param] = state
        try:
            return super().state_dict()
        finally:
            self.state.clear()
            self.state.update(views)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` of this class or of torch.optim.AdamW made.

        Raises:
            ValueError: where groups or sizes differ, or the state was made with amsgrad.
        """
        bits = [group["bits"] for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})
        for group, own in zip(self.param_groups, bits, strict=True):
            group["bits"] = own
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            self._check_group(group)
        self._buckets.clear()
        self._place.clear()
        self._prepare()
        params = list(chain.from_iterable(g["params"] for g in self.param_groups))
        ids = list(chain.from_iterable(g["params"] for g in state_dict["param_groups"]))
        loaded: dict[torch.device, dict[int, dict[str, torch.Tensor]]] = {}
        for param, key in zip(params, ids, strict=True):
            if key in state_dict["state"]:
                device, index = self._place[param]
                loaded.setdefault(device, {})[index] = state_dict["state"][key]
        for device, states in loaded.items():
            self._buckets[device].load(states)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("PagedAdamW cannot be pickled or deep-copied: its state is memory; use state_dict()")
