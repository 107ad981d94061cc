"""The allowed sampling temperatures.

This file needs only the standard library, because the configuration uses it.
"""

SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-6, 1e6
"""Below the first, noise no longer changes float32 logits / temperature; above the second, the
noise is all that is left."""
TEMPERATURE_RULE = f"0 (argmax) or from {SMALLEST_TEMPERATURE} to {LARGEST_TEMPERATURE:.0f}"


def is_temperature(value: float) -> bool:
    """Returns whether a temperature satisfies TEMPERATURE_RULE."""
    return value == 0 or SMALLEST_TEMPERATURE <= value <= LARGEST_TEMPERATURE
