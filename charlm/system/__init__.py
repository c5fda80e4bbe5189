"""Differences between operating systems, and what charlm does about them.

posix.py     signals, process groups and limits, with what charlm does on Windows instead
streams.py   standard output and error that never end a run
memory.py    failed allocations of Python, NumPy and PyTorch, and the limit that they met
"""
