"""Many runs from one command: python train.py -m optimizer.lr=1e-3,1e-2 seed=1,2"""

from charlm.sweep.engine import Engine, Ray, Slurm, work
from charlm.sweep.job import Job
from charlm.sweep.names import names
from charlm.sweep.pool import Pool
from charlm.sweep.sweep import Grid, run_jobs

__all__ = ["Engine", "Grid", "Job", "Pool", "Ray", "Slurm", "names", "run_jobs", "work"]
