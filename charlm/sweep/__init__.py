"""Many runs from one command: python train.py -m optimizer.lr=1e-3,1e-2 seed=1,2"""

from charlm.sweep.job import Job
from charlm.sweep.names import names
from charlm.sweep.pool import Pool
from charlm.sweep.sweep import Grid, run_jobs

__all__ = ["Grid", "Job", "Pool", "names", "run_jobs"]
