"""`make compat`: what a checkpoint of today does by its own code under other versions of transformers.

versions.txt names the versions, environments.py installs them, written.py writes the checkpoints, abilities.py runs in
each environment, and __main__.py prints the table.
"""
