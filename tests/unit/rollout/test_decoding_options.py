"""Decoding options as JSON, there and back."""

import json

import pytest

from megatron_opdlm.diffusion.remasking import RULES, make_rule
from megatron_opdlm.rollout.request import DecodingOptions


@pytest.mark.parametrize("name", list(RULES))
def test_options_survive_json(name):
    options = DecodingOptions(
        block_size=8, denoising_steps=3, prediction="next_position", rule=make_rule(name),
        temperature=0.7, top_k=5, top_p=0.9,
    )  # fmt: skip
    assert options != DecodingOptions(rule=make_rule(name))  # control
    values = json.loads(json.dumps(options.to_json()))
    assert DecodingOptions.from_json(values) == options


def test_a_parameter_of_the_rule_survives():
    rule = make_rule("low_confidence_dynamic", confidence_threshold=0.25)
    assert rule != make_rule("low_confidence_dynamic")
    assert DecodingOptions.from_json(DecodingOptions(rule=rule).to_json()).rule == rule
