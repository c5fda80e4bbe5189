"""charlm: train small language models on text, and know what you found."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charlm.data.datamodule import CharDataModule
    from charlm.model.bigram import Bigram
    from charlm.model.gpt import GPT
    from charlm.model.gru import GRU
    from charlm.model.lstm import LSTM
    from charlm.model.mixture import Mixture
    from charlm.model.mlp import MLP
    from charlm.model.transformerpp import TransformerPP
    from charlm.module import LanguageModel, load

__version__ = "0.2.0"
__all__ = [
    "GPT",
    "GRU",
    "LSTM",
    "MLP",
    "Bigram",
    "CharDataModule",
    "LanguageModel",
    "Mixture",
    "TransformerPP",
    "load",
]
PLACES = {"CharDataModule": "data.datamodule", "LanguageModel": "module", "load": "module"}  # the others are models


def __getattr__(name: str) -> Any:
    """Import a name when it is used: most commands do without the seconds that PyTorch and Lightning take."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"charlm.{PLACES.get(name, f'model.{name.lower()}')}"), name)
