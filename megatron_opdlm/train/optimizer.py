"""The student in training: its gradients, its optimizer and its learning rate.

Distributed data parallel and the (distributed) AdamW are Megatron's; the schedule is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_opdlm.config.learning import OptimizerConfig
from megatron_opdlm.config.schedules import learning_rate
from megatron_opdlm.model.gpt import BlockDiffusionModel


class NonFiniteError(FloatingPointError):
    """The loss or the gradient is NaN or infinite.

    All ranks raise it before the optimizer steps.
    """


class StudentOptimizer:
    """Owns the gradients and the updates of the student.

    Gradients are sums over microbatches and data-parallel ranks. The loss weights already contain
    the denominator.

    Attributes:
        ddp: the model wrapped for training.
        num_steps: optimizer steps taken.
    """

    def __init__(
        self,
        model: BlockDiffusionModel,
        config: OptimizerConfig,
        *,
        use_distributed_optimizer: bool,
        overlap_grad_reduce: bool,
        decay_steps: int,
    ) -> None:
        """Wraps the model and makes the optimizer.

        Args:
            model: this rank's pipeline stage, weights loaded.
            config: learning rate, Adam and clipping.
            use_distributed_optimizer: whether data-parallel ranks share the optimizer state.
            overlap_grad_reduce: whether gradient reduction overlaps with the backward pass.
            decay_steps: optimizer steps until the learning rate reaches its minimum.
        """
        assert config.lr_warmup_steps is not None, "a resolved configuration has it"
        self.config = config
        self.warmup_steps = config.lr_warmup_steps
        self.decay_steps = decay_steps
        self.num_steps = self._weights_version = 0
        self.ddp = DistributedDataParallel(
            config=model.config,
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=use_distributed_optimizer,
                overlap_grad_reduce=overlap_grad_reduce,
                grad_reduce_in_fp32=True,
            ),
            module=model,
        )
        model.config.finalize_model_grads_func = _sum_gradients
        model.config.no_sync_func = self.ddp.no_sync
        params_dtype = model.config.params_dtype
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_eps=config.adam_eps,
                clip_grad=config.clip_grad,
                bf16=params_dtype is torch.bfloat16,
                params_dtype=params_dtype,
                use_distributed_optimizer=use_distributed_optimizer,
            ),
            [self.ddp],
        )
        self._use_fused_kernel()

    def zero_grad(self) -> None:
        """Clears the gradient buffers before the first microbatch of a step."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def next_lr(self) -> float:
        """Returns the learning rate of the step about to be taken."""
        return learning_rate(
            self.num_steps,
            lr=self.config.lr,
            min_lr=self.config.min_lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
        )

    def step(self, loss: float) -> float:
        """Clips the gradient and updates the weights.

        Args:
            loss: the loss of the step, the same on all ranks.

        Returns:
            The gradient norm before clipping, over all parameters.

        Raises:
            NonFiniteError: the loss or the gradient norm is not finite. All ranks raise it, and the
                weights stay as they were.
        """
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteError(
                f"optimizer step {self.num_steps}: loss={loss}, gradient norm={grad_norm}; stopped "
                "before the weights changed. Resume from the last checkpoint with a lower lr, or "
                "look at the last rollouts"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.next_lr()
            # Megatron's own scheduler would form this product; `wd_mult` is 0 for norms.
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
        # Not `self.optimizer.step()`, which would compute the gradient norm again.
        self._clip(grad_norm)
        self.optimizer.step_with_ready_grads()
        self._weights_changed()
        self.num_steps += 1
        return grad_norm

    def _clip(self, grad_norm: float) -> None:
        """Scales the gradient so that its norm is at most `clip_grad`; 0 leaves it as it is."""
        parameters = self.optimizer.get_parameters()
        if parameters and self.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, self.config.clip_grad, grad_norm)

    def _use_fused_kernel(self) -> None:
        """Makes torch's Adam on a CPU update every parameter in one pass over its memory.

        Its default makes a dozen passes, and temporary tensors as large as the parameter.
        """
        if torch.cuda.is_available():
            return
        for adam in filter(_is_torch_adam, _inner_optimizers(self.optimizer)):
            for group in adam.param_groups:
                group["fused"] = True

    def prime_state(self) -> None:
        """Allocates the state of torch's Adam, so that a checkpoint can be read into it.

        Megatron itself allocates the state of Transformer Engine's and of Apex's Adam.
        """
        for adam in filter(_is_torch_adam, _inner_optimizers(self.optimizer)):
            for group in adam.param_groups:
                for parameter in group["params"]:
                    adam.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }

    def load(self, state: dict[str, Any], num_steps: int) -> None:
        """Takes over the optimizer state of a checkpoint.

        Megatron's distributed optimizer restores Adam's moments, but it fails on the `step` of
        torch's Adam, on which the bias correction depends. So the moments are read without `step`,
        and `step` is set from `num_steps`.

        Args:
            state: what `dist_checkpointing.load` returned for `optimizer.sharded_state_dict(...)`.
            num_steps: optimizer steps taken before the checkpoint.
        """
        moments = state.pop("param_state", None)
        self.optimizer.load_state_dict(state)
        adams = _inner_optimizers(self.optimizer)
        if moments is not None:
            for adam in adams:
                for values in adam.state.values():
                    values.pop("step", None)
            (distributed,) = self.optimizer.chained_optimizers
            distributed.load_parameter_state_from_fully_reshardable(moments)
        for adam in adams:
            for group in adam.param_groups:
                if "step" in group:
                    group["step"] = num_steps
            if _is_torch_adam(adam):
                for values in adam.state.values():
                    values["step"] = torch.tensor(float(num_steps))
        self._use_fused_kernel()  # the checkpoint may say something else
        self._weights_changed()
        self.num_steps = num_steps

    def weights_version(self) -> int:
        """Returns a number that changes with every step and with every loaded checkpoint."""
        return self._weights_version

    def _weights_changed(self) -> None:
        """Makes all copies of the weights invalid.

        Transformer Engine keeps FP8 copies between forward passes. Only Megatron's schedules tell
        it when to drop them, and the rollout does not always use these schedules.
        """
        self._weights_version += 1
        self.ddp.module.set_is_first_microbatch()


def _is_torch_adam(adam: torch.optim.Optimizer) -> bool:
    """Returns whether this is torch's Adam, which counts steps in the state of each parameter."""
    return type(adam).__module__.startswith("torch.")


def _inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Returns the optimizers inside Megatron's wrappers."""
    chained: Sequence[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in chained if part.optimizer is not None]


def _sum_gradients(models: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
    """Reduces gradients as Megatron does, without its division by the number of tokens."""
    finalize_model_grads(models, None, **kwargs)
