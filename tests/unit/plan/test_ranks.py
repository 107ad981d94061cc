"""What every rank would hold, against counts made by hand."""

import dataclasses
from pathlib import Path

import pytest

from megatron_opdlm.config.run import load_config
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.plan.cache import plan_cache
from megatron_opdlm.plan.ranks import check_models, format_table, format_totals, rank_table
from megatron_opdlm.rollout.cache_size import CUDA_PAGE

CONFIGS = Path(__file__).parents[3] / "examples" / "configs"
HF = {
    size: ModelSource.open(f"models/Qwen3-{size}", bundled=CONFIGS / "qwen3").config
    for size in ("0.6B", "8B")
}


def config(*overrides):
    required = ["student=a", "data=b", "save=c", "train_rollouts=1"]
    return load_config(None, [*required, *overrides]).resolved(cuda=True)


def table(hf, world_size, *overrides, teacher=None):
    return rank_table(config(*overrides), student=hf, teacher=teacher or hf, world_size=world_size)


def sizes(tp_size=1, pp_size=1):
    return f"tensor_model_parallel_size={tp_size}", f"pipeline_model_parallel_size={pp_size}"


def test_ranks_are_laid_out_tensor_data_pipeline():
    plans = table(HF["8B"], 8, *sizes(2, 2))
    assert [(p.tp_rank, p.dp_rank, p.pp_rank) for p in plans] == [
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1),
    ]  # fmt: skip
    assert [p.layers for p in plans[::4]] == [range(18), range(18, 36)]


def test_one_rank_holds_the_published_number_of_parameters():
    """8B: 8,190,735,360; 0.6B: 596,049,920. 151936 is a multiple of 128: nothing is padded."""
    assert table(HF["8B"], 1)[0].student_parameters == 8_190_735_360
    assert table(HF["0.6B"], 1)[0].student_parameters == 596_049_920


def test_vectors_are_copied_and_matrices_split():
    hf = HF["8B"]
    whole, half = table(hf, 1)[0], table(hf, 2, *sizes(2))[0]
    vectors = hf.num_layers * (2 * hf.hidden_size + 2 * hf.kv_channels) + hf.hidden_size
    padding = 2 * (152064 - 151936) * hf.hidden_size  # embedding and head, to a multiple of 256
    matrices = whole.student_parameters - vectors + padding
    assert half.student_parameters == matrices // 2 + vectors


@pytest.mark.parametrize(("size", "copies"), [("0.6B", 1), ("8B", 0)])
def test_tied_embeddings_have_a_second_copy_on_the_last_stage(size, copies):
    hf = HF[size]
    whole, stages = table(hf, 1)[0], table(hf, 2, *sizes(1, 2))
    total = sum(plan.student_parameters for plan in stages)
    assert total - whole.student_parameters == copies * hf.vocab_size * hf.hidden_size


def test_middle_stages_hold_no_vocabulary():
    plans = table(HF["8B"], 8, *sizes(2, 4))
    assert [plan.vocab_rows is None for plan in plans] == [False] * 2 + [True] * 4 + [False] * 2
    assert plans[0].vocab_rows == range(76032)
    assert plans[1].vocab_rows == range(76032, 152064)


def test_the_padded_vocabulary_at_tensor_parallel_8():
    assert table(HF["8B"], 8, *sizes(8))[-1].vocab_rows == range(152576 * 7 // 8, 152576)


def test_bytes_by_hand():
    number = 596_049_920
    plan = table(HF["0.6B"], 1)[0]
    assert plan.weight_bytes == 2 * 2 * number
    assert plan.gradient_bytes == 4 * number
    assert plan.optimizer_bytes == 12 * number
    rows, capacity = 128, 24 * CUDA_PAGE  # 6,000 tokens in whole pages
    assert plan.kv_cache.num_bytes == (rows + 1) * capacity * 2 * 28 * 8 * 128 * 2
    assert plan.total_bytes == 20 * number + plan.kv_cache.num_bytes

    float32 = table(HF["0.6B"], 1, "params_dtype=float32")[0]
    assert float32.weight_bytes == 2 * 4 * number
    assert float32.optimizer_bytes == 8 * number  # the weights are their own master copy


SEQUENCE = 24 * CUDA_PAGE * 2 * 28 * 8 * 128 * 2
"""Bytes of the longest sequence of the 0.6B model on one GPU: 6,000 tokens in whole pages."""


def cache(hf, world_size, *overrides):
    return table(hf, world_size, *overrides)[0].kv_cache


def test_the_key_value_cache_is_as_large_as_kv_cache_gb_allows():
    limit = f"kv_cache_gb={(10 * SEQUENCE + SEQUENCE // 2) / 1e9}"
    eager = "cuda_graphs=false"
    assert cache(HF["0.6B"], 1).num_sequences == 128
    found = cache(HF["0.6B"], 1, limit, eager)
    assert (found.num_sequences, found.num_bytes) == (10, 10 * SEQUENCE)
    with_graphs = cache(HF["0.6B"], 1, limit, "cuda_graphs=true")
    assert (with_graphs.num_sequences, with_graphs.num_bytes) == (9, 10 * SEQUENCE)
    half = cache(HF["0.6B"], 2, limit, eager, *sizes(2))  # of the heads, so twice as many fit
    assert (half.num_sequences, half.num_bytes) == (21, 21 * SEQUENCE // 2)


def test_graphs_are_expected_where_they_can_be_captured():
    def has_spare(*overrides, cuda=True):
        return plan_cache(config(*overrides), HF["0.6B"], 1, cuda=cuda).has_spare

    assert has_spare() and has_spare("cuda_graphs=true", cuda=False)
    assert not has_spare(cuda=False) and not has_spare("cuda_graphs=false")
    assert not has_spare("params_dtype=float32") and not has_spare("fp8=hybrid")
    shared = "tensor_model_parallel_size=2", "sequence_parallel=true"
    assert not has_spare(*shared)
    assert has_spare(*shared, "rollout_tensor_model_parallel_size=1")


def test_a_replica_has_no_room_for_more_than_its_share():
    assert cache(HF["0.6B"], 4, "rollout_batch_size=7").num_sequences == 7
    assert cache(HF["0.6B"], 4).num_sequences == 32
    two_replicas = *sizes(1, 4), "rollout_tensor_model_parallel_size=2"
    assert cache(HF["0.6B"], 4, *two_replicas).num_sequences == 64
    assert cache(HF["0.6B"], 4, *sizes(1, 4)).num_sequences == 128


@pytest.mark.parametrize("graphs", ["true", "false", "null"])
def test_the_spare_sequence_of_graphs_is_within_the_limit(graphs):
    """Whatever the limit, all sequences and the spare one together stay below it."""
    spares = set()
    for fit in range(2, 14):
        for limit in (fit * SEQUENCE + 1, (fit + 1) * SEQUENCE - 2):  # GB round
            flags = f"kv_cache_gb={limit / 1e9}", f"cuda_graphs={graphs}"
            found = cache(HF["0.6B"], 1, *flags)
            assert found.num_bytes <= limit < found.num_bytes + SEQUENCE
            assert found.num_sequences + found.has_spare == fit
            spares.add(found.has_spare)
    assert spares == {"true": {True}, "false": {False}, "null": {True, False}}[graphs]


@pytest.mark.parametrize("graphs", [False, True])
def test_a_cache_below_one_sequence_is_refused(graphs):
    least = SEQUENCE * (1 + graphs)
    flags = [f"cuda_graphs={str(graphs).lower()}", f"kv_cache_gb={least / 1e9}"]
    assert cache(HF["0.6B"], 1, *flags).num_sequences == 1
    flags[1] = f"kv_cache_gb={(least - 1) / 1e9}"
    with pytest.raises(ValueError) as caught:
        table(HF["0.6B"], 1, *flags)
    text = str(caught.value)
    spare = " and the spare one of cuda_graphs" if graphs else ""
    way_out = "set cuda_graphs=false, " if graphs else ""
    assert f"must hold at least one sequence{spare}: 6000 prompt and response tokens" in text
    assert f"need {least / 1e9} GB; raise it, {way_out}or lower max_prompt_tokens" in text
    assert text.startswith("kv_cache_gb=") and "\n" not in text
    on_cpus = SEQUENCE // (24 * CUDA_PAGE) * 6000 * (1 + graphs)  # where there are no pages
    flags[1] = f"kv_cache_gb={on_cpus / 1e9}"
    check_models(config(*flags), student=HF["0.6B"], teacher=HF["0.6B"], cuda=False)


def test_a_student_that_is_evaluated_must_fit_beside_a_teacher_that_writes():
    """It decodes under the same limit, which a student with more layers exceeds."""
    models = {"student": HF["8B"], "teacher": HF["0.6B"]}
    values = [f"kv_cache_gb={SEQUENCE / 1e9}", "cuda_graphs=false", "method=off_policy"]
    check_models(config(*values), **models)  # control: the student never decodes
    evaluated = config(*values, "eval_data=q.jsonl", "eval_interval=1")
    with pytest.raises(ValueError, match="kv_cache_gb=.* must hold at least one sequence"):
        check_models(evaluated, **models)


def test_a_cpu_has_a_limit_without_being_told():
    """`KVCache.for_model` takes 4 GiB there, whatever is free."""
    per_sequence = 6000 * 2 * 28 * 8 * 128 * 2
    on_cpu = plan_cache(config(), HF["0.6B"], 1, cuda=False)
    assert on_cpu.num_sequences == 4 * 2**30 // per_sequence == 6
    assert plan_cache(config(), HF["0.6B"], 1, cuda=True).num_sequences == 128  # control
    longer = config("max_prompt_tokens=40000", "micro_batch_tokens=99999")
    rule = r"kv_cache_gb=null, 4.29 on a CPU, must hold at least one sequence: 44000 prompt and"
    with pytest.raises(ValueError, match=rule):
        plan_cache(longer, HF["0.6B"], 1, cuda=False)


def test_the_totals_say_how_many_sequences_are_decoded_at_once():
    def line(*overrides):
        plans = table(HF["0.6B"], 2, *overrides)
        return format_totals(config(*overrides), plans).splitlines()[1]

    assert line("kv_cache_gb=8", "cuda_graphs=true") == (
        "rollouts on 2 replicas, 10 sequences at once on each; key/value cache of a rank: "
        "10 + 1 sequences x 6144 tokens x 114688 bytes = 7.22 GiB "
        "(7.75 GB in the unit of kv_cache_gb)"
    )
    assert "64 sequences at once on each if free memory holds them; " in line()


def test_the_distributed_optimizer_splits_its_state_over_data_parallel_ranks():
    split, whole = (
        table(HF["0.6B"], 4, f"use_distributed_optimizer={value}")[0].optimizer_bytes
        for value in ("true", "false")
    )
    assert split * 4 == whole


def test_a_teacher_of_another_size_is_counted_apart():
    plan = table(HF["0.6B"], 1, teacher=HF["8B"])[0]
    assert (plan.student_parameters, plan.teacher_parameters) == (596_049_920, 8_190_735_360)


def test_the_cache_is_that_of_the_model_that_writes_the_responses():
    limit = f"kv_cache_gb={10.5 * SEQUENCE / 1e9}"
    expected = cache(HF["8B"], 4, limit, *sizes(1, 4)).bytes_per_token
    layout = *sizes(1, 4), "rollout_tensor_model_parallel_size=1"
    for method in ("off_policy", "sft"):
        values = limit, f"method={method}", *layout
        plan = table(HF["0.6B"], 4, *values, teacher=HF["8B"])[0]
        assert plan.kv_cache.bytes_per_token == expected  # in the teacher's layout
    student = table(HF["0.6B"], 4, limit, *layout, teacher=HF["8B"])[0]
    assert student.kv_cache.bytes_per_token != expected  # control


def test_responses_of_the_data_need_no_teacher():
    data = "method=sft", "sft_responses=data"
    plan = table(HF["0.6B"], 1, *data)[0]
    assert plan.teacher_parameters == 0 and plan.student_parameters == 596_049_920
    assert plan.weight_bytes == 2 * plan.student_parameters


@pytest.mark.parametrize("world_size", [0, 6, 3])
def test_a_world_that_holds_no_whole_copies_is_refused(world_size):
    with pytest.raises(ValueError, match="use a multiple of 4"):
        table(HF["8B"], world_size, *sizes(2, 2))


def test_models_that_do_not_fit():
    hf = HF["8B"]
    with pytest.raises(ValueError, match="make 6000 tokens, .* max_position_embeddings=5999"):
        check_models(
            config(), student=hf, teacher=dataclasses.replace(hf, max_position_embeddings=5999)
        )
    check_models(
        config(), student=hf, teacher=dataclasses.replace(hf, max_position_embeddings=6000)
    )


@pytest.mark.parametrize("extra", range(4))
def test_positions_off_the_block_grid_do_not_hold_a_block(extra):
    """The last block is decoded whole, so 5,997 to 6,000 tokens need 6,000 positions."""
    values = config(f"max_prompt_tokens={2000 - extra}")
    for positions in range(5997, 6002):
        hf = dataclasses.replace(HF["0.6B"], max_position_embeddings=positions)
        if positions >= 6000:
            check_models(values, student=hf, teacher=hf)
            continue
        with pytest.raises(ValueError, match="make 6000 tokens"):
            check_models(values, student=hf, teacher=hf)


def test_the_table_has_one_line_per_rank():
    lines = format_table(table(HF["8B"], 8, *sizes(4))).splitlines()
    assert len(lines) == 2 + 8
    assert len({len(line) for line in lines}) == 1


def test_a_folder_is_read_before_the_bundled_copy(tmp_path):
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    text = (CONFIGS / "qwen3" / "Qwen3-0.6B.config.json").read_text()
    (folder / "config.json").write_text(text)
    assert ModelSource.open(str(folder), bundled=CONFIGS / "qwen3").config == HF["0.6B"]
    with pytest.raises(ConversionError, match="holds neither"):
        ModelSource.open(str(tmp_path / "Qwen3-8B-typo"), bundled=CONFIGS / "qwen3")


def test_top_k_above_the_vocabulary():
    vocabulary = HF["0.6B"].vocab_size
    check_models(config(f"top_k_logits={vocabulary - 1}"), student=HF["0.6B"], teacher=HF["0.6B"])
    with pytest.raises(ValueError, match=f"top_k_logits={vocabulary} must be below the teacher's"):
        check_models(config(f"top_k_logits={vocabulary}"), student=HF["0.6B"], teacher=HF["0.6B"])


def teacher_sizes(tp_size, pp_size):
    return tuple(f"teacher_{override}" for override in sizes(tp_size, pp_size))


def test_a_teacher_in_a_layout_of_its_own_has_its_head_where_the_students_is():
    """8B has an untied head; 4 stages of 9 layers on 2 ranks each."""
    student, teacher = HF["0.6B"], HF["8B"]
    plans = table(student, 8, *sizes(2), *teacher_sizes(2, 4), teacher=teacher)
    columns = 152064 // 2 * teacher.hidden_size
    layer = (8_190_735_360 - 2 * 151936 * 4096 - 4096) // 36
    vectors = 2 * 4096 + 2 * 128
    layers = 9 * ((layer - vectors) // 2 + vectors)
    assert [plan.teacher_parameters for plan in plans] == (
        [2 * columns + layers] * 2 + [columns + layers] * 4 + [columns + layers + 4096] * 2
    )
    last_stage_only = table(student, 8, *sizes(1, 2), *teacher_sizes(8, 1), teacher=teacher)
    head = last_stage_only[4].teacher_parameters - last_stage_only[0].teacher_parameters
    assert head == 151936 * 4096


def test_an_offloaded_teacher_shares_its_room_with_the_cache():
    number = 596_049_920
    head = 151936 * 1024  # stays; it is the embedding, too
    few = "rollout_batch_size=1", "cuda_graphs=false"
    plan = table(HF["0.6B"], 1, "teacher_offload=true", *few)[0]
    assert plan.offloaded_bytes == 2 * (number - head)
    assert plan.weight_bytes == 2 * (number + head)
    assert plan.kv_cache.num_bytes < plan.offloaded_bytes
    assert plan.total_bytes == 20 * number
    stays = table(HF["0.6B"], 1, *few)[0]
    assert stays.total_bytes == 20 * number + stays.kv_cache.num_bytes
    kept = table(HF["0.6B"], 1, "teacher_offload=true", "keep_kv_cache=true", *few)[0]
    assert kept.total_bytes == plan.total_bytes + kept.kv_cache.num_bytes


def test_a_teacher_that_cannot_be_cut_that_way():
    with pytest.raises(ValueError, match="teacher_tensor_model_parallel_size=3 must divide the mo"):
        table(HF["8B"], 3, *teacher_sizes(3, 1))
    with pytest.raises(ValueError, match="teacher_pipeline_model_parallel_size=5 must divide the"):
        table(HF["8B"], 5, *teacher_sizes(1, 5))
    with pytest.raises(ValueError, match="teacher_tensor_model_parallel_size=4 must divide the nu"):
        table(HF["8B"], 2, *teacher_sizes(4, 1))
