"""The chat in a terminal: ``bin/api_client URL``, ``shoal serve api_client URL``."""
