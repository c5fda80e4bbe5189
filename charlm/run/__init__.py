"""One run: its folder, its record, its figures, and how it continues.

folder.py      one process at a time writes in a run folder; a new run gets a free one
record.py      run.json: settings, corpus, environment and status of a run, from its first second
results.py     results.json, losses.f32 and validations.csv: their formats
table.py       many runs as the rows of a table
overrides.py   overrides in Hydra's grammar: parsed, quoted
trust.py       allow-list for recorded settings, since a folder may come from a stranger
resume.py      configs of resume=RUN and rerun=RUN
reproduce.py   train a run again and compare bit by bit
"""
