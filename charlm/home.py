"""Where things are: train.py and conf/ next to the package in a clone, inside it after `pip install` of a wheel."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parent
IS_CLONE = not (PACKAGE / "train.py").is_file()
HOME = PACKAGE.parent if IS_CLONE else PACKAGE
TRAIN, CONF = HOME / "train.py", HOME / "conf"
COMMAND = "python train.py" if IS_CLONE else "charlm train"  # the command in messages to the user


def cache() -> Path:
    """Return the folder for what can be made again: $CHARLM_CACHE, or the user's own of this system."""
    from platformdirs import user_cache_path  # which most commands do without

    return Path(os.environ.get("CHARLM_CACHE") or user_cache_path("charlm"))
