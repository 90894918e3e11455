"""The supervisor: starts the ranks, the scheduler and the frontends, starts again what dies, ends them all.

``main.serve`` is called by ``cli.py`` with a prepared ``Launch``.
"""
