"""What outlives the processes: SQLite files and uploads under ``--data_dir``. Imports nothing of the server but config
and errors; used by the frontends and by the batches' process."""
