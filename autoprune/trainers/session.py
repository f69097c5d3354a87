"""Pruning attached to anybody's training loop: ``attach`` once, train as before, ``finalize`` once.

The session hooks into ``optimizer.step``. Before a step it lets the method read and extend the gradients and masks
them; after it the method may move the masks, removed weights are set to zero, and so is the optimizer's state for them
(momentum would revive them). It counts the steps the optimizer really takes: a step that a gradient scaler skips does
not count, nor do the backward passes of gradient accumulation.

In a data-parallel training every process attaches to its own replica; what the first one decides is taken by all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from autoprune.core.choices import Choice
from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import Policy
from autoprune.search_spaces.trace import trace
from autoprune.trainers.compression import GradientCompression
from autoprune.trainers.execution import Chooser, Execution
from autoprune.trainers.first_input import FirstInput
from autoprune.trainers.group_masks import GroupMasks
from autoprune.trainers.layers import choices_of, data_parallel, inner_module, inner_optimizer, pruned_layers
from autoprune.trainers.ledger import Ledger
from autoprune.trainers.masking import Masking
from autoprune.trainers.method import METHODS, Clock, Method, State, Subject
from autoprune.trainers.methods import MODULES
from autoprune.trainers.schedule import TrainerError
from autoprune.trainers.session_report import Phase, SessionReport, make_report
from autoprune.trainers.team import agree

__all__ = ["MODULES", "Phase", "Session", "SessionReport", "attach"]

STATE_VERSION = 1


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
        model: Any module; a compiled or data-parallel one is looked through. Of several wrappers give the outermost,
            the one that the loop calls.
        optimizer: Steps the model's parameters; Accelerate's and Lightning's wrappers are looked through.
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
        self.optimizer = inner_optimizer(optimizer)
        self.clock = clock
        self.steps = 0
        self._policy = policy
        self._layers = pruned_layers(self.model, choices_of(policy))
        self._groups = GroupMasks(self.model, self._layers, choices_of(policy))
        self._masking = Masking(self._layers, self._groups)
        self._ledger = Ledger(self._layers)
        self._parallel = data_parallel(model)
        self.method = method(self._layers, clock, settings)
        wrapped = self._parallel is not None or isinstance(model, nn.DataParallel)
        self.method.bind(Subject(self.model, self.optimizer, wrapped, self._agree))
        self._specs: tuple[LayerSpec, ...] | None = None
        self._look: FirstInput | None = None
        self._reset_state = self._settled = self._skipped = False
        self._execution: Execution | None = None
        self._compression: GradientCompression | None = None
        self._handles: list[Any] = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]
        if example is not None:
            self._learn_shapes(example)
        else:
            # On the module that the user calls: a hook inside a compiled graph would break it.
            self._look = FirstInput()
            self._look_handle = model.register_forward_pre_hook(self._look)
            self._handles.append(self._look_handle)

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
        return self._ledger.sparsity

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
            choose: Returns the operator of a layer, or None to leave it dense; ``StepChooser`` measures.
        """
        if self._execution is not None:
            self._execution.stop()
        self._execution = Execution(self.model, choose)
        self._start_sparse()

    def compress_gradients(self, model: DistributedDataParallel | None = None) -> GradientCompression:
        """Send only the gradients of kept weights between processes, as soon as the masks are final.

        Until then gradients are averaged as ever. Nothing is compressed unless this is called: a communication hook
        is the user's to give away, and a model takes only one.

        Args:
            model: The wrapper; None takes the one that ``attach`` was given.
        Returns:
            The hook, which counts the bytes that it sends.
        Raises:
            TrainerError: No DistributedDataParallel model, or one that has a hook already.
        """
        wrapper = self._parallel if model is None else model
        if wrapper is None or inner_module(wrapper) is not self.model:
            raise TrainerError(
                "compress_gradients: needs the DistributedDataParallel wrapper of this model; give it to attach."
            )
        compression = GradientCompression()
        compression.register(wrapper)
        self._compression = compression
        if self.frozen:
            compression.freeze(self._masking.kept())
        return compression

    def mask_copy(self, model: nn.Module) -> None:
        """Set removed weights to zero in a copy of the trained model, such as a running average of its weights.

        An ``AveragedModel`` still holds the past of a weight that was removed on the way, and so is not sparse until
        it is masked: do it before the average is judged or saved. Averages under frozen masks then stay sparse.

        Args:
            model: An ``AveragedModel`` or a deep copy of the trained model.
        Raises:
            PolicyError: It is of another structure.
        """
        self._masking.mask_copy(self.model, model)

    def finalize(self) -> SessionReport:
        """Set removed weights to zero once more, take the hooks off, and return what the training came to."""
        self._masking.mask_weights()
        self.detach()
        self.method.closing()
        report = make_report(self.method, self.model, choices_of(self._policy), self._specs, self._ledger, self.steps)
        return report if self._execution is None else replace(report, layers_run=self._execution.explain())

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
            **self._ledger.state_dict(),
            "specs": None if self._specs is None else [asdict(spec) for spec in self._specs],
            "inner": self.method.state_dict(),
            "execution": None if self._execution is None else self._execution.state_dict(),
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
        if not self._ledger.covers(state):
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
        self._ledger.load_state_dict(state)
        self._masking.refresh()
        self._ledger.keep(self._masking.count())
        if self._execution is not None:
            self._execution.stop()
            self._execution.load_state_dict(state.get("execution"))
        if self._compression is not None:
            self._compression.freeze([])
        self._settle()

    def _start_sparse(self) -> None:
        if self._execution is not None and self.frozen:
            specs = {spec.name: spec for spec in self._specs or ()}
            self._execution.start(self._layers, specs)

    def _settle(self) -> None:
        """Do what final masks allow; until they are final, nothing."""
        self._settled = self.frozen
        if self._settled:
            self._start_sparse()
            if self._compression is not None:
                self._compression.freeze(self._masking.kept())

    def _agree(self, tensors: Sequence[Tensor]) -> None:
        if self._parallel is not None:
            agree(tensors, self._parallel.process_group)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._skipped = _overflowed(optimizer)
        if self._skipped:
            return
        if self._look is not None and self._look.example is not None:
            example, self._look = self._look.example, None
            self._look_handle.remove()
            # A model that takes more than its first argument trains on; only its MACs stay unknown. Channels need it.
            with contextlib.suppress(*(() if self._groups.needed else (ModelError,))):
                self._learn_shapes(example)
        scale = getattr(optimizer, "grad_scale", None)
        self.method.before_step(self.steps, 1.0 if scale is None else scale)
        self._masking.mask_gradients()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._skipped:
            return
        self._ledger.step(self.phase, self.epoch)
        changed = self.method.after_step(self.steps)
        if changed:
            self._take_masks()
        self._masking.mask_weights()
        if self._reset_state:
            self._masking.mask_state(self.optimizer)
            self._reset_state = False
        self.steps += 1
        if changed or not self._settled:
            self._settle()

    def _take_masks(self) -> None:
        self._groups.agree()
        masked = [(layer, layer.mask) for layer in self._layers if layer.mask is not None]
        if self._parallel is not None:
            # The replicas decide alike; on unlike devices a last bit may differ, and then the first one's holds.
            self._agree([mask for _, mask in masked])
            for layer, mask in masked:
                layer.set_mask(mask)
        self._masking.refresh()
        self._ledger.keep(self._masking.count())
        self._reset_state = True

    def _learn_shapes(self, example: Tensor) -> None:
        example = example.to(next(self.model.parameters()).device)
        if self._specs is None:
            specs = trace(self.model, example)
            if isinstance(self._policy, Policy):
                self._policy.check_model(specs)
            self._specs = specs
        self._groups.observe(example)
        self.method.observe(example)
        self._masking.refresh()


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether the step will do nothing: a fused optimizer is called even when the gradient scaler found an overflow."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
