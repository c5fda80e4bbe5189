"""Many runs as one study: what was swept, what it did to the loss, and whether runs compare: charlm report

runs.py    run folders -> runs
study.py   runs -> rows: means over seeds, and which rows are within noise of the best
notes.py   what to know before comparing: budgets, corpora, contexts, code
text.py    the table on the terminal
page.py    the HTML page
plots.py   its plots
"""

from charlm.study.runs import Run, Value
from charlm.study.study import Row, Study, read_study

__all__ = ["Row", "Run", "Study", "Value", "read_study"]
