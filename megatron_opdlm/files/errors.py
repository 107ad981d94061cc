"""The one exception of this package."""


class ConversionError(ValueError):
    """Input that cannot be converted. The text is one line: place, value, rule and fix."""
