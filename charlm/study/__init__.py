"""Many runs as one study: what was swept, what it did to the loss, and whether it can be compared: charlm report"""

from charlm.study.runs import Run, Value
from charlm.study.study import Row, Study, read_study

__all__ = ["Row", "Run", "Study", "Value", "read_study"]
