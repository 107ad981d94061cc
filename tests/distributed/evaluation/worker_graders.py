"""Graders that misbehave. Worker processes import this file, so it needs no torch."""

import os
import signal
import time

from megatron_opdlm.evaluation.graders.grader import Grade, Grader


def grade_badly(response, answer):
    """Does what the response says; then the response is correct if it is the answer."""
    match response.split():
        case ["sleep", seconds]:
            time.sleep(float(seconds))
        case ["compute"]:  # one step of the interpreter, which no signal interrupts
            pow(10**6, 10**7)
        case ["exit", status]:
            os._exit(int(status))
        case ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["eat"]:
            bytearray(2**34)
        case ["raise"]:
            raise ValueError("bad response")
        case ["stop"]:
            raise SystemExit(1)
    return Grade(correct=response == answer, extracted=response[:20])


def fail_to_begin():
    raise ImportError("no such library")


def read(entry):
    return entry.text("answer")


def bad_grader(**changes):
    values = {
        "name": "bad", "reads": "`answer`", "accepts": "it is the answer", "read": read,
        "grade": grade_badly, "runs_in": "processes", "seconds": 3.0,
    }  # fmt: skip
    return Grader(**(values | changes))
