"""Who asks for CUDA graphs, and that it is refused before any work where there can be none."""

import contextlib
import dataclasses
import io
from types import SimpleNamespace

import pytest

from tests.helpers import run_ranks
from tests.tiny import tiny_model, write_prompts
from tests.training import tiny_config

RULE = "cuda_graphs=true needs a CUDA device"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_commands_refuse_them_before_the_import(command, model, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    prompts.write_text('{"prompt": "x", "answer": "7", "id": "p"}\n')
    given = ["--prompts", str(prompts)] if command == "generate" else ["--task", f"t={prompts}"]
    folder = tmp_path / "imported"

    def run(rank, *flags):
        from megatron_opdlm import cli
        from megatron_opdlm.distributed import process_groups as parallel

        parallel.shutdown = lambda: None  # the group is the test's
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(
                [command, "--model", str(model.hf), "--import-cache", str(folder), *given]
                + ["--params-dtype", "float32", "--max-new-tokens", "4", *flags]
            )
        return status, err.getvalue()

    ((status, err),) = run_ranks(run, 1, "--cuda-graphs")
    assert status == 2 and err.startswith(f"error: {RULE}") and err.count("\n") == 1
    assert not folder.exists()
    assert run_ranks(run, 1)[0][0] == 0  # control: without the flag it runs


def test_a_decoder_hands_them_to_its_engine(model):
    def decode(rank):
        from megatron_opdlm.generate.decoder import Decoder
        from megatron_opdlm.rollout.request import DecodingOptions

        plain = Decoder.open(str(model.checkpoint), params_dtype="float32")
        limits = {"response_limit": 4, "seed": 0}
        assert plain.decode([], DecodingOptions(), **limits) == []
        with pytest.raises(ValueError, match=RULE):  # the engine's
            dataclasses.replace(plain, cuda_graphs=True).decode([], DecodingOptions(), **limits)

    run_ranks(decode, 1)


@pytest.mark.parametrize("wanted", [True, False, None])
def test_evaluation_during_training_does_as_training(wanted, tmp_path):
    from megatron_opdlm.distill.student import Student
    from megatron_opdlm.evaluation.online import OnlineEvaluation

    config = tiny_config(tmp_path / "m", tmp_path / "d", tmp_path / "s", cuda_graphs=wanted)
    description = SimpleNamespace(mask_token_id=1, config=SimpleNamespace(eos_token_ids=()))
    student = Student(model=None, description=description, tokenizer=None, folder=tmp_path)
    layout = SimpleNamespace(model=None, parallel=None, stream_multiple=1, memory=object())
    decoder = OnlineEvaluation(config, student, layout).decoder
    assert decoder.cuda_graphs is wanted and decoder.decodable.memory is layout.memory
