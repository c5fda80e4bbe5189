"""charlm: train small language models on text, and know what you found."""

__version__ = "0.1.0"
