"""Names of lm-eval's tasks, and what may not happen while one is loaded."""

import random
import socket
from types import SimpleNamespace

import pytest

from megatron_opdlm.evaluation.harness.tasks import _require_known, _spec, repeatable
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


def test_control_the_network_is_refused_where_tests_say_so(monkeypatch):
    refuse_network(monkeypatch)
    with pytest.raises(AssertionError, match="the network is asked for example"):
        socket.create_connection(("example.invalid", 80))
    with pytest.raises(AssertionError, match="the network is asked for"), socket.socket() as s:
        s.connect(("192.0.2.1", 80))
