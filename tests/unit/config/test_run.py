"""The strict loader: every rule of the configuration, and what its errors say."""

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_opdlm.config.annotations import PATH
from megatron_opdlm.config.learning import DistillConfig, TrainConfig
from megatron_opdlm.config.methods import METHODS
from megatron_opdlm.config.run import PRESETS, Config, load_config
from megatron_opdlm.config.schedules import CURVES
from megatron_opdlm.config.schema import (
    build,
    collect_keys,
    field_docs,
    keys_as_markdown,
    nearest,
    parse_text,
)
from megatron_opdlm.config.sections import (
    ModelConfig,
    ParallelConfig,
    ResponseLengthConfig,
    RolloutConfig,
)
from megatron_opdlm.diffusion.remasking import RULES
from megatron_opdlm.diffusion.state_selection import STATE_SELECTIONS
from megatron_opdlm.loss.reduction import LOSS_REDUCTIONS

REPOSITORY = Path(__file__).parents[3]
REQUIRED = ["student=models/a", "data=prompts.jsonl", "save=runs/a", "train_rollouts=10"]


def load(*overrides):
    return load_config(None, [*REQUIRED, *overrides])


def error_of(*overrides):
    with pytest.raises(ValueError) as caught:
        load(*overrides)
    return str(caught.value)


def test_the_required_keys_are_enough_and_defaults_are_the_papers():
    config = load()
    assert config.optimizer.lr == 1e-5
    assert config.optimizer.min_lr == 1e-6
    assert config.rollout.block_size == 4
    assert config.rollout.prompts_per_rollout == 128
    assert config.train.rows_per_optimizer_step == 8
    assert config.optimizer_steps_per_rollout == 16
    assert config.total_optimizer_steps == 160
    assert config.rollout.max_response_tokens == ResponseLengthConfig(start=100, end=4000)


def test_missing_required_keys_are_named():
    with pytest.raises(ValueError, match="missing required student, data, save, train_rollouts"):
        load_config(None, [])


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("lr_warmup_step=1", "lr_warmup_steps"),
        ("tensor_parallel_size=2", "tensor_model_parallel_size"),
        ("blocksize=4", "block_size"),
        ("max_response_tokens.ned=4", "max_response_tokens.end"),
        ("end=4", "max_response_tokens.end"),
        ("max_response_tokens=4", "max_response_tokens"),
        ("rollout.block_size=4", "block_size"),
    ],
)
def test_an_unknown_key_names_the_nearest(typo, meant):
    text = error_of(typo)
    assert text.startswith(f"unknown key {typo.split('=')[0]}")
    assert f"did you mean {meant}" in text


def test_an_unknown_key_that_resembles_nothing_points_to_the_list():
    assert "--help` lists the keys" in error_of("zzz=1")


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("block_size=0", "block_size=0 must be at least 1"),
        ("block_size=4.0", "must have type int"),
        ("block_size=true", "must have type int"),
        ("lr=fast", "lr=fast must have type float"),
        ("lr=0", "lr=0.0 must be positive"),
        ("lr=nan", "must be finite"),
        ("temperature=inf", "must be finite"),
        ("temperature=1e-7", r"must be 0 \(argmax\) or from 1e-06 to 1000000; use e.g. 1.0"),
        ("temperature=1e7", r"must be 0 \(argmax\) or from"),
        ("temperature=-1", r"must be 0 \(argmax\) or from"),
        (
            "temperature=0 top_p=0.9",
            r"top_p=0.9 applies only to sampling, not to greedy .*\(temperature=0\)",
        ),
        ("temperature=0 top_k=5", "top_k=5 applies only to .*; use top_k=0, or a temp"),
        (
            "temperature=0 samples_per_prompt=2",
            "samples_per_prompt=2 applies only to .* use samples_.*=1,",
        ),
        (
            "temperature=0 top_p=0.9 method=off_policy",
            "top_p=0.9 applies only to sampling, not to greedy",
        ),
        (
            "temperature=0 samples_per_prompt=2 method=sft",
            "samples_per_prompt=2 applies only to sampli",
        ),
        ("min_lr=1", "min_lr=1.0 must be at most lr=1e-05"),
        ("sequence_parallel=maybe", "must have type bool"),
        ("sequence_parallel=true", "needs tensor_model_parallel_size > 1, got 1"),
        (
            "rollout_tensor_model_parallel_size=3",
            "=3 must divide make_vocab.* = 128, .*; make .*_divisible_by a multiple of 3",
        ),
        ("denoising_steps=5", "must be at most block_size=4"),
        ("confidence_threshold=0", r"must lie in \(0, 1\]"),
        ("top_p=1.5", r"must lie in \(0, 1\]"),
        ("rows_per_optimizer_step=7", "must divide .* = 128; use 4 or 8"),
        ("max_response_tokens.end=50", "must be at least max_response_tokens.start=100"),
        ("max_response_tokens.start=0", "max_response_tokens.start=0 must be at least 1"),
        ("max_response_tokens.curve=log", r"must be one of \{linear, cos, sin\}"),
        ("micro_batch_tokens=10008", "must hold the longest row.*10009 tokens"),
        ("lr_warmup_steps=99999", "lr_warmup_steps=99999 must be at most lr_decay_steps="),
        ("layer_spec=te", r"must be one of \{auto, local, transformer_engine\}"),
        ("remasking=low_confidence_dynamc", "did you mean low_confidence_dynamic?"),
        ("reverse_kl_weight=1.5", r"must lie in \[0, 1\]"),
        ("jsd_alpha=0", r"must lie in \(0, 1\)"),
        ("top_k_logits=-1", "must be at least 0"),
        ("top_k_mode=tails", r"must be one of \{tail, raw, renormalized\}"),
        ("reverse_kl_weight=0.3", "applies only to divergence=mixed; leave it out, or set"),
        ("reverse_kl_weight=0.3 divergence=jsd", "applies only to divergence=mixed"),
        ("jsd_alpha=0.3 divergence=mixed", "applies only to divergence=jsd"),
        ("top_k_mode=raw", "applies only to top_k_logits above 0"),
        ("top_k_mode=renormalized top_k_logits=1", "must be at least 2 with top_k_mode=renorm"),
        ("states_per_response=0", "must be at least 1"),
        (
            "state_selection=random",
            "applies only to the methods opdlm_off, off_policy and sft; leave it out",
        ),
        ("method=sft state_selection=all", "state_selection=all must be random with method=sft"),
        ("method=sft divergence=jsd", "divergence=jsd does not apply to method=sft"),
        ("method=sft top_k_logits=4", "top_k_logits=4 does not apply to method=sft"),
        (
            "method=sft reverse_kl_weight=0.3",
            "weight=0.3 does not apply to method=sft.*; leave it out$",
        ),
        (
            "method=sft sft_responses=data teacher=a",
            "teacher=a applies only to the teacher, and sft_resp",
        ),
        ("method=sft sft_responses=data teacher_fp8=hybrid", "applies only to the teacher"),
        (
            "method=sft sft_responses=data teacher_tensor_model_parallel_size=2",
            "applies only to the teacher",
        ),
        ("eval_questions=64", "eval_questions=64 applies only to eval_data; leave it out"),
        ("method=opdlm_of", "did you mean opdlm_off"),
        ("sft_responses=data", "sft_responses=data applies only to method=sft; leave it out with"),
        ("method=off_policy sft_responses=data", "sft_responses=data applies only to method=sft"),
        ("teacher_responses=a", "applies only to the teacher's responses; here the student g"),
        ("method=sft sft_responses=data teacher_responses=a", "here the data gives them"),
        ("state_selection=all states_per_response=2", "must be 1 with state_selection=all"),
        ("eval_interval=5", "must be given together with eval_interval > 0"),
        ("eval_data=a", "must be given together with eval_interval > 0"),
        ("adam_beta1=1", r"must lie in \[0, 1\)"),
        ("seed=-1", "must be at least 0"),
        ("student=", "student= must be a path"),
        ("preset=fast", r"must be one of \{official, paper\}"),
        ("nonsense", "is not key=value"),
    ],
)
def test_a_bad_value_names_key_value_and_rule(override, rule):
    assert re.search(rule, error_of(*override.split()))


def test_rollout_ranks_share_the_vocabulary_that_training_is_padded_to():
    sizes = "rollout_tensor_model_parallel_size=6", "tensor_model_parallel_size=4"
    assert "make_vocab_size_divisible_by a multiple of 3" in error_of(*sizes)
    load(*sizes, "make_vocab_size_divisible_by=63")  # 252 rows, 42 on each
    assert "multiple of 3" in error_of(*sizes, "make_vocab_size_divisible_by=64")


def test_fp8_needs_transformer_engine_and_bfloat16():
    assert "layer_spec=local" in error_of("fp8=hybrid", "layer_spec=local")
    assert "params_dtype=float32" in error_of("fp8=hybrid", "params_dtype=float32")
    config = load("fp8=hybrid")
    assert config.resolved(cuda=True).model.layer_spec == "transformer_engine"
    with pytest.raises(ValueError, match="needs Transformer Engine"):
        config.resolved(cuda=False)


def test_the_teacher_has_keys_of_its_own():
    assert "teacher_fp8=e4m3 needs" in error_of("teacher_fp8=e4m3", "layer_spec=local")
    assert "teacher_fp8=none" in error_of("teacher_fp8=e4m3", "params_dtype=float32")
    with pytest.raises(ValueError, match="teacher_fp8=hybrid needs Transformer Engine"):
        load("teacher_fp8=hybrid").resolved(cuda=False)
    assert load("fp8=hybrid").resolved(cuda=True).model.teacher_fp8 == "hybrid"
    model = load("fp8=hybrid", "teacher_fp8=none").resolved(cuda=True).model
    assert (model.fp8, model.teacher_fp8) == ("hybrid", "none")

    assert load("teacher_offload=true").resolved(cuda=True).model.teacher_offload
    with pytest.raises(ValueError, match="teacher_offload=true applies only to weights on a GPU"):
        load("teacher_offload=true").resolved(cuda=False)
    assert "must be positive" in error_of("max_teacher_nll=0")

    parallel = load("tensor_model_parallel_size=2", "pipeline_model_parallel_size=4").parallel
    assert parallel.teacher_layout == (2, 4) and not parallel.has_teacher_layout
    parallel = load(
        "tensor_model_parallel_size=2", "teacher_pipeline_model_parallel_size=3"
    ).parallel
    assert parallel.teacher_layout == (2, 3) and parallel.has_teacher_layout
    assert "must be at least 1" in error_of("teacher_tensor_model_parallel_size=0")


def test_dataclasses_check_themselves_without_the_loader():
    with pytest.raises(ValueError, match="block_size=3.0 must have type int"):
        RolloutConfig(block_size=3.0)
    with pytest.raises(ValueError, match="layer_spec=x must be one of"):
        ModelConfig(student="a", layer_spec="x")
    with pytest.raises(ValueError, match="state_selection=per_block must be random"):
        DistillConfig(method="sft")
    with pytest.raises(ValueError, match="teacher_responses='' must be a path or null"):
        TrainConfig(data="a", save="b", train_rollouts=1, teacher_responses="")
    with pytest.raises(dataclasses.FrozenInstanceError):
        ParallelConfig().sequence_parallel = True


def test_a_float_key_takes_an_integer_and_an_optional_key_null():
    assert load("temperature=0").rollout.temperature == 0.0
    assert isinstance(load("temperature=0").rollout.temperature, float)
    assert load("temperature=0", "top_p=1", "top_k=0", "samples_per_prompt=1").rollout.top_p == 1
    assert load("temperature=0.5", "top_p=0.9", "samples_per_prompt=2").rollout.top_p == 0.9
    assert load("wandb_project=null").train.wandb_project is None
    assert load("lr_decay_steps=null").optimizer.lr_decay_steps is None
    assert load("teacher=models/b=c").model.teacher == "models/b=c"


def test_the_paper_preset_and_what_beats_it(tmp_path):
    paper = load("preset=paper")
    assert paper.distill.state_selection == "trajectory"
    assert paper.distill.loss_reduction == "token_sum"
    assert paper.rollout.max_response_tokens.curve == "linear"
    assert paper.rollout.max_response_tokens.ramp_steps == 10
    official = load("preset=official")
    assert official.distill.state_selection == "per_block"
    assert official.distill.loss_reduction == "sequence_mean"
    assert official.rollout.max_response_tokens == ResponseLengthConfig()

    path = tmp_path / "a.yaml"
    path.write_text("preset: paper\nmax_response_tokens: {curve: sin}\n")
    config = load_config(path, [*REQUIRED, "loss_reduction=token_mean"])
    assert config.rollout.max_response_tokens.curve == "sin"  # the file beats the preset
    assert config.distill.loss_reduction == "token_mean"  # so does the command line
    assert config.distill.state_selection == "trajectory"


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.states == "random"])
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_other_methods_mask_at_random(method, preset):
    config = load(f"method={method}", f"preset={preset}")
    assert config.distill.state_selection == "random"


def test_who_writes_the_responses():
    def writer(*values):
        return load(*values).distill.responses

    assert writer() == writer("method=opdlm_off") == "student"
    assert writer("method=off_policy") == writer("method=sft") == "teacher"
    assert writer("method=sft", "sft_responses=data") == "data"
    assert load("method=sft", "teacher_responses=a").train.teacher_responses == "a"


def test_presets_name_existing_keys():
    keys = collect_keys(Config)
    for values in PRESETS.values():
        assert values.keys() <= keys.keys()


def test_yaml_is_read_and_the_command_line_beats_it(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "student: a\ndata: d\nsave: s\ntrain_rollouts: 2\nlr: 3e-5\n"
        "max_response_tokens:\n  start: 8\n  end: 16\n"
    )
    config = load_config(path, ["max_response_tokens.end=64", "lr_warmup_steps=0"])
    assert config.optimizer.lr == 3e-5  # plain YAML 1.1 would read a text
    assert config.rollout.max_response_tokens.start == 8
    assert config.rollout.max_response_tokens.end == 64


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("lr: '1e-5'\n", "lr=1e-5 must have type float; got str"),
        ("student: 7\n", "student=7 must have type str; got int"),
        ("max_response_tokens: 7\n", "max_response_tokens=7 must be a mapping"),
        ("max_response_tokens: {stop: 7}\n", "did you mean max_response_tokens.start"),
        ("rollout: {block_size: 4}\n", "unknown key rollout"),
        ("- a\n", r"must hold `key: value` lines, got a list"),
        ("lr: [\n", "not a valid configuration file.*line"),
        ("lr: 1\nlr: 2\n", "not a valid configuration file.*duplicate"),
        ("lr: ${nowhere}\n", "not a valid configuration file"),
    ],
)
def test_bad_yaml(tmp_path, text, rule):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rule):
        load_config(path, REQUIRED[1:] if "student" in text else REQUIRED)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml does not exist"):
        load_config(tmp_path / "none.yaml")


def test_an_empty_file_is_an_empty_configuration(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("")
    assert load_config(path, REQUIRED) == load()


@pytest.mark.parametrize("extra", [[], ["preset=paper", "samples_per_prompt=2", "teacher=b"]])
def test_the_resolved_configuration_survives_saving(tmp_path, extra):
    config = load(*extra).resolved(cuda=False)
    config.save_yaml(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config.resolved(cuda=True) == config  # nothing is left open


def test_resolving_replaces_every_automatic_value():
    flat = load().resolved(cuda=True).to_flat_dict()
    assert "auto" not in {value for key, value in flat.items() if key != "resume"}
    assert flat["teacher"] == flat["student"] == "models/a"
    assert flat["lr_decay_steps"] == 160
    assert flat.keys() == collect_keys(Config).keys()
    assert load().resolved(cuda=False).model.params_dtype == "float32"


def test_the_longest_row_bounds_every_prompt_and_response():
    from megatron_opdlm.diffusion.blocks import block_start, num_decoded_tokens

    config = load("max_prompt_tokens=9", "max_response_tokens.start=5", "max_response_tokens.end=7")
    rows = []
    for prompt in range(1, 10):
        clean = prompt + num_decoded_tokens(prompt, 7, 4)
        rows.append(clean + clean - block_start(prompt, 4))
    assert max(rows) <= config.longest_row_tokens <= max(rows) + 2 * 3


def test_every_key_is_documented_and_flat():
    keys = collect_keys(Config)
    assert all(len(key.doc) > 10 for key in keys.values())
    assert [name for name in keys if "." in name] == [
        f"max_response_tokens.{field}" for field in ("start", "end", "ramp_steps", "curve")
    ]


def test_choices_are_those_of_the_code_that_reads_them():
    keys = collect_keys(Config)
    for name, table in (
        ("max_response_tokens.curve", CURVES),
        ("state_selection", STATE_SELECTIONS),
        ("loss_reduction", LOSS_REDUCTIONS),
        ("remasking", RULES),
    ):
        assert keys[name].annotation.__args__ == tuple(table)
        assert all(f"{choice} = {table[choice].summary}" in keys[name].doc for choice in table)


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["fp8=hybrid"], "fp8=hybrid"),
        (
            ["sequence_parallel=true"],
            "sequence_parallel=true, unless rollouts have their own layout",
        ),
        (["sequence_parallel=true", "rollout_tensor_model_parallel_size=2"], "sequence_parallel"),
        (["method=sft", "teacher_fp8=hybrid"], "teacher_fp8=hybrid"),
        (
            ["method=sft", "sequence_parallel=true", "rollout_tensor_model_parallel_size=1"],
            "sequence_parallel=true, unless the teacher has one tensor-parallel rank",
        ),
    ],
    ids=str,
)
def test_graphs_that_no_machine_can_capture(overrides, rule):
    needed = ["tensor_model_parallel_size=2", *overrides]
    with pytest.raises(ValueError, match=f"cuda_graphs=true cannot be used with {rule}"):
        load("cuda_graphs=true", *needed)
    for allowed in ("cuda_graphs=null", "cuda_graphs=false"):
        load(allowed, *needed)
    load("cuda_graphs=true", *needed[:1], "rollout_tensor_model_parallel_size=1",
         "sequence_parallel=true")  # fmt: skip
    load("cuda_graphs=true", "teacher_fp8=hybrid")  # such a teacher does not decode


def test_graphs_in_float32_are_refused_where_there_is_a_gpu():
    config = load("cuda_graphs=true", "params_dtype=float32")
    with pytest.raises(
        ValueError, match="cuda_graphs=true cannot be used with params_dtype=float32"
    ):
        config.resolved(cuda=True)
    assert load("cuda_graphs=true").resolved(cuda=True).model.params_dtype == "bfloat16"


def test_field_docs_reads_the_text_below_a_field():
    docs = field_docs(ResponseLengthConfig)
    assert docs["start"] == "Longest response of the first rollout, in tokens."


def test_nearest_finds_edits_and_fragments_and_gives_up():
    known = ["tensor_model_parallel_size", "lr", "max_response_tokens.end"]
    assert nearest("tensor_parallel", known) == "tensor_model_parallel_size"
    assert nearest("lrr", known) == "lr"
    assert nearest("qqq", known) is None


def test_parse_text_reads_by_type():
    assert parse_text("k", "True", bool) is True
    assert parse_text("k", "12", int) == 12
    assert parse_text("k", "null", str | None) is None
    assert parse_text("k", "null", str) == "null"
    with pytest.raises(ValueError, match="k=1.5 must have type int"):
        parse_text("k", "1.5", int)


def test_build_refuses_unknown_keys():
    with pytest.raises(ValueError, match="unknown key nothing"):
        build(Config, {"nothing": 1})


def test_the_documentation_lists_every_key():
    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert keys_as_markdown(Config) in text, (
        "docs/configuration.md is out of date; paste the output of "
        "`python -c 'from megatron_opdlm.config.run import *; "
        "from megatron_opdlm.config.schema import *; print(keys_as_markdown(Config))'`"
    )


@pytest.mark.parametrize("size", ["0.6b", "1.7b", "4b", "8b"])
def test_the_example_configurations_load(size):
    config = load_config(REPOSITORY / "examples" / "configs" / f"qwen3_{size}.yaml")
    assert config.optimizer.lr_warmup_steps == 5 * config.optimizer_steps_per_rollout
    tp_size = config.parallel.tensor_model_parallel_size
    assert config.parallel.sequence_parallel == (tp_size > 1)


@pytest.mark.parametrize(
    "text",
    ["${a}", r"\${a}", r"\\${a}", "a${b}c${d}", "${", "$", "a\\", "???", "1e5", "null?", "yes",
     "${oc.env:HOME}", "$${a}", "a: b # c", "'q'", "x\n", "1:30", ".inf", "é ${ü}"],
)  # fmt: skip
def test_every_text_survives_saving(tmp_path, text):
    """`${` names another key in a file that a person writes; in a path it is a path."""
    names = [
        name for name, key in collect_keys(Config).items()
        if PATH in key.marks or (key.annotation in (str, str | None) and not key.marks)
    ]  # fmt: skip
    given = {name: text for name in names if name not in ("eval_data", "teacher_responses")}
    assert {"student", "save", "mask_token", "import_cache"} <= given.keys()
    config = load_config(None, [*REQUIRED, *(f"{name}={text}" for name in given)])
    config.save_yaml(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config.model.student == config.train.save == text


@pytest.mark.parametrize("override", [" seed=1", "=", "=1", "seed =1", "", " "])
def test_an_override_without_a_key_is_no_key_value(override):
    with pytest.raises(ValueError, match="override .* is not key=value; write e.g. lr=1e-5"):
        load_config(None, [*REQUIRED, override])
