"""Files from the Hugging Face hub, with a stand-in for it. No test uses the network."""

import json
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from megatron_opdlm.evaluation.benchmarks import BENCHMARKS
from megatron_opdlm.evaluation.benchmarks.load import fetch_from_hub, load_benchmark


class Hub:
    """A stand-in: repositories by name, each with files by name."""

    def __init__(self, repositories):
        self.repositories, self.asked = repositories, []

    def snapshot_download(self, name, *, repo_type, allow_patterns, local_dir):
        assert repo_type == "dataset"
        self.asked.append(name)
        files = self.repositories[name]
        if isinstance(files, Exception):
            raise files
        for file, text in files.items():
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                path = Path(local_dir) / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        marker = Path(local_dir) / ".cache" / "huggingface" / "x.json"
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text("{}")
        return str(local_dir)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    def make(repositories):
        stand_in = Hub(repositories)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / ".cache" / "home"))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
        return stand_in

    return make


def lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_a_file_is_fetched_and_read(hub, kept):
    problem = {"problem": "p", "solution": "s", "answer": "1", "subject": "x", "level": 1}
    stand_in = hub({"HuggingFaceH4/MATH-500": {
        "test.jsonl": lines(problem | {"unique_id": "a"}, problem | {"unique_id": "b"}),
        "README.md": "no", "other.jsonl": "no",
    }})  # fmt: skip
    path = fetch_from_hub(BENCHMARKS["math_500"])
    assert stand_in.asked == ["HuggingFaceH4/MATH-500"]
    assert [q.id for q in load_benchmark(BENCHMARKS["math_500"], path).questions] == ["a", "b"]


def test_several_repositories_are_one_folder(hub, kept):
    def question(category):
        return lines({"question_id": category, "category": category, "task": "typos",
                      "turns": [category], "ground_truth": "g"})  # fmt: skip

    parts = BENCHMARKS["live_bench"].hub
    names = [part.repository for part in parts]
    hub({name: {"data/test-0.jsonl": question(name)} for name in names})
    live_bench = BENCHMARKS["live_bench"]
    import dataclasses

    changed = tuple(dataclasses.replace(part, files=("data/test-*",)) for part in parts)
    path = fetch_from_hub(dataclasses.replace(live_bench, hub=changed))
    assert sorted(q.id for q in load_benchmark(live_bench, path).questions) == sorted(names)


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=list(BENCHMARKS))
def test_every_record_names_files(benchmark, hub):
    """The patterns of files are those of names that they would fetch, and nothing else's."""
    assert benchmark.hub is not None
    for part in benchmark.hub:
        assert part.repository.count("/") == 1 and part.files
        assert not any(fnmatch("README.md", pattern) for pattern in part.files)


def response(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "rule"),
    [
        (GatedRepoError("no", response=response(403)),
         "gpqa_diamond: Idavidrein/gpqa asks for its terms to be accepted; .*`hf auth login`"),
        (LocalEntryNotFoundError("no network\nat all"),
         "gpqa_diamond: Idavidrein/gpqa cannot be downloaded: no network; get it from Rein"),
        (OSError("disk full"), "cannot be downloaded: disk full; get it from Rein"),
    ],
    ids=["gated", "offline", "disk"],
)  # fmt: skip
def test_what_cannot_be_fetched_is_one_line(error, rule, hub):
    hub({"Idavidrein/gpqa": error})
    with pytest.raises(ValueError, match=rule) as refused:
        fetch_from_hub(BENCHMARKS["gpqa_diamond"])
    assert "\n" not in str(refused.value)


def test_a_file_that_is_gone_is_named(hub):
    hub({"Idavidrein/gpqa": {"gpqa_main.csv": "x"}})
    with pytest.raises(ValueError, match="has no file called gpqa_diamond.csv any more; get it"):
        fetch_from_hub(BENCHMARKS["gpqa_diamond"])


def test_a_benchmark_that_is_not_there_is_refused():
    import dataclasses

    nowhere = dataclasses.replace(BENCHMARKS["gsm8k"], hub=None)
    with pytest.raises(ValueError, match="is not on the Hugging Face hub; get it from Cobbe"):
        fetch_from_hub(nowhere)
