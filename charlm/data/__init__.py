"""Text in, batches out: corpus -> tokenizer -> ids -> chunks -> loaders. Knows no model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charlm.data.datamodule import CharDataModule

__all__ = ["CharDataModule"]


def __getattr__(name: str) -> Any:
    """Import the data module lazily, since reading a text needs no Lightning."""
    if name in __all__:
        from charlm.data.datamodule import CharDataModule

        return CharDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
