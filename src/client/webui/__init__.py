"""The gradio page: ``bin/webui URL``, ``shoal serve gradio URL``."""
