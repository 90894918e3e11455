"""Uploaded and produced files: their bytes in a folder, what is known of them in the batches' database.

A file's bytes are complete before its row exists: a row without bytes, or half a file, is never seen.
"""

import os
import secrets
import sqlite3
import time
from pathlib import Path

from msgspec import Struct

from shoal.storage.database import prepare_folder


class StoredFile(Struct, kw_only=True):
    """What is known of a file."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    """Unix time in seconds."""
    expires_at: int | None = None


class FileStore:
    """The files' folder and rows. Rows are read and written within the caller's transaction."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file are; ``file_id`` is one of ours."""
        return self._folder / file_id

    def begin(self) -> Path:
        """A path to write the bytes of a new file to."""
        prepare_folder(self._folder)
        return self._folder / f"partial-{secrets.token_hex(12)}"

    def keep(
        self,
        connection: sqlite3.Connection,
        partial: Path,
        *,
        tenant: str,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
    ) -> StoredFile:
        """Makes the bytes at ``partial`` a file."""
        now = int(time.time())
        file = StoredFile(
            id=f"file-{secrets.token_hex(12)}",
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            bytes=partial.stat().st_size,
            created_at=now,
            expires_at=None if expires_after_s is None else now + expires_after_s,
        )
        _make_durable(partial)
        partial.rename(self.path(file.id))
        connection.execute(
            "INSERT INTO files (id, tenant, filename, purpose, bytes, created_at, expires_at)"
            " VALUES (:id, :tenant, :filename, :purpose, :bytes, :created_at, :expires_at)",
            {name: getattr(file, name) for name in file.__struct_fields__},
        )
        return file

    def find(self, connection: sqlite3.Connection, tenant: str, file_id: str) -> StoredFile | None:
        """A file of the tenant that has not expired."""
        row = connection.execute(
            "SELECT id, tenant, filename, purpose, bytes, created_at, expires_at FROM files"
            " WHERE tenant = ? AND id = ? AND (expires_at IS NULL OR expires_at > ?)",
            (tenant, file_id, time.time()),
        ).fetchone()
        return None if row is None else StoredFile(**row)

    def list(
        self,
        connection: sqlite3.Connection,
        tenant: str,
        *,
        purpose: str | None,
        after: str | None,
        descending: bool,
        limit: int,
    ) -> list[StoredFile]:
        """The tenant's files by age, those behind ``after``."""
        direction, beyond = ("DESC", "<") if descending else ("ASC", ">")
        rows = connection.execute(
            "SELECT id, tenant, filename, purpose, bytes, created_at, expires_at FROM files"
            " WHERE tenant = :tenant AND (expires_at IS NULL OR expires_at > :now)"
            " AND (:purpose IS NULL OR purpose = :purpose)"
            f" AND (:after IS NULL OR rowid {beyond} (SELECT rowid FROM files WHERE id = :after))"
            f" ORDER BY rowid {direction} LIMIT :limit",
            {"tenant": tenant, "now": time.time(), "purpose": purpose, "after": after, "limit": limit},
        )
        return [StoredFile(**row) for row in rows]

    def delete(self, connection: sqlite3.Connection, tenant: str, file_id: str) -> bool:
        """Whether there was such a file."""
        gone = connection.execute("DELETE FROM files WHERE tenant = ? AND id = ?", (tenant, file_id)).rowcount
        if gone:
            self.path(file_id).unlink(missing_ok=True)
        return bool(gone)

    def sweep(self, connection: sqlite3.Connection, partial_age_s: float = 86_400.0) -> None:
        """Removes expired files, and bytes that no row names any more."""
        expired = connection.execute(
            "SELECT tenant, id FROM files WHERE expires_at <= ?", (time.time(),)
        ).fetchall()
        for row in expired:
            self.delete(connection, row["tenant"], row["id"])
        if not self._folder.is_dir():
            return
        known = {row["id"] for row in connection.execute("SELECT id FROM files")}
        for path in self._folder.iterdir():
            if path.name not in known and path.stat().st_mtime < time.time() - partial_age_s:
                path.unlink(missing_ok=True)


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
