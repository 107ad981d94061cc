"""The program of a response, for responses as models write them."""

import gc
import time

import pytest

from megatron_opdlm.evaluation.execution.code_tests import CallTests, FunctionTests, ProgramTests
from megatron_opdlm.evaluation.execution.extraction import body_readings, defines, extract
from megatron_opdlm.evaluation.execution.judging import _programs, find_program

F = "def f(x):\n    return x"
G = "def g(x):\n    return x"
FOR_F = {
    # response, program
    "one block": (f"```python\n{F}\n```", F),
    "text around it": (f"Sure! Here it is:\n\n```python\n{F}\n```\n\nIt returns x.", F),
    "no language": (f"```\n{F}\n```", F),
    "capital letters": (f"```Python\n{F}\n```", F),
    "py": (f"```py\n{F}\n```", F),
    "an argument after the language": (f"```python title=f.py\n{F}\n```", F),
    "tildes": (f"~~~python\n{F}\n~~~", F),
    "line ends of Windows": (f"```python\r\n{F}\r\n```\r\n".replace("\nr", "\r\nr"), F),
    "a fence after text": (f"Here it is: ```python\n{F}\n```", F),
    "a fence at the end of code": (f"```python\n{F}```", F),
    "never closed": (f"```python\n{F}", F),
    "in a list": (f"1. Code:\n\n   ```python\n   {F.replace(chr(10), chr(10) + '   ')}\n   ```", F),
    "draft first": (f"```python\n{G}\n```\nBetter:\n```python\n{F}\n```", F),
    "two versions": (f"```python\n{F} + 1\n```\nNo:\n```python\n{F}\n```", F),
    "example after it": (f"```python\n{F}\n```\nUse it:\n```python\nprint(f(3))\n```", F),
    "output after it": (f"```python\n{F}\n```\nIt prints:\n```\n3\n```", F),
    "shell before it": (f"```bash\npip install x\n```\n```python\n{F}\n```", F),
    "shell after it": (f"```python\n{F}\n```\n```bash\npython f.py\n```", F),
    "closed by an opening": (f"```python\n{G}\n```python\n{F}\n```", F),
    "a class": ("```python\nclass f:\n    pass\n```\n```python\nf()\n```", "class f:\n    pass"),
    "a value": ("```python\nf = abs\n```\n```python\nf(1)\n```", "f = abs"),
    "async": ("```python\nasync def f(): pass\n```\n```python\n1\n```", "async def f(): pass"),
    "none defines it": (f"```python\n{G}\n```\n```\nh\n```", G),
    "no fence": (F, F),
    "no fence, text before": (f"The function is\n\nimport math\n{F}", f"import math\n{F}"),
    "no fence, a decorator": (f"So:\n@cache\n{F}", f"@cache\n{F}"),
    "MBPP's marks": (f"[BEGIN]\n{F}\n[DONE]\n\nYou are", F),
    "MBPP's marks and quotes": (f"[BEGIN]\n'{F}'\n[DONE]", F),
    "MBPP's first mark": (f"[BEGIN]\n{F}\n", F),
    "inline code": (f"Use ```x``` so:\n```python\n{F}\n```", F),
    "a main block": (f"```python\n{F}\nif __name__ == '__main__':\n    f(1)\n```",
                     f"{F}\nif __name__ == '__main__':\n    f(1)"),
    "another language alone": ("```java\nint f;\n```", "int f;"),
    "an empty block": ("```python\n```", ""),
    "nothing": ("", ""),
}  # fmt: skip


@pytest.mark.parametrize(("response", "program"), FOR_F.values(), ids=FOR_F)
def test_the_program_that_defines_f(response, program):
    assert extract(response, {"f"}).code.strip("\n") == program


@pytest.mark.parametrize(
    ("response", "program"),
    [(f"```python\n{F}\n```\n```python\nprint(1)\n```", "print(1)"),
     ("```python\nprint(1)\n```\nInput:\n```\n3\n```", "print(1)"),
     ("```\nprint(1)\n```", "print(1)"), ("print(1)", "print(1)"),
     ("Well:\nimport sys\nprint(1)", "import sys\nprint(1)")]
)  # fmt: skip
def test_a_program_is_the_last_block(response, program):
    assert extract(response, frozenset()).code == program


@pytest.mark.parametrize(
    ("body", "first"),
    [("    return x", "    return x"), ("return x", "    return x"), (" return x", "    return x"),
     ("\n    y = x\n    return y\n\n\nprint(f(1))", "    y = x\n    return y\n\n"),
     ("y = x\n    return y", "    y = x\n    return y"),
     ("if x:\n        y = 1\n    return y", "    if x:\n        y = 1\n    return y"),
     ("\treturn x", "\treturn x"), ("    return x\ndef g(): pass", "    return x")]
)  # fmt: skip
def test_a_body_is_indented_and_ends(body, first):
    assert body_readings(body)[0].rstrip() == first.rstrip()


def test_a_body_that_lost_all_its_spaces_has_them_again():
    body = "y = 0\nfor i in x:\n    y += i\nreturn y"
    assert "    y = 0\n    for i in x:\n        y += i\n    return y" in body_readings(body)


HEAD = "from typing import List\n\ndef f(x: List[int]) -> int:\n    '''doubles'''\n"
TESTS = FunctionTests(tests=("assert f(2) == 4",), entry_point="f", prelude=HEAD)


def programs(response, tests=TESTS):
    return _programs(find_program(response, tests), tests)


def test_a_body_is_put_behind_its_head_and_a_function_is_not():
    assert programs("    return 2 * x")[0] == HEAD + "    return 2 * x"
    assert programs("```python\n    return 2 * x\n```")[0] == HEAD + "    return 2 * x"
    assert programs(f"```python\n{F}\n```") == [F]
    assert programs(f"{F}\n") == [f"{F}\n"]


def test_a_body_is_not_taken_for_what_follows_it():
    assert programs(f"    return 2 * x\n\n{G}\n")[0] == HEAD + "    return 2 * x\n"


def test_without_an_entry_point_the_tests_name_it():
    tests = FunctionTests(tests=("assert set(f(1)) == {2}",))
    assert find_program(f"```python\n{F}\n```\n```python\n{G}\n```", tests).code == F
    tests = FunctionTests(tests=("assert g(f(1)) == 2",))
    assert find_program(f"```python\n{F}\n```\n```python\n{G}\n```", tests).code == G


def test_a_method_of_solution_is_found():
    tests = CallTests(entry_point="f", inputs=((1,),), outputs=(1,))
    solution = "class Solution:\n    def f(self, x): return x"
    response = f"```python\n{solution}\n```\n```python\nprint(Solution().f(1))\n```"
    assert find_program(response, tests).code == solution
    program = ProgramTests(inputs=("",), outputs=("",))
    assert find_program(response, program).code == "print(Solution().f(1))"  # control


LONG = {
    "letters": "x" * 10**6,
    "fences": "```\n" * 250_000,
    "backticks": "`" * 10**6 + "x y",
    "backticks with words": "```python " * 100_000,
    "spaces": " " * 10**6 + "x",
    "lines": "\n" * 10**6,
    "letters and a backtick": "```" + "a" * 10**6 + "`",
    "definitions": "def " + " " * 10**6,
    "equations": "a\n" * 500_000,
    "marks": "[BEGIN]" * 140_000,
    "letters as a body": "    " + "x = 1;" * 160_000,
}


@pytest.mark.parametrize("response", LONG.values(), ids=LONG)
def test_a_million_characters_take_linear_time(response):
    """Ten times as many take about ten times as long, not a hundred times."""

    def seconds(text):
        gc.disable()  # its time is that of all other objects of this process
        start = time.process_time()
        programs(text)
        used = time.process_time() - start
        gc.enable()
        return used

    assert seconds(response) < max(2.0, 30 * seconds(response[: len(response) // 10]))


def test_what_defines_a_name():
    assert defines("x = 1\n  def f(): pass", {"f"}) and defines("f = 2", {"f"})
    for code in ("f == 2", "g(f)", "deff = 1", "# def f", "def fg(): pass"):
        assert not defines(code, {"f"}), code
