"""Many runs from one command: python train.py -m optimizer.lr=1e-3,1e-2 seed=1,2"""

from charlm.sweep.jobs import Job, names, run_jobs

__all__ = ["Job", "names", "run_jobs"]
