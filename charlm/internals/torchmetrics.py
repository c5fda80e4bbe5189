"""torchmetrics, which Lightning imports: without scipy.signal, whose import takes a fifth of all that a run imports."""

import sys
from types import ModuleType

UNUSED = "scipy.signal"


def import_lightning() -> None:
    """Import Lightning, and keep torchmetrics from importing `scipy.signal`.

    torchmetrics imports it wherever scipy is installed, to give it back a name, `hamming`, that another library needs.
    Nothing here uses that name. Here it meets an empty module that has the name; it is gone afterwards, so that a later
    import finds the real one.
    """
    if UNUSED in sys.modules:
        return
    placeholder: dict[str, object] = vars(sys.modules.setdefault(UNUSED, ModuleType(UNUSED)))
    placeholder["hamming"] = None
    try:
        import lightning  # noqa: F401
    finally:
        del sys.modules[UNUSED]
