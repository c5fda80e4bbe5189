"""Text in, batches out: corpus -> tokenizer -> ids -> chunks -> loaders. Knows no model."""

from charlm.data.datamodule import CharDataModule

__all__ = ["CharDataModule"]
