"""Prompts that the chat template refuses: one line, before anything is imported."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_opdlm import cli
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.distill.student import load_tokenizer
from megatron_opdlm.responses.prompts import Prompt, load_prompts, tokenize_prompts
from megatron_opdlm.responses.rendering import check_rendering
from megatron_opdlm.train import start
from tests.tiny import CHAT_TEMPLATE, tiny_model
from tests.training import tiny_config

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role\\nnot supported') }}"
    "{% endif %}" + CHAT_TEMPLATE
)
TEMPLATES = {
    "refuses a system turn": (
        NO_SYSTEM,
        "prompts.jsonl:2: the student's chat template refuses this prompt: System role not "
        "supported; change its messages, or give the student another template: opdlm convert "
        "import --chat-template FILE",
    ),
    "fails on what a prompt says": (
        "{{ 1 // (messages | length - 2) }}" + CHAT_TEMPLATE,
        "prompts.jsonl:2: the student's chat template refuses this prompt: ZeroDivisionError "
        "integer division or modulo by zero; change",
    ),
    "syntax error": (
        CHAT_TEMPLATE + "\n{% endif %}",
        "the student's chat template, line 5: Encountered unknown tag 'endif'.; mend it, or give",
    ),
}


@pytest.fixture
def hf(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path / "hf"
    shutil.copytree(tiny_model(tmp_path_factory.getbasetemp()).hf, folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prompts, of which the second has a system turn."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]
    lines = [{"prompt": "a"}, {"messages": turns}, *({"prompt": f"b{i}"} for i in range(10))]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line | {"answer": "1"}) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_commands_say_so_before_the_import(
    name: str, hf: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template, message = TEMPLATES[name]
    (hf / "chat_template.jinja").write_text(template)
    tiny_config(hf, data, tmp_path / "run").save_yaml(tmp_path / "config.yaml")
    model = ["--model", str(hf), "--import-cache", str(tmp_path / "imported")]
    for command in (
        ["train", str(tmp_path / "config.yaml")],
        ["generate", "--prompts", str(data), *model],
        ["eval", "--task", f"t={data}", "--max-new-tokens", "16", *model],
    ):
        assert cli.main(command) == 2
        (line,) = (text for text in capsys.readouterr().err.splitlines() if "error" in text)
        assert message in line and "Traceback" not in line
    assert not (tmp_path / "imported").exists() and not (tmp_path / "run").exists()


def test_a_prompt_of_the_command_line(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hf / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert cli.main(["generate", "--prompt", "x", "--model", str(hf)]) == 2
    assert "--prompt: the student's chat template refuses this prompt: no;" in (
        capsys.readouterr().err
    )


def test_control_a_template_that_takes_all_prompts(hf: Path, data: Path, tmp_path: Path) -> None:
    start.check(tiny_config(hf, data, tmp_path / "run"))


def test_the_evaluations_questions_are_rendered_too(hf: Path, data: Path, tmp_path: Path) -> None:
    (hf / "chat_template.jinja").write_text(NO_SYSTEM)
    fine = tmp_path / "fine.jsonl"
    fine.write_text("".join(json.dumps({"prompt": f"b{i}"}) + "\n" for i in range(10)))
    start.check(tiny_config(hf, fine, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: the student's chat template refuses"):
        keys = {"eval_data": data, "eval_interval": 1, "eval_questions": 3}
        start.check(tiny_config(hf, fine, tmp_path / "run", **keys))


def test_what_is_rendered_early_is_what_is_tokenised(hf: Path, data: Path) -> None:
    """The tokenizer without a vocabulary writes the text that the real one turns into ids."""
    from megatron_opdlm.convert.chat_template import template_renderer

    template = "{{ bos_token }}{{ strftime_now('%Y')[:1] }}" + CHAT_TEMPLATE + "{{ eos_token }}"
    (hf / "chat_template.jinja").write_text(template)
    source, tokenizer = ModelSource.open(hf), load_tokenizer(hf)
    assert source.chat_template is not None and source.tokenizer is not None
    renderer = template_renderer(source.chat_template, source.tokenizer)
    options = {"add_generation_prompt": True, "enable_thinking": False, "tokenize": False}
    for prompt in load_prompts(data):
        texts = {t.apply_chat_template(prompt.messages, **options) for t in (renderer, tokenizer)}
        assert len(texts) == 1 and texts.pop().endswith("<|im_end|>")


def test_tokenisation_says_it_in_the_same_words(hf: Path, data: Path) -> None:
    """For those who come by another way than the commands."""
    tokenizer = load_tokenizer(tiny_tokenizer(hf))
    tokenizer.chat_template = NO_SYSTEM
    prompts = load_prompts(data)
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: .* refuses this prompt: System role "):
        tokenize_prompts(prompts, tokenizer, enable_thinking=False, max_prompt_tokens=99)
    kept = tokenize_prompts(prompts[2:], tokenizer, enable_thinking=False, max_prompt_tokens=99)
    assert len(kept.kept) == 10  # control


def tiny_tokenizer(hf: Path) -> Path:
    """The tokenizer with a mask token."""
    from megatron_opdlm.convert.tokenizer import add_mask_token

    add_mask_token(hf, hf / "tokenizer", 301)
    return hf / "tokenizer"


def test_a_model_without_a_template_has_the_usual_error(hf: Path) -> None:
    (hf / "chat_template.jinja").unlink(missing_ok=True)
    path = hf / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    prompt = Prompt(id="1", messages=[{"role": "user", "content": "x"}], where="p:1")
    with pytest.raises(ValueError, match="tokenizer has no chat_template"):
        check_rendering([prompt], ModelSource.open(hf), enable_thinking=False)
