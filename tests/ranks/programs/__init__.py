"""Programs that people run, by subject: each is a function that gives what its user sees.

A program is put into a file of this folder, under `registry.program`; no list names it. With the
plugin a rank must see what the same rank sees without it: `judging` compares, test_programs.py
runs them all, and ``python tests/ranks/run.py NAME`` those whose names have NAME in them.

`models` has the models, `common` the loops of mlx-lm over one of them and the usual samplers.
"""
