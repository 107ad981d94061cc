"""The one exception of this package."""


class ConversionError(ValueError):
    """Input that cannot be converted; the text is one line: what, where, the rule, the fix."""
