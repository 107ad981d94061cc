"""Which temperatures tokens can be sampled at.

The standard library only: the configuration asks, too.
"""

SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-6, 1e6
"""Float32 logits / temperature carry no noise any more below these, and nothing else above them."""
TEMPERATURE_RULE = f"0 (argmax) or from {SMALLEST_TEMPERATURE} to {LARGEST_TEMPERATURE:.0f}"


def is_temperature(value: float) -> bool:
    """Whether it keeps TEMPERATURE_RULE."""
    return value == 0 or SMALLEST_TEMPERATURE <= value <= LARGEST_TEMPERATURE
