"""Small synthetic files in the schemas of published benchmarks that are not at hand.

Every text in them is made up here; the keys and the kinds of values are those that the sources
named in docs/benchmarks.md describe.
"""

import base64
import csv
import gzip
import json
import pickle
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Synthetic:
    """One file, or one folder of files."""

    benchmark: str
    """Benchmark whose form it has."""
    files: dict[str, list[Any]]
    """Entries by name of the file."""
    questions: int
    """Number of questions in it."""
    name: str = ""
    """Name of the case, if a benchmark has several."""

    def write(self, folder: Path) -> Path:
        """Writes the files below a folder; returns what to give, one file or the folder."""
        for name, entries in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, entries)
        return folder / next(iter(self.files)) if len(self.files) == 1 else folder

    def __str__(self) -> str:
        return f"{self.benchmark} {self.name}".strip()


def write(path: Path, entries: list[Any]) -> None:
    """Writes entries as the ending of the path asks for. Rows of a CSV file may be lists."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if isinstance(entries[0], dict):
                writer.writerow(entries[0])
            writer.writerows(list(e.values()) if isinstance(e, dict) else e for e in entries)
    else:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        text = json.dumps(entries, ensure_ascii=False) if kind == "json" else lines
        data = text.encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def packed(tests: list[Any]) -> str:
    """Packs private tests as LiveCodeBench does."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def many(make: Any, count: int = 2) -> list[Any]:
    return [make(number) for number in range(1, count + 1)]


def four(number: int) -> dict[str, str]:
    return {letter: f"{letter.lower()}{number}" for letter in "ABCD"}


def gpqa(number: int) -> dict[str, str]:
    return {
        "Pre-Revision Question": "old",
        "Question": f'Which, {number}?\nSay "it".',
        "Correct Answer": f"right {number}\n",
        "Incorrect Answer 1": "wrong, 1",
        "Incorrect Answer 2": "wrong 2",
        "Incorrect Answer 3": "wrong 3",
        "High-level domain": "Physics",
        "Record ID": f"rec{number}",
    }


def live_code(number: int, date: str, starter: str = "", function: str | None = None) -> dict:
    tests = [{"input": f"{number}\n2", "output": f"{number + 2}", "testtype": "stdin"}]
    return {
        "question_title": "Sum",
        "question_content": f"Add, {number}.",
        "platform": "atcoder",
        "question_id": f"abc{number}_a",
        "contest_id": f"abc{number}",
        "contest_date": f"{date}T00:00:00",
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(tests),
        "private_test_cases": packed([{"input": "5\n6", "output": "11", "testtype": "stdin"}]),
        "metadata": json.dumps({"func_name": function} if function else {}),
    }


def codeforces(number: int, **more: Any) -> dict[str, Any]:
    tests = [{"input": "1\r\n", "output": "2\r\n"}]
    return {
        "id": f"{number}/A",
        "title": "Next",
        "time_limit": 2.0,
        "description": "Given $$$n$$$, print $$$n+1$$$.",
        "input_format": "One integer $$$n$$$.",
        "output_format": "One integer.",
        "interaction_format": None,
        "note": "Easy.",
        "examples": tests,
        "rating": 800.0,
        "input_mode": "stdio",
        "executable": True,
        "generated_checker": None,
        "official_tests": tests,
    } | more


def livebench(number: int, category: str, task: str, truth: str, **more: Any) -> dict[str, Any]:
    return {
        "question_id": f"q{number}",
        "category": category,
        "task": task,
        "turns": [f"Do {task} {number}."],
        "ground_truth": truth,
        "livebench_release_date": "2024-11-25",
        "livebench_removal_date": "",
    } | more


def livebench_code(number: int) -> dict[str, Any]:
    entry = live_code(number, "2024-06-01")
    return livebench(
        number, "coding", "LCB_generation", "",
        public_test_cases=entry["public_test_cases"],
        private_test_cases=entry["private_test_cases"],
        original_json={"metadata": json.dumps({})},
    )  # fmt: skip


def released(number: int, answer: str, question: str = "How many?") -> dict[str, str]:
    return {"question": f"{question} {number}", "ground_truth_answer": answer}


GRID = {"header": ["House", "Name", "Pet"], "rows": [["1", "Ann", "cat"], ["2", "Bob", "dog"]]}
PLUS_TEST = "def check(candidate):\n    inputs = [[1]]\n    results = [2]\n"
CHOICES = "Which?\n(A) yes\n(B) no\n(C) (maybe)"

FILES = [
    Synthetic("gsm8k", {"synthetic_test.parquet": many(lambda n: {
        "question": f"Sum {n}?", "answer": f"It is <<1+1=2>>2.\n#### 1,00{n}"})}, 2, "hub"),
    Synthetic("gsm8k", {"GSM8K.json": [released(1, "18")]}, 1, "released"),
    Synthetic("math_500", {"synthetic_test.jsonl": many(lambda n: {
        "problem": f"Find $x_{n}$.", "solution": "...", "answer": r"\frac{1}{2}",
        "subject": "Algebra", "level": 3, "unique_id": f"test/algebra/{n}.json"})}, 2),
    Synthetic("aime_24", {"synthetic_train.parquet": many(lambda n: {
        "id": 59 + n, "problem": f"Find {n}.", "solution": "...", "answer": "033",
        "url": "https://example.org/2024_AIME_I_Problems/Problem_1", "year": "2024"})}, 2, "year"),
    Synthetic("aime_24", {"synthetic.csv": many(lambda n: {
        "ID": f"2024-II-{n}", "Problem": f"Find {n}.", "Solution": "", "Answer": 204})}, 2, "ID"),
    Synthetic("aime_24", {"synthetic.jsonl": many(lambda n: {
        "id": n, "problem": f"Find {n}.", "solution": r"So \boxed{25}. \boxed{204}",
        "url": "https://example.org/2024_AIME_II_Problems/Problem_4"})}, 2, "boxed"),
    Synthetic("aime_25", {"synthetic.jsonl": many(lambda n: {
        "problem": f"Find {n}.", "answer": "70", "id": str(n)})}, 2),
    Synthetic("aime_25", {f"synthetic-{part}.jsonl": many(lambda n, part=part: {
        "question": f"Find {part}{n}.", "answer": 70 + n}) for part in ("I", "II")}, 4,
        "two files"),
    Synthetic("lmb_hard", {f"synthetic_hard_{language}.jsonl": many(lambda n, language=language: {
        "question": f"Find {language} {n}.", "answer": r"$2\sqrt{3}$", "question_type": "fill"})
        for language in ("cn", "en")}, 4),
    Synthetic("zebra_logic", {"grid_mode/synthetic.parquet": many(lambda n: {
        "id": f"lgp-test-2x2-{n}", "size": "2*2", "puzzle": f"Puzzle {n}", "solution": GRID,
        "created_at": "2024-07-03"})}, 2),
    Synthetic("zebra_logic", {"ZebraLogic.json": [
        {"question": "Solve.", "ground_truth_answer": json.dumps(GRID)}]}, 1, "released"),
    Synthetic("mmlu", {"synthetic-test.parquet": many(lambda n: {
        "question": f"Which {n}?", "subject": "law", "choices": ["a", "b", "c", "d"],
        "answer": 2})}, 2, "hub"),
    Synthetic("mmlu", {
        "data/test/law_test.csv": [["Which, 1?", "a", "b", "c", "d", "C"], ["2?", *"abcd", "A"]],
        "data/test/art_test.csv": [["Which 3?", *"abcd", "D"]],
        "data/dev/law_dev.csv": [["Not asked", *"abcd", "D"]]}, 3, "CSV"),
    Synthetic("mmlu", {"MMLU.json": [
        {"question": CHOICES, "ground_truth_answer": "C", "subdivision": "law"}]}, 1, "released"),
    Synthetic("mmlu_pro", {"synthetic.parquet": many(lambda n: {
        "question_id": 69 + n, "question": f"Which {n}?", "options": list("abcdefghij"),
        "answer": "J", "answer_index": 9, "cot_content": "", "category": "law", "src": "x"})}, 2),
    Synthetic("gpqa_diamond", {"synthetic_gpqa_diamond.csv": many(gpqa, 3)}, 3),
    Synthetic("ceval", {
        "val/law_val.csv": [{"id": n, "question": f"{n}?", **four(n), "answer": "B"}
                            for n in range(2)],
        "val/art_val.csv": [{"id": 0, "question": "?", **four(0), "answer": "D"}],
        "dev/law_dev.csv": [{"id": 0, "question": "not asked", **four(0), "answer": "A"}]}, 3),
    Synthetic("ceval", {"law/val-00000-of-00001.parquet": [
        {"id": 0, "question": "?", **four(0), "answer": "B", "explanation": ""}]}, 1, "hub"),
    Synthetic("live_bench", {"synthetic-test.jsonl": [
        livebench(1, "math", "math_comp", "B"), livebench(2, "math", "AMPS_Hard", "$x^2$"),
        livebench(3, "math", "olympiad", "3,1,2"), livebench(4, "language", "typos", "A text."),
        livebench(5, "language", "plot_unscrambling", "..."), livebench_code(6),
        livebench(7, "reasoning", "zebra_puzzle", "3", livebench_release_date="2024-06-24"),
        livebench(8, "reasoning", "zebra_puzzle", "a, b"),
        livebench(9, "instruction_following", "paraphrase", "")]}, 5),
    Synthetic("ifeval", {"synthetic.jsonl": many(lambda n: {
        "key": n, "prompt": f"No commas {n}.", "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}]})}, 2),
    Synthetic("humaneval", {"synthetic.jsonl.gz": many(lambda n: {
        "task_id": f"HumanEval/{n}", "prompt": 'def f(x):\n    """Next."""\n', "entry_point": "f",
        "canonical_solution": "    return x + 1\n",
        "test": "def check(candidate):\n    assert candidate(1) == 2\n"})}, 2),
    Synthetic("mbpp", {"synthetic_MbppPlus.jsonl.gz": many(lambda n: {
        "task_id": f"Mbpp/{n}", "prompt": '"""\nWrite f.\nassert f(1) == 2\n"""\n',
        "entry_point": "f", "canonical_solution": "", "base_input": [[1]], "plus_input": [[2]],
        "atol": 0, "contract": "", "assertion": "\nassert f(1) == 2\nassert f(2) == 3\n"})}, 2,
        "EvalPlus"),
    Synthetic("mbpp", {"data/test-00000-of-00001-synthetic.parquet": many(lambda n: {
        "task_id": n, "code": "", "prompt": "Write f.", "source_file": "x",
        "test_imports": ["import math"], "test_list": ["assert f(1) == 2", "assert f(2) == 3"],
        "test": PLUS_TEST})}, 2, "EvalPlus on the hub"),
    Synthetic("mbpp", {"synthetic_sanitized-mbpp.json": [{
        "source_file": "x", "task_id": n, "prompt": "Write f.", "code": "", "test_imports": [],
        "test_list": ["assert f(1) == 2"]} for n in (10, 11, 510, 511)]}, 2, "sanitized"),
    Synthetic("live_code_bench_v6", {
        "test.jsonl": [live_code(1, "2024-07-31"), live_code(2, "2024-08-01")],
        "test6.jsonl": [live_code(3, "2025-05-03", "class Solution:", "add"),
                        live_code(4, "2025-06-01")]}, 2),
    Synthetic("codeforces", {"verifiable/test-00000-of-00001-synthetic.parquet": [
        codeforces(1), codeforces(2, interaction_format="Ask."),
        codeforces(3, generated_checker="checker"), codeforces(4, input_mode="file"),
        codeforces(5, executable=False), codeforces(6, official_tests=[])]}, 1),
    Synthetic("mmmlu_lite", {
        f"{language}/test-00000-of-00001.parquet": many(lambda n, language=language: {
        "sample_id": f"law/test/{n}", "subject": "law", "subject_category": "Humanities",
        "question": f"{language} {n}?", "option_a": "a", "option_b": "b", "option_c": "c",
        "option_d": "d", "answer": "B", "cultural_sensitivity_label": "CS"})
        for language in ("de", "en")}, 4),
    Synthetic("include_lite", {f"{language}/test-00000-of-00001.parquet": [{
        "language": language, "country": "X", "domain": "d", "subject": "s",
        "regional_feature": "r", "level": "l", "question": f"{language} {n}?",
        "choices": ["a", "b", "c", "d"], "answer": 3} for n in (1, 2)]
        for language in ("Greek", "Hindi")}, 4),
    Synthetic("mt_aime_2024", {"synthetic-mt-aime2024.parquet": many(lambda n: {
        "answer": 200 + n, "en": f"Find {n}.", "fr": f"Trouvez {n}.", "ko": f"K {n}",
        "zh-cn": f"Z {n}"})}, 8),
    Synthetic("mlogiqa", {f"mlogiqa/test/{language}.jsonl": many(lambda n, language=language: {
        "context": "All cats run. ", "question": f"{language} {n}?", "id": n,
        "options": ["a", "b", "c", "d"], "label": 0}) for language in ("en", "th")}, 4),
    Synthetic("mlogiqa", {"en.jsonl": many(lambda n: {
        "context": "All cats run.", "question": f"Which {n}?", "option_1": "a", "option_2": "b",
        "option_3": "c", "option_4": "d", "answer": "3"})}, 2, "OpenCompass"),
]  # fmt: skip
