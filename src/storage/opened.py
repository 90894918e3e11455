"""The stores of one server."""

from pathlib import Path

from msgspec import Struct

from shoal.storage import responses
from shoal.storage.batches import open_database
from shoal.storage.database import Database
from shoal.storage.files import FileStore
from shoal.storage.session_store import SessionStore


class Storage(Struct, frozen=True):
    """Each process has its own; nothing is opened before its first use."""

    batches: Database
    """Also holds the files' rows."""
    files: FileStore
    responses: Database
    sessions: SessionStore


def open_storage(data_dir: str, session_store: str = "", session_ttl_s: float = 0.0) -> Storage:
    """The stores in ``--data_dir``, but for the sessions where ``--session_store`` names another file."""
    folder = Path(data_dir)
    return Storage(
        open_database(data_dir),
        FileStore(folder / "files"),
        responses.open_database(data_dir),
        SessionStore(Path(session_store) if session_store else folder / "sessions.sqlite", session_ttl_s),
    )
