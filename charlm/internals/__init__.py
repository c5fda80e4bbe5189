"""Private names of other libraries, one file per library; no other module uses one.

Each use has its reason here, and a test in tests/test_internals.py that fails clearly when an upgrade changes it.
"""
