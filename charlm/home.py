"""Where train.py and conf/ are: next to the package in a clone, inside it after `pip install` of a wheel."""

from pathlib import Path

PACKAGE = Path(__file__).parent
IS_CLONE = not (PACKAGE / "train.py").is_file()
HOME = PACKAGE.parent if IS_CLONE else PACKAGE
TRAIN, CONF = HOME / "train.py", HOME / "conf"
COMMAND = "python train.py" if IS_CLONE else "charlm train"  # the command in messages to the user
