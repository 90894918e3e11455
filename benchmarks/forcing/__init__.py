"""What ``quality.py`` compares models with: a text, teachers that put it through a model, and scores."""
