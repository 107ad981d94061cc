"""`examples/minimal_loop.py` against the package: the same method, so the same numbers."""

import ast
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm.config.run import load_config
from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.noising import select_states
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.train.trainer import Trainer
from tests.helpers import run_ranks
from tests.training import assemble, parameter_pieces, to_hf

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "minimal_loop.py"
SOURCE = SCRIPT.read_text()
QUICKSTART = REPOSITORY / "examples" / "quickstart"
SHORTER = {
    "ROLLOUTS, PROMPTS, ROWS, SEED = 12, 64, 8, 0": "ROLLOUTS, PROMPTS, ROWS, SEED = 2, 16, 4, 0"
}
"""Two rollouts, eight optimizer steps: the cosine has begun."""
LATER = 8
"""A rollout at the longest response limit."""


def load(edits=None, name="minimal_loop"):
    """The script as a module, with edits."""
    source = SOURCE
    for old, new in (SHORTER | (edits or {})).items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    namespace = {"__name__": name, "__file__": str(SCRIPT)}
    exec(compile(source, str(SCRIPT), "exec"), namespace)
    return SimpleNamespace(**namespace)


class Recorder(Trainer):
    """Keeps what a run went through."""

    def log_step(self, rows, grad_norm, lr):
        self.steps.append((rows.loss, grad_norm))

    def save_if_due(self):
        """Nothing is saved here."""


def package(rank, loop, folder):
    """The package's numbers for the settings of the script."""
    values = {
        "student": QUICKSTART / "teacher",
        "data": QUICKSTART / "data" / "train_prompts.jsonl",
        "save": folder / "run",
        "train_rollouts": loop.ROLLOUTS,
        "prompts_per_rollout": loop.PROMPTS,
        "rows_per_optimizer_step": loop.ROWS,
        "eval_data": "null",
        "eval_interval": 0,
        "eval_questions": 128,
    }
    overrides = [f"{key}={value}" for key, value in values.items()]
    config = load_config(REPOSITORY / "examples/configs/quickstart.yaml", overrides)
    trainer = Recorder(config.resolved(cuda=False))
    trainer.steps = []
    student = trainer.student
    trajectories = trainer.collect()
    masks = [
        select_states(
            trajectory,
            state_selection=trainer.config.distill.state_selection,
            key=randomness.key(config.train.seed, "state", 0, trajectory.prompt_id, 0),
            mask_token_id=student.mask_token_id,
        ).masked
        for trajectory in trajectories
    ]
    batch = trainer.cut(trainer.select_states(trajectories))[0]
    runs = trainer.plan(batch)
    microbatches = trainer.make_batch(batch, runs)
    rows = trainer.run_student(microbatches, trainer.run_teacher(batch, runs))
    gradients = {name: p.main_grad for name, p in student.model.named_parameters()}
    gradient = to_hf(
        assemble([parameter_pieces(student.model, gradients)]), student.description.config
    )
    document = batch[0].student
    with torch.no_grad():
        hidden = student.model(document.token_ids, document.tags, AttentionPlan(tags=document.tags))
        logits = student.model.logits(student.model.select_rows(hidden, document.loss_rows))
    later = trainer.source.collect(LATER).trajectories[:4]
    first_loss = rows.loss
    trainer.train()
    return SimpleNamespace(
        trajectories=trajectories,
        later=later,
        masks=masks,
        loss=first_loss,
        gradient=gradient,
        logits=logits[:, : student.model.vocab_size_unpadded],
        document=document,
        prompts=[prompt.ids for prompt in trainer.schedule.prompts],
        steps=trainer.steps,
    )


@pytest.fixture(scope="module")
def loop():
    return load()


@pytest.fixture(scope="module")
def expected(loop, tmp_path_factory):
    return run_ranks(package, 1, loop, tmp_path_factory.mktemp("minimal_loop"))[0]


def weights(loop, trained=False):
    tensors = loop.read_weights(loop.HERE / "model.safetensors")
    return {name: tensor.clone().requires_grad_(trained) for name, tensor in tensors.items()}


def rollouts(loop, trajectories, step, limit):
    """What the script decodes for the prompts of some trajectories."""
    student = weights(loop)
    return [
        loop.rollout(
            student,
            trajectory.prompt_ids,
            limit,
            1.0,
            loop.key(loop.SEED, "rollout", step, trajectory.prompt_id, 0),
        )
        for trajectory in trajectories
    ]


def same_rollouts(found, trajectories):
    """Whether tokens, commit steps and ends are the same."""
    return all(
        torch.equal(x, trajectory.token_ids)
        and torch.equal(commit[len(trajectory.prompt_ids) :], trajectory.commit_step)
        and end == len(trajectory.prompt_ids) + trajectory.num_response_tokens
        for (x, commit, end), trajectory in zip(found, trajectories, strict=True)
    )


def same_masks(loop, expected):
    """Whether the noisy states are the same."""
    for index, trajectory in enumerate(expected.trajectories):
        prompt = torch.full_like(trajectory.prompt_ids, -1)
        key = loop.key(loop.SEED, "state", 0, trajectory.prompt_id, 0)
        found = loop.select_state(torch.cat([prompt, trajectory.commit_step]), key)
        if not torch.equal(found, whole_mask(expected, index)):
            return False
    return True


def first_logits(loop, expected):
    """[T, V] of the first document of the first optimizer step, at its loss positions.

    The package leaves out noisy blocks without a loss; nobody sees them.
    """
    trajectory, masked = expected.trajectories[0], whole_mask(expected, 0)
    positions = expected.document.tags[expected.document.loss_rows, 3]
    x = trajectory.token_ids
    stream = torch.cat([x, x.masked_fill(masked, loop.MASK)])
    with torch.no_grad():
        return loop.transformer(weights(loop), stream, len(x) + positions, parts=2)


def whole_mask(expected, index):
    """[L] bool: the state of a trajectory from position 0 on."""
    trajectory, masked = expected.trajectories[index], expected.masks[index].flatten()
    return torch.cat(
        [torch.zeros(len(trajectory.token_ids) - len(masked), dtype=torch.bool), masked]
    )


def logits_delta(loop, expected):
    """Largest difference, but for the mask token, which the script takes out."""
    found, logits = first_logits(loop, expected), expected.logits.clone()
    logits[:, loop.MASK] = -1e9
    return float((found - logits).abs().max())


def first_step(loop, expected):
    """Loss and gradient of the first optimizer step, on the package's states."""
    student, teacher, rows = weights(loop, trained=True), weights(loop), []
    for index, trajectory in enumerate(expected.trajectories[: loop.ROWS]):
        end = len(trajectory.prompt_ids) + trajectory.num_response_tokens
        x, masked = trajectory.token_ids, whole_mask(expected, index)
        rows.append(loop.distill_loss(student, teacher, x, masked, end))
    loss = torch.stack(rows).nanmean()
    loss.backward()
    return float(loss.detach()), {name: tensor.grad for name, tensor in student.items()}


def gradient_delta(loop, expected):
    """Largest difference, as a part of the tensor's largest entry."""
    _, found = first_step(loop, expected)
    assert found.keys() == expected.gradient.keys()
    return max(
        float((found[name] - tensor).abs().max() / tensor.abs().max())
        for name, tensor in expected.gradient.items()
    )


def loss_delta(loop, expected):
    return abs(first_step(loop, expected)[0] - expected.loss)


def test_prompts_are_tokenised_alike(loop, expected):
    lines = (QUICKSTART / "data" / "train_prompts.jsonl").read_text().splitlines()
    found = [loop.encode(json.loads(line)["prompt"]) for line in lines]
    assert len(found) == len(expected.prompts)
    assert all(map(torch.equal, found, expected.prompts))
    assert not torch.equal(loop.encode("Ben finds 10 stamps"), loop.encode("Ben finds 11 stamps"))


def test_noise(loop):
    parts = ((0, "rollout", 3, "train-0-17", 0), (1, 23), (12, 3), ("1",), (-5, ""))
    keys = [loop.key(*part) for part in parts]
    assert keys == [randomness.key(*part) for part in parts]
    columns = torch.tensor([0, 1, 454, 2**32 - 1])
    found = loop.uniform(torch.tensor(keys), columns)
    assert torch.equal(found, randomness.uniform(torch.tensor(keys), columns))
    assert not torch.equal(found, randomness.uniform(torch.tensor(keys) ^ 1, columns))  # control


def test_trajectories_are_the_engines(loop, expected):
    found = rollouts(loop, expected.trajectories, 0, loop.L_MIN)
    assert same_rollouts(found, expected.trajectories)
    assert {len(t.prompt_ids) % loop.K for t in expected.trajectories} == {0, 1, 2, 3}
    later = rollouts(loop, expected.later, LATER, loop.L_MAX)
    assert same_rollouts(later, expected.later)
    assert max(t.num_response_tokens for t in expected.later) > 2 * loop.K


def test_states_are_the_packages(loop, expected):
    assert same_masks(loop, expected)


def test_logits_are_the_packages(loop, expected):
    assert logits_delta(loop, expected) < 1e-4  # float32: logits reach 30


def test_first_loss_and_gradient_are_the_packages(loop, expected):
    assert loss_delta(loop, expected) < 1e-5
    assert gradient_delta(loop, expected) < 1e-5


def rollouts_delta(loop, expected):
    """0 if the first rollout's trajectories are the same, else infinity."""
    found = rollouts(loop, expected.trajectories, 0, loop.L_MIN)
    return 0.0 if same_rollouts(found, expected.trajectories) else torch.inf


def masks_delta(loop, expected):
    return 0.0 if same_masks(loop, expected) else torch.inf


@pytest.mark.parametrize(
    "old, new, delta",
    [
        ("wanted - 1, block_size=1", "wanted, block_size=1", loss_delta),  # a shifted row
        ("wanted - 1, block_size=1", "wanted - 1", loss_delta),  # a teacher that sees blocks
        (").sum(1).mean()", ").sum(1).sum()", loss_delta),
        ("target.exp() * (target - output)", "output.exp() * (output - target)", loss_delta),
        ("x.masked_fill(masked, MASK)", "x", loss_delta),
        ("(block < block[:, None])", "(block <= block[:, None])", logits_delta),  # the own x_0
        ("(block < block[:, None])", "(block + 1 < block[:, None])", logits_delta),
        ("(block == block[:, None]) & noisy[:, None]", "noisy[:, None]", logits_delta),
        ("torch.arange(length).repeat(parts)", "torch.arange(len(ids))", logits_delta),
        ("range(len(prompt) // K * K,", "range(len(prompt),", rollouts_delta),  # the grid
        ("masked << 8 | step", "masked << 8 | step + 1", rollouts_delta),
        ("(rank < quota)", "(rank <= quota)", rollouts_delta),
        ("int(x[place]) in EOS", "False", rollouts_delta),
        ("(grid >= ", "(grid > ", masks_delta),
        ("block.clamp(min=0)", "torch.arange(len(grid))", masks_delta),
    ],
)
def test_controls(expected, old, new, delta):
    assert delta(load({old: new}), expected) > 1e-3


def test_the_script_trains_as_the_package_does(expected, capsys):
    """Prompts, curriculum, reduction, clipping, schedule and AdamW: every step of a short run."""

    def steps(edits):
        load(edits, name="__main__")
        lines = capsys.readouterr().out.splitlines()
        found = [re.search(r"step (\d+) .* KL ([\d.]+) norm ([\d.]+)$", line) for line in lines]
        return [(int(m[1]), float(m[2]), float(m[3])) for m in found if m]

    want = [(step, *numbers) for step, numbers in enumerate(expected.steps)]
    assert len(want) == 8
    torch.testing.assert_close(torch.tensor(steps({})), torch.tensor(want), rtol=1e-3, atol=6e-3)
    slower = torch.tensor(steps({"LR * (step + 1) / WARMUP": "LR * (step + 1) / 2 / WARMUP"}))
    assert bool(((slower - torch.tensor(want)).abs() > 0.05).any(1)[1:].all())  # control


def test_it_fits_on_one_screen_and_needs_torch_alone():
    assert len(SOURCE.splitlines()) <= 150
    assert max(map(len, SOURCE.splitlines())) <= 100
    assert outside_of_the_standard_library(SOURCE) == {"torch"}
    control = "import megatron.core\nfrom safetensors import torch\nimport json"
    assert outside_of_the_standard_library(control) == {"megatron", "safetensors"}


def outside_of_the_standard_library(source):
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names - sys.stdlib_module_names
