"""Compare many runs: the swept settings, their effect on the loss, and whether the runs are comparable.

runs.py    run folders -> runs
study.py   runs -> rows: means over seeds, and which rows are within noise of the best
notes.py   what to know before comparing: budgets, corpora, contexts, code
law.py     a scaling law: its fit and its intervals, on arrays
scaling.py a study -> its scaling law, and the check on a larger run
text.py    the table on the terminal
page.py    the HTML page
plots.py   its plots
"""

from charlm.study.runs import Run, Value
from charlm.study.study import Row, Study, read_study

__all__ = ["Row", "Run", "Study", "Value", "read_study"]
