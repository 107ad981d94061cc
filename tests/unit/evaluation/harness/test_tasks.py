"""Names of lm-eval's tasks, and what may not happen while one is loaded."""

import random
import socket
from types import SimpleNamespace

import pytest

from megatron_opdlm.evaluation.harness.run import _fewshot_notes
from megatron_opdlm.evaluation.harness.tasks import (
    _load,
    _require_known,
    _spec,
    load_tasks,
    repeatable,
)
from tests.harness_tasks import needs_lm_eval, needs_lm_eval_and_checkers, refuse_network

EMPTY = SimpleNamespace(all_tasks=[])


@needs_lm_eval
@pytest.mark.parametrize("name", ["gsm8k", "ifeval"])
def test_a_task_of_lm_eval_is_found_without_its_index(name):
    assert _spec(name, EMPTY).endswith(f"lm_eval/tasks/{name}/{name}.yaml")


@needs_lm_eval
@pytest.mark.parametrize("name", ["mmlu", "gsm8k.*"])
def test_a_group_and_an_unknown_name_need_the_index(name):
    assert _spec(name, EMPTY) is None


def test_a_name_of_ones_own_folder_stays_a_name(tmp_path):
    assert _spec("gsm8k", SimpleNamespace(all_tasks=["gsm8k"])) == "gsm8k"
    file = tmp_path / "t.yaml"
    file.write_text("task: t\n")
    assert _spec(str(file), EMPTY) == str(file)
    with pytest.raises(FileNotFoundError, match="--harness: there is no file nowhere.yaml"):
        _spec("nowhere.yaml", EMPTY)


@needs_lm_eval
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: [", "lm-eval cannot load it (ParserError: "),
        ("task: null\ngroup: null\n", "lm-eval cannot load it (KeyError: "),
        ("task: t\nfew_shots: 3\n", "lm-eval cannot load it (TypeError: "),
        ("- task\n", "Expected YAML dict from "),
        ("dataset_path: json\n", "Unknown config shape: "),
    ],
)
def test_a_file_that_is_no_task_is_one_line(tmp_path, text, says):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as refused:
        load_tasks([str(file)], [])
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_hub_that_cannot_be_reached_is_told_with_what_to_do():
    class Manager:
        def load(self, specs):
            raise error

    error = ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError)")
    with pytest.raises(ConnectionError) as refused:
        _load(Manager(), ["gsm8k"])
    assert str(refused.value) == (
        "--harness=gsm8k: Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError); run "
        "it where the hub can be reached, or give a YAML file that names data on this machine, as "
        "docs/evaluation.md shows"
    )
    error = OSError("another error")
    with pytest.raises(OSError, match="^another error$"):  # control
        _load(Manager(), ["gsm8k"])


def test_an_unknown_name_is_refused_with_the_nearest():
    manager = SimpleNamespace(all_tasks=["gsm8k", "gsm8k_cot", "ifeval"])
    _require_known("gsm8k", manager)  # control
    with pytest.raises(ValueError) as refused:
        _require_known("gsm8", manager)
    assert str(refused.value) == (
        "--harness=gsm8 is not a task of lm-eval or of --harness-include; did you mean gsm8k or "
        "gsm8k_cot?"
    )


@needs_lm_eval_and_checkers
def test_nothing_is_downloaded_and_nothing_is_drawn():
    import langdetect
    import nltk

    before = langdetect.DetectorFactory.seed, nltk.download
    with repeatable():
        with pytest.raises(FileNotFoundError, match="needs NLTK's data punkt_tab, which is not"):
            nltk.download("punkt_tab")
        found = set()
        for seed in range(30):
            random.seed(seed)
            found.add(langdetect.detect("hello"))
        assert len(found) == 1
    assert (langdetect.DetectorFactory.seed, nltk.download) == before


def test_a_task_with_examples_of_its_own_is_named():
    result = SimpleNamespace(figures={"n-shot": {"a": 0, "b": 5, "group": " "}})
    assert list(_fewshot_notes(result, 5)) == ["a: num_fewshot=0, which its file fixes, and not 5"]
    assert list(_fewshot_notes(result, None)) == []


def test_control_the_network_is_refused_where_tests_say_so(monkeypatch):
    refuse_network(monkeypatch)
    with pytest.raises(AssertionError, match="the network is asked for example"):
        socket.create_connection(("example.invalid", 80))
    with pytest.raises(AssertionError, match="the network is asked for"), socket.socket() as s:
        s.connect(("192.0.2.1", 80))
