"""Tool calls: how each family of models spells them, and how they are read back. ``turn.py`` puts it together."""
