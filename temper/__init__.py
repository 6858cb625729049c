"""temper: from a base model that continues text to an assistant that can be released, and back."""

__version__ = "0.1.0"
