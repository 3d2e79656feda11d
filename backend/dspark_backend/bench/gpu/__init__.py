"""Everything about a GPU that can be checked and measured in one command.

``python -m dspark_backend.bench.gpu_check``: ``stages.py`` runs stages against a deadline and keeps
what they say, ``checks.py`` are those that can fail, ``rates.py`` those that measure.
"""
