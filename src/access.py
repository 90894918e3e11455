"""Who may call the server, from where, and with which certificate: flags, files and the environment to settings.

Called by ``launch.py``; every mistake is a ``FlagError``. The frontends use ``digest_of`` and ``tls_context`` too.
"""

import hashlib
import os
import re
import ssl
import stat
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import msgspec
from msgspec import Meta, Struct

from shoal.config import SCOPES, ApiKey, Scope
from shoal.errors import FlagError

KEYS_VARIABLE: Final = "SHOAL_API_KEYS"
"""Keys, separated by white space or commas; ``@FILE`` works here too."""
_KEY: Final = re.compile(r"[!-~]+")
_NAME: Final = re.compile(r"[\w.@-]{1,64}", re.ASCII)
_DIGEST: Final = re.compile(r"(?:sha256:)?([0-9a-f]{64})", re.IGNORECASE)
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://(?:[\w.-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?", re.IGNORECASE)
_TOKEN: Final = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
_NAME_DIGITS: Final = 8


class Keys(Struct, frozen=True):
    """What is known of the keys."""

    keys: tuple[ApiKey, ...]
    warnings: tuple[str, ...] = ()


class _Entry(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One ``[[key]]`` of a file of keys."""

    name: str
    key: str | None = None
    digest: str | None = None
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)] = SCOPES
    max_concurrent: Annotated[int, Meta(ge=0)] = 0
    requests_per_minute: Annotated[int, Meta(ge=0)] = 0
    tokens_per_minute: Annotated[int, Meta(ge=0)] = 0
    priority: int | None = None


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    """A file of keys."""

    key: Annotated[tuple[_Entry, ...], Meta(min_length=1)]


def digest_of(key: str) -> str:
    """What is kept of a key: SHA-256, hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(given: Sequence[str], environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of ``--api_keys`` and of SHOAL_API_KEYS. Raises FlagError."""
    named = [("--api_keys", word) for word in given]
    named += [(KEYS_VARIABLE, word) for word in environment.get(KEYS_VARIABLE, "").replace(",", " ").split()]
    keys: list[ApiKey] = []
    warnings: list[str] = []
    for source, word in named:
        if not word.startswith("@"):
            keys.append(_plain_key(source, word))
            continue
        path = Path(word[1:])
        entries = _read_file(source, path)
        keys += (_key_of(f"{source} {word}", entry) for entry in entries)
        if any(entry.key for entry in entries) and path.stat().st_mode & stat.S_IROTH:
            warnings.append(f"{path} has keys in plain and everybody may read it: chmod o-r {path}")
    return Keys(_without_repeats(keys), tuple(warnings))


def check_origins(values: Mapping[str, Any]) -> None:
    """The CORS flags make sense, each and together. Raises FlagError."""
    origins: Sequence[str] = values["allow_origins"]
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise FlagError(
                f"--allow_origins {origin}: an origin is SCHEME://HOST or SCHEME://HOST:PORT without a path, or *"
            )
    if values["allow_credentials"] and (not origins or "*" in origins):
        raise FlagError(
            "--allow_credentials: name the pages that may send credentials in --allow_origins; with * any page "
            "could act in the name of whoever opens it"
        )
    for flag in ("allow_methods", "allow_headers"):
        wrong = next((value for value in values[flag] if not _TOKEN.fullmatch(value)), None)
        if wrong is not None:
            raise FlagError(f"--{flag} {wrong}: give names, separated by spaces, or *")


def tls_files(values: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Paths of the key and of the certificate, checked; both empty without TLS. Raises FlagError."""
    if not (values["ssl"] or values["ssl_keyfile"] or values["ssl_certfile"]):
        return "", ""
    paths = []
    for flag in ("ssl_keyfile", "ssl_certfile"):
        path = values[flag] or environment.get(flag.upper(), "")
        if not path:
            raise FlagError(f"--ssl: --{flag} is missing; give it, or set {flag.upper()}")
        paths.append(str(Path(path).absolute()))
        _check_readable(flag, paths[-1])
    tls_context(*paths)
    return paths[0], paths[1]


def tls_context(keyfile: str, certfile: str) -> ssl.SSLContext:
    """A server's side of TLS 1.2 and newer. Raises FlagError where the files do not belong together."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certfile, keyfile, password=lambda: _refuse_passphrase(keyfile))
    except ssl.SSLError as error:
        what = "the key does not belong to the certificate" if error.reason == "KEY_VALUES_MISMATCH" else (
            f"not a PEM certificate and its key ({error.reason or error})"
        )  # fmt: skip
        raise FlagError(f"--ssl_certfile {certfile}, --ssl_keyfile {keyfile}: {what}") from None
    return context


def _check_readable(flag: str, path: str) -> None:
    try:
        with open(path, "rb"):
            return
    except OSError as error:
        raise FlagError(f"--{flag} {path}: {error.strerror}") from None


def _refuse_passphrase(keyfile: str) -> NoReturn:
    raise FlagError(
        f"--ssl_keyfile {keyfile}: has a passphrase; give a key without one (openssl pkey -in … -out …)"
    )


def _plain_key(source: str, word: str) -> ApiKey:
    """Named after itself, so that who a tenant is does not depend on the order of the keys."""
    if not _KEY.fullmatch(word):
        raise FlagError(f"{source}: a key must be printable ASCII without spaces")
    name = hashlib.sha256(f"name of {word}".encode()).hexdigest()[:_NAME_DIGITS]
    return ApiKey(name=f"key-{name}", digest=digest_of(word))


def _read_file(source: str, path: Path) -> tuple[_Entry, ...]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert(content, _File).key
    except OSError as error:
        raise FlagError(f"{source} @{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FlagError(f"{source} @{path}: not TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise FlagError(f"{source} @{path}: {error}") from None


def _key_of(where: str, entry: _Entry) -> ApiKey:
    if not _NAME.fullmatch(entry.name):
        raise FlagError(f"{where}: the name {entry.name!r} must be 1 to 64 letters, digits or . _ @ -")
    return ApiKey(
        name=entry.name,
        digest=_digest_in(f"{where}: key {entry.name}", entry),
        scopes=tuple(dict.fromkeys(entry.scopes)),
        max_concurrent=entry.max_concurrent,
        requests_per_minute=entry.requests_per_minute,
        tokens_per_minute=entry.tokens_per_minute,
        priority=entry.priority,
    )


def _digest_in(where: str, entry: _Entry) -> str:
    if (entry.key is None) == (entry.digest is None):
        raise FlagError(f"{where}: give either key or digest")
    if entry.key is not None:
        if not _KEY.fullmatch(entry.key):
            raise FlagError(f"{where}: the key must be printable ASCII without spaces")
        return digest_of(entry.key)
    found = _DIGEST.fullmatch(entry.digest or "")
    if found is None:
        raise FlagError(f"{where}: digest must be the SHA-256 of the key, 64 hexadecimal digits")
    return found[1].lower()


def _without_repeats(keys: Iterable[ApiKey]) -> tuple[ApiKey, ...]:
    """Two keys of one name are one tenant, so that a key can be changed without a gap; one key has one owner."""
    by_digest: dict[str, ApiKey] = {}
    by_name: dict[str, ApiKey] = {}
    for key in keys:
        same = by_digest.setdefault(key.digest, key)
        if same != key:
            raise FlagError(
                f"--api_keys: {same.name} and {key.name} are the same key with different properties"
            )
        other = by_name.setdefault(key.name, key)
        if _limits(other) != _limits(key):
            raise FlagError(
                f"--api_keys: the keys named {key.name} have different limits; they are one tenant's"
            )
    return tuple(by_digest.values())


def _limits(key: ApiKey) -> tuple[int | None, ...]:
    return (key.max_concurrent, key.requests_per_minute, key.tokens_per_minute, key.priority)
