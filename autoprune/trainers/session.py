"""Pruning attached to anybody's training loop: ``attach`` once, train as before, ``finalize`` once.

The session hooks into ``optimizer.step``. Before a step it lets the method read and extend the gradients and masks
them; after it the method may move the masks, removed weights are set to zero, and so is the optimizer's state for them
(momentum would revive them). It counts the steps the optimizer really takes: a step that a gradient scaler skips does
not count, nor do the backward passes of gradient accumulation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoprune.core.choices import Choice
from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy
from autoprune.search_spaces.trace import trace
from autoprune.sparsity.metrics import summarise, training_macs_saved
from autoprune.trainers import (
    admm,
    campfire,
    clicktrain,
    dynamic,
    ese,
    lottery,
    magnitude,
    nm,
    prunetrain,
    slimming,
    snip,
)
from autoprune.trainers.execution import Chooser, Execution
from autoprune.trainers.layers import choices_of, inner_module, pruned_layers
from autoprune.trainers.method import METHODS, Clock, Method, State, Subject
from autoprune.trainers.schedule import TrainerError
from autoprune.trainers.session_report import Phase, SessionReport

__all__ = ["MODULES", "Phase", "Session", "SessionReport", "attach"]

STATE_VERSION = 1

# Importing a method's module is what registers it.
MODULES = (admm, campfire, clicktrain, dynamic, ese, lottery, magnitude, nm, prunetrain, slimming, snip)


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    policy: Policy | Mapping[str, Choice],
    *,
    steps_per_epoch: int,
    epochs: int,
    method: str = "clicktrain",
    settings: object | None = None,
    example: Tensor | None = None,
) -> Session:
    """Train ``model`` towards a policy in the loop that already exists.

    Args:
        model: Any module; a compiled or data-parallel one is looked through.
        optimizer: Steps the model's parameters.
        policy: A policy, or layer names → choices.
        steps_per_epoch: Optimizer steps of one epoch (batches over accumulation steps).
        epochs: Length of the training, by which the method's phases are laid out.
        method: A name of ``METHODS``, such as ``clicktrain``, ``campfire``, ``agp`` or ``rigl``.
        settings: The method's settings dataclass, a mapping of some of its fields, or None.
        example: One input with batch dimension, by which the policy is checked at once; without it the first batch is
            used, and a mismatch shows in the first step.
    Returns:
        The session; keep it, save its ``state_dict`` with the checkpoint, and call ``finalize`` at the end.
    Raises:
        UnknownName: No such method or setting.
        PolicyError: The policy is for another model.
        TrainerError: The settings do not fit the training's length.
    """
    return Session(model, optimizer, policy, METHODS.get(method), Clock(steps_per_epoch, epochs), settings, example)


class Session:
    """A training under a policy; made by ``attach``."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        policy: Policy | Mapping[str, Choice],
        method: type[Method],
        clock: Clock,
        settings: object | None,
        example: Tensor | None,
    ) -> None:
        self.model = inner_module(model)
        self.optimizer = optimizer
        self.clock = clock
        self.steps = 0
        self._policy = policy
        self._layers = pruned_layers(self.model, choices_of(policy))
        self.method = method(self._layers, clock, settings)
        wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
        self.method.bind(Subject(self.model, optimizer, wrapped))
        self._specs: tuple[LayerSpec, ...] | None = None
        self._example: Tensor | None = None
        self._phases: list[Phase] = []
        # Of the shapes at the start: a method may take dead channels out on the way.
        self._sizes: dict[str, int] = {layer.name: layer.parameter.numel() for layer in self._layers}
        self._kept = dict(self._sizes)
        self._kept_steps: dict[str, int] = dict.fromkeys(self._kept, 0)
        self._reset_state = False
        self._execution: Execution | None = None
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        if example is not None:
            self._learn_shapes(example)
        else:
            # On the module that the user calls: a hook inside a compiled graph would break it.
            self._look = model.register_forward_pre_hook(self._see_input)
            self._handles.append(self._look)

    @property
    def epoch(self) -> int:
        """Epoch of the next step."""
        return self.steps // self.clock.steps_per_epoch

    @property
    def phase(self) -> str:
        """Name of the phase that the next step belongs to."""
        return self.method.phase(self.epoch)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name → boolean mask of every layer that is masked by now."""
        return {layer.name: layer.mask for layer in self._layers if layer.mask is not None}

    @property
    def sparsity(self) -> float:
        """Fraction of the policy's weights that the masks have removed by now."""
        weights = sum(self._sizes.values())
        return 1.0 - sum(self._kept.values()) / weights if weights else 0.0

    @property
    def frozen(self) -> bool:
        """Whether the masks are final and removed weights no longer learn."""
        return self.method.finished() and not any(layer.straight for layer in self._layers)

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Names of the layers that run on sparse kernels at the moment."""
        return () if self._execution is None else tuple(self._execution.running)

    def run_sparse(self, choose: Chooser) -> None:
        """Run layers on sparse kernels, forward and backward, as soon as their masks are final; see ``execution``.

        Args:
            choose: Returns the operator of a layer, or None to leave it dense.
        """
        if self._execution is not None:
            self._execution.stop()
        self._execution = Execution(self.model, choose)
        self._start_sparse()

    def finalize(self) -> SessionReport:
        """Set removed weights to zero once more, take the hooks off, and return what the training came to."""
        self._mask_weights()
        self.detach()
        self.method.closing()
        weights = {
            name: module.weight.detach()
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        }
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        saved = None
        if self._specs is not None:
            density_steps = {name: self._kept_steps[name] / size for name, size in self._sizes.items()}
            saved = training_macs_saved(self._specs, density_steps, self.steps, self.method.scoring_passes)
        return SessionReport(
            method=self.method.name,
            steps=self.steps,
            finished=self.method.finished(),
            phases=tuple(self._phases),
            sparsity=summarise(weights, choices_of(self._policy), parameters, self._specs),
            training_macs_saved=saved,
            scoring_passes=self.method.scoring_passes,
        )

    def detach(self) -> None:
        """Take the hooks off; weights stay as they are. May be called twice."""
        if self._execution is not None:
            self._execution.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> State:
        """Return what a resumed session needs: tensors and plain values, fit for ``torch.load(weights_only=True)``."""
        return {
            "version": STATE_VERSION,
            "method": self.method.name,
            "steps_per_epoch": self.clock.steps_per_epoch,
            "epochs": self.clock.epochs,
            "steps": self.steps,
            "masks": self.masks,
            "kept_steps": dict(self._kept_steps),
            "phases": [(phase.name, phase.first_epoch, phase.steps) for phase in self._phases],
            "specs": None if self._specs is None else [asdict(spec) for spec in self._specs],
            "inner": self.method.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from ``state_dict``'s answer; weights and optimizer are restored by the caller, in any order.

        Raises:
            TrainerError: The state is of another method, length, policy or version.
        """
        want = {
            "version": STATE_VERSION,
            "method": self.method.name,
            "steps_per_epoch": self.clock.steps_per_epoch,
            "epochs": self.clock.epochs,
        }
        for key, value in want.items():
            if state.get(key) != value:
                raise TrainerError(f"session state has {key}={state.get(key)!r}, this session {value!r}; not its own.")
        if set(state["kept_steps"]) != set(self._kept_steps):
            raise TrainerError("session state is of another policy: it prunes other layers than this session.")
        self.steps = int(state["steps"])
        if self._specs is None and state.get("specs") is not None:
            self._specs = tuple(LayerSpec(**spec) for spec in state["specs"])
        for layer in self._layers:
            layer.mask = layer.factor = None
        self.method.load_state_dict(state["inner"])
        for layer in self._layers:
            mask = state["masks"].get(layer.name)
            if mask is not None:
                layer.set_mask(mask.to(layer.parameter.device))
        self._kept_steps = {name: int(value) for name, value in state["kept_steps"].items()}
        self._phases = [Phase(str(name), int(first), int(steps)) for name, first, steps in state["phases"]]
        self._count_kept()
        if self._execution is not None:
            self._execution.stop()
        self._start_sparse()

    def _start_sparse(self) -> None:
        if self._execution is not None and self.frozen:
            specs = {spec.name: spec for spec in self._specs or ()}
            self._execution.start(self._layers, specs)

    def _see_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._example is None and args and isinstance(args[0], Tensor):
            self._example = args[0].detach()[:1].clone()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _overflowed(optimizer):
            return
        if self._example is not None:
            example, self._example = self._example, None
            self._look.remove()
            # A model that takes more than its first argument trains on; only its MACs stay unknown.
            with contextlib.suppress(ModelError):
                self._learn_shapes(example)
        scale = getattr(optimizer, "grad_scale", None)
        self.method.before_step(self.steps, 1.0 if scale is None else scale)
        self._mask_gradients()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _overflowed(optimizer):
            return
        self._count_step()
        if self.method.after_step(self.steps):
            self._count_kept()
            self._reset_state = True
            self._start_sparse()
        self._mask_weights()
        if self._reset_state:
            self._mask_optimizer()
            self._reset_state = False
        self.steps += 1

    def _learn_shapes(self, example: Tensor) -> None:
        example = example.to(next(self.model.parameters()).device)
        if self._specs is None:
            specs = trace(self.model, example)
            if isinstance(self._policy, Policy):
                self._policy.check_model(specs)
            self._specs = specs
        self.method.observe(example)

    def _count_step(self) -> None:
        for name, kept in self._kept.items():
            self._kept_steps[name] += kept
        name = self.phase
        if self._phases and self._phases[-1].name == name:
            last = self._phases[-1]
            self._phases[-1] = Phase(name, last.first_epoch, last.steps + 1)
        else:
            self._phases.append(Phase(name, self.epoch, 1))

    def _count_kept(self) -> None:
        masked = [(layer.name, layer.mask) for layer in self._layers if layer.mask is not None]
        if masked:
            counts = torch.stack([mask.sum().cpu() for _, mask in masked]).tolist()
            self._kept.update(zip((name for name, _ in masked), counts, strict=True))

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        masked = [pair for layer in self._layers if not layer.straight for pair in layer.factors()]
        grads = [(parameter.grad, factor) for parameter, factor in masked if parameter.grad is not None]
        if grads:
            torch._foreach_mul_([grad for grad, _ in grads], [factor for _, factor in grads])

    @torch.no_grad()
    def _mask_weights(self) -> None:
        masked = [pair for layer in self._layers for pair in layer.factors()]
        if masked:
            torch._foreach_mul_([parameter for parameter, _ in masked], [factor for _, factor in masked])

    @torch.no_grad()
    def _mask_optimizer(self) -> None:
        for layer in self._layers:
            if layer.straight:
                continue
            for parameter, factor in layer.factors():
                for value in self.optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        value.mul_(factor)


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether the step will do nothing: a fused optimizer is called even when the gradient scaler found an overflow."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
