"""Many runs from one command: python train.py -m optimizer.lr=1e-3,1e-2 seed=1,2

command.py      the process of a sweep, from its command to its table
plan.py         the command line of a sweep, checked
checks.py       checks of its runs that need PyTorch
composition.py  configs of many jobs, composed together
ledger.py       sweep.json: the jobs of a sweep and their states
sweep.py        runs the jobs that are not done, and prints the table
pool.py         jobs in parallel on this machine
engine.py       jobs on Slurm or Ray
packing.py      which jobs train together in one process
job.py          one job: a fresh process with its own folder
processes.py    the processes of a sweep: its jobs, and the fork server that imports for all of them
preload.py      what the fork server imports
names.py        names of jobs
search.py       trials that Optuna suggests
space.py        the space of a search
"""

from charlm.sweep.engine import Engine, Ray, Slurm, work
from charlm.sweep.job import Job
from charlm.sweep.names import names
from charlm.sweep.pool import Pool
from charlm.sweep.sweep import Grid, run_jobs

__all__ = ["Engine", "Grid", "Job", "Pool", "Ray", "Slurm", "names", "run_jobs", "work"]
