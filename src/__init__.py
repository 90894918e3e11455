"""Shoal: an LLM inference server. Read ``messages.py`` first, then docs/design.md."""

__version__ = "0.1.0"
