"""The items of the GPU survey at tiny sizes on a CPU, with real numbers: their checks hold where
the package is right, and do not where it is damaged. Times are made up.
"""

import dataclasses
import importlib

import pytest
import torch

from megatron_opdlm.model.tiles import make_tiles, tiled_attention
from tests.helpers import run_ranks
from tools.gpu import cases, device, engines, implementations, models, steps, timing
from tools.gpu.record import Context

ITEM_MODULES = ("decoding", "decoding_attention", "loss", "sampler", "stream_attention", "training")
TINY = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4,
    "num_query_groups": 2, "kv_channels": 16,
}  # fmt: skip


def item_modules():
    return [importlib.import_module(f"tools.gpu.items.{name}") for name in ITEM_MODULES]


def everywhere(name, value):
    """Gives a name another value in every module of the survey that has it; for good."""
    shared = [cases, device, engines, implementations, models, steps, timing]
    found = [module for module in (*shared, *item_modules()) if hasattr(module, name)]
    assert found, name
    for module in found:
        setattr(module, name, value)


def stand_in():
    """What a CPU lacks: a clock of the device, its name, FlexAttention's backward pass."""
    from megatron_opdlm.distributed import cpu_backend as cpu

    cpu.install()
    torch.cuda.get_device_name = lambda index: "a CPU"
    torch.cuda.reset_peak_memory_stats = torch.cuda.empty_cache
    torch.cuda.max_memory_allocated = lambda: 0

    def run_once(work, repeats, warmup=0):
        work()
        return 1.0

    everywhere("device_ms", run_once)
    everywhere("wall_ms", run_once)
    everywhere("peak_bytes", lambda work: 0)
    full = models.config
    everywhere("config", lambda *of: dataclasses.replace(full(*of), **TINY))
    for kernel in implementations.KERNELS:  # a torch with CUDA has them, and they want a device
        kernel.find = lambda: None


def perform(item, tmp_path, damage=None, **sizes):
    """Runs an item in a process of its own; its lines."""

    def in_child(rank):
        torch.set_num_threads(1)
        stand_in()
        for name, value in sizes.items():
            everywhere(name, value)
        if damage is not None:
            damage()
        lines = []
        context = Context(
            send=lambda message: lines.append(message.get("line")), work=tmp_path, settings={}
        )
        name, _, function = item.partition(":")
        getattr(importlib.import_module(f"tools.gpu.items.{name}"), function)(context)
        return [line for line in lines if line is not None]

    (found,) = run_ranks(in_child, 1)
    return found


def failures(lines):
    return {line["case"]: line["failed"] for line in lines if line.get("failed")}


def measured(lines):
    return [line for line in lines if "figures" in line]


# --- kernels ---


def test_sampler(tmp_path):
    lines = perform("sampler:run", tmp_path, SAMPLED_ROWS=8, PART=3)
    assert failures(lines) == {} and measured(lines)
    assert lines[0]["figures"]["gb_per_s"] == pytest.approx(8 * 151_936 * 2 / 1e6, rel=1e-5)


def test_control_a_sampler_that_takes_the_second_best(tmp_path):
    def damage():
        real = implementations.sampler.sample_tokens

        def wrong(*args, **kwargs):
            drawn = real(*args, **kwargs)
            return drawn._replace(tokens=torch.where(torch.arange(8) == 3, 7, drawn.tokens))

        everywhere("sample_tokens", wrong)

    lines = perform("sampler:run", tmp_path, damage, SAMPLED_ROWS=8, PART=3)
    assert not measured(lines)
    assert all("wrong tokens 1 > 0" in texts for texts in failures(lines).values())


def test_loss(tmp_path):
    sizes = {"LOSS_ROWS": 12, "LOSS_WIDTHS": (32,), "PART": 5, "CHECKED_ROWS": 4}
    lines = perform("loss:run", tmp_path, **sizes)
    assert failures(lines) == {} and len(measured(lines)) == len(lines)
    assert lines[0]["figures"]["tflops"] == pytest.approx(8 * 12 * 32 * 151_936 / 1e9, rel=1e-5)


def test_control_a_loss_of_another_temperature(tmp_path):
    def damage():
        real = implementations.fused_loss.fused_divergence

        def wrong(hidden, head, target, *rest, **kwargs):
            target = dataclasses.replace(target, weight=target.weight * 0.98)
            return real(hidden, head, target, *rest, **kwargs)

        everywhere("fused_divergence", wrong)

    sizes = {"LOSS_ROWS": 12, "LOSS_WIDTHS": (32,), "PART": 5, "CHECKED_ROWS": 4}
    lines = perform("loss:run", tmp_path, damage, **sizes)
    assert lines and not measured(lines)


def test_decoding_attention(tmp_path):
    lines = perform("decoding_attention:run", tmp_path, ATTENTION={"0.6B": (3, (64,))})
    assert failures(lines) == {}
    assert [line["status"] for line in lines].count("ok") == 1, "the dense path alone"
    assert lines[-1]["case"].startswith("dense") and lines[-1]["figures"]["us"] == 1000.0


def test_control_a_kernel_that_reads_another_slot(tmp_path):
    def damage():
        real = implementations._dense

        def wrong(case):
            attend = real(case)

            def late():
                before = case.keys[2].clone()
                case.keys[2] = case.keys[1]
                output = attend()
                case.keys[2] = before
                return output

            return late

        everywhere("_dense", wrong)

    lines = perform("decoding_attention:run", tmp_path, damage, ATTENTION={"0.6B": (3, (64,))})
    assert not measured(lines) and failures(lines)


def flex_by_tiles(damage=0):
    """FlexAttention has no backward pass on a CPU; tiles have."""

    def attend(query, key, value, tags, scale):
        tags = tags.clone()
        tags[5, 2] += damage
        output = tiled_attention(query.float(), key.float(), value.float(), make_tiles(tags), scale)
        return output.to(query.dtype)

    everywhere("flex_attention", attend)
    everywhere("make_block_mask", lambda tags: tags)


@pytest.mark.parametrize("damage", [0, 1])
def test_stream_attention(tmp_path, damage):
    lines = perform(
        "stream_attention:run", tmp_path, lambda: flex_by_tiles(damage),
        STREAM_RESPONSES=(64,), STREAM_PROMPT=20, PART=50,
    )  # fmt: skip
    timed = [line for line in lines if "forward" in line["case"]]
    assert len(timed) == 4
    bad = {line["case"] for line in timed if line["failed"]}
    assert len(bad) == 2 * damage and all("FlexAttention" in case for case in bad)


# --- models ---

DECODING = {
    "SMALL_CONTEXTS": (32,), "SMALL_ROWS": 5, "TIMED": (4, 12), "COUNTED": (4, 8),
    "CHECKED_ROWS": 2,
    "_num_kernels": lambda work: (work(), 0.0)[1], "_num_waits": lambda work: (work(), 0.0)[1],
}  # fmt: skip


def test_decoding(tmp_path):
    lines = perform("decoding:small", tmp_path, **DECODING)
    assert failures(lines) == {}
    graphs, plain = lines
    assert plain["status"] == "ok" and graphs["status"] == "skipped"
    assert plain["figures"]["attention"] == "dense" and plain["figures"]["tokens_per_s"] > 0


def test_control_a_rollout_that_forgets_a_block(tmp_path):
    def damage():
        from megatron_opdlm.rollout.cache import KVCache

        write = KVCache.write

        def wrong(self, layer_number, slots, positions, key, value):
            write(self, layer_number, slots, positions, key, value)
            self.layer(layer_number)[1][:, :, 8:12] = 0

        KVCache.write = wrong

    lines = perform("decoding:small", tmp_path, damage, **DECODING)
    assert not measured(lines)
    assert "logits, whole sequence" in failures(lines)["0.6B, 5 rows, context 32, no graphs"][0]


TRAINING = {
    "TRAINED_DOCUMENTS": {"0.6B": 1}, "TRAINED_PROMPT": 8, "TRAINED_RESPONSE": 16,
    "SHORT_PROMPT": 8, "SHORT_RESPONSE": 24,
}  # fmt: skip


def test_training(tmp_path):
    lines = perform("training:local", tmp_path, **TRAINING)
    assert failures(lines) == {} and len(measured(lines)) == 1
    (again,) = perform("training:local", tmp_path, **TRAINING)  # with the reference of before
    assert again["checks"] == lines[0]["checks"]


def test_control_a_step_with_other_attention(tmp_path):
    def damage():
        from megatron_opdlm.model import attention

        real = attention.make_tiles

        def wrong(tags):
            tags = tags.clone()
            tags[:, 2] = tags[:, 3]
            return real(tags)

        attention.make_tiles = wrong

    (line,) = perform("training:local", tmp_path, damage, **TRAINING)
    assert "figures" not in line and any("gradients" in text for text in line["failed"])


def test_figures_to_another_variant():
    from tools.gpu.items.training import Outcome

    one = Outcome(2.0, {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])})
    other = Outcome(2.2, {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([[4.0]])})
    assert other.distances(one) == pytest.approx((0.1, 0.1))
    assert one.distances(one) == (0.0, 0.0)
