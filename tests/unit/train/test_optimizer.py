"""The student's optimizer against torch.optim.AdamW with its own clipping and schedule."""

import dataclasses

import pytest
import torch

from megatron_opdlm.config.learning import OptimizerConfig
from megatron_opdlm.config.schedules import learning_rate
from megatron_opdlm.train.optimizer import NonFiniteError, StudentOptimizer
from tests.helpers import run_ranks
from tests.rollouts import load
from tests.tiny import tiny_model

CONFIG = OptimizerConfig(
    lr=3e-3, min_lr=1e-4, lr_warmup_steps=2, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-6,
    weight_decay=0.1, clip_grad=1.0,
)  # fmt: skip
DECAY_STEPS = 5
NUM_STEPS = 6
SCALES = (0.001, 0.3, 2.0, 0.002, 1e-3, 10.0)  # of the gradients: some are clipped, some are not


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp(), num_hidden_layers=2)


def random_gradients(names_and_shapes, step):
    generator = torch.Generator().manual_seed(step)
    return {
        name: SCALES[step] * torch.randn(shape, generator=generator)
        for name, shape in names_and_shapes
    }


def make_optimizer(model, config, distributed):
    return StudentOptimizer(
        model,
        config,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=False,
        decay_steps=DECAY_STEPS,
    )


def shapes_of(model):
    return [(name, parameter.shape) for name, parameter in model.named_parameters()]


def train(rank, folder, config, distributed):
    """Weights before and after, and what every step reported."""
    model, _, _ = load(folder.checkpoint)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, config, distributed)
    norms, rates, versions = [], [], {optimizer.weights_version()}
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        gradients = random_gradients(shapes_of(model), step)
        for name, parameter in model.named_parameters():
            assert not bool(parameter.main_grad.any()), "cleared"
            parameter.main_grad.copy_(gradients[name])
        rates.append(optimizer.next_lr())
        norms.append(optimizer.step(loss=0.5))
        versions.add(optimizer.weights_version())
    assert optimizer.num_steps == NUM_STEPS
    assert len(versions) == 1 + NUM_STEPS, "who keeps copies of the weights must see each change"
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    return before, after, norms, rates


def reference(before, config):
    """AdamW on copies; weight decay on matrices alone, as in Megatron."""
    parameters = {n: torch.nn.Parameter(p.double().clone()) for n, p in before.items()}
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1],
         "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
    ]  # fmt: skip
    adam = torch.optim.AdamW(
        groups, lr=1.0, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps
    )
    norms, rates = [], []
    for step in range(NUM_STEPS):
        gradients = random_gradients([(n, p.shape) for n, p in before.items()], step)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].double()
        norm = torch.cat([p.grad.flatten() for p in parameters.values()]).norm()
        if config.clip_grad and norm > config.clip_grad:
            for parameter in parameters.values():
                parameter.grad *= config.clip_grad / (norm + 1e-6)
        rates.append(
            learning_rate(
                step, lr=config.lr, min_lr=config.min_lr, warmup_steps=config.lr_warmup_steps,
                decay_steps=DECAY_STEPS,
            )
        )  # fmt: skip
        for group in adam.param_groups:
            group["lr"] = rates[-1]
        adam.step()
        norms.append(float(norm))
    return {name: p.detach().float() for name, p in parameters.items()}, norms, rates


def difference(one, other):
    return float(torch.stack([(one[name] - other[name]).abs().max() for name in one]).max())


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("clip_grad", [1.0, 0.0])
def test_steps_equal_adamw(distributed, clip_grad, model):
    config = dataclasses.replace(CONFIG, clip_grad=clip_grad)
    ((before, after, norms, rates),) = run_ranks(train, 1, model, config, distributed)
    expected, expected_norms, expected_rates = reference(before, config)
    assert rates == expected_rates
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert min(norms) < 1 < max(norms), "clipped at some steps"
    assert difference(after, expected) < 2e-6
    # controls
    assert difference(after, before) > 1e-3
    for change in ({"weight_decay": 0.0}, {"clip_grad": 1.0 - clip_grad}, {"adam_beta2": 0.9}):
        other, _, _ = reference(before, dataclasses.replace(config, **change))
        assert difference(after, other) > 1e-5, change


# --- what is not finite changes nothing ---


def refuse(rank, folder, loss, poison):
    model, _, _ = load(folder.checkpoint)
    optimizer = make_optimizer(model, CONFIG, True)
    optimizer.zero_grad()
    gradients = random_gradients(shapes_of(model), 1)
    for name, parameter in model.named_parameters():
        parameter.main_grad.copy_(gradients[name])
    next(model.parameters()).main_grad[0, 0] += poison
    before = [p.detach().clone() for p in model.parameters()]
    try:
        optimizer.step(loss)
        message = None
    except NonFiniteError as error:
        message = str(error)
    unchanged = all(map(torch.equal, before, model.parameters()))
    return message, unchanged, optimizer.num_steps


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("loss", "poison"), [(NAN, 0.0), (INF, 0.0), (1.0, NAN), (1.0, INF), (1.0, -INF)]
)
def test_what_is_not_finite_stops_before_the_update(loss, poison, model):
    ((message, unchanged, steps),) = run_ranks(refuse, 1, model, loss, poison)
    assert "optimizer step 0: loss=" in message and "before the weights changed" in message
    assert unchanged and steps == 0


def test_control_a_finite_step_changes_the_weights(model):
    ((message, unchanged, steps),) = run_ranks(refuse, 1, model, 1.0, 0.0)
    assert message is None and not unchanged and steps == 1


class ForeignAdam(torch.optim.Adam):
    """Not torch's own Adam; as Transformer Engine's, it refuses state that it does not know."""

    def state_dict(self):
        for state in self.state.values():
            assert set(state) <= {"exp_avg", "exp_avg_sq"}, state.keys()
        return super().state_dict()


def prime(rank, folder, foreign):
    model, _, _ = load(folder.checkpoint)
    optimizer = make_optimizer(model, CONFIG, True)
    (part,) = optimizer.optimizer.chained_optimizers
    if foreign:
        part.optimizer.__class__ = ForeignAdam
    optimizer.prime_state()
    part.optimizer.state_dict()
    return len(part.optimizer.state)


def test_only_torch_adam_is_primed(model):
    """Priming another Adam with torch's `step` would make every resume fail."""
    (primed,) = run_ranks(prime, 1, model, False)
    (left_alone,) = run_ranks(prime, 1, model, True)
    assert primed > 0 and left_alone == 0


def tell_fp8_layers(rank, folder):
    model, _, _ = load(folder.checkpoint)
    optimizer = make_optimizer(model, CONFIG, True)
    told = []
    model.set_is_first_microbatch = lambda: told.append(optimizer.num_steps)
    optimizer.zero_grad()
    optimizer.step(loss=0.5)
    return told


def test_fp8_layers_hear_of_new_weights(model):
    assert run_ranks(tell_fp8_layers, 1, model) == [[0]]
