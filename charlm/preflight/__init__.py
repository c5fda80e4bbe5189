"""Checks of a run's command and settings, made before anything is written.

command.py        one command line -> the command line to run, or one line of error
command_line.py   Hydra's options, parsed
configs.py        overrides -> composed and resolved configs
messages.py       errors of Hydra and OmegaConf as one line of charlm's
settings.py       the settings of one run, checked against each other, the hardware and the text
flags.py          flags of Lightning's Trainer: tested, or refused with the reason

Sweeps have a program of their own: `charlm.sweep.plan`.
"""
