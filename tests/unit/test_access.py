"""Keys, CORS flags and certificates: what is read, and the one line that each mistake gets."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
from server import needed_program

from shoal import access, config
from shoal.config import SCOPES, ApiKey, Settings
from shoal.errors import FlagError

NOTHING: dict[str, str] = {}


def write(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "keys.toml"
    path.write_text(text)
    path.chmod(mode)
    return f"@{path}"


def fault(given: list[str], environment: dict[str, str] | None = None) -> str:
    with pytest.raises(FlagError) as caught:
        access.read_keys(given, environment or NOTHING)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_keys_come_from_the_flag_and_the_environment() -> None:
    keys = access.read_keys(["sk-one"], {"SHOAL_API_KEYS": "sk-two, sk-three\nsk-one"}).keys
    assert [key.digest for key in keys] == [access.digest_of(text) for text in ("sk-one", "sk-two", "sk-three")]
    assert all(key.scopes == SCOPES for key in keys)


def test_a_keys_name_does_not_depend_on_the_others_and_does_not_tell_the_key() -> None:
    alone = access.read_keys(["sk-two"], NOTHING).keys[0].name
    assert access.read_keys(["sk-one", "sk-two"], NOTHING).keys[1].name == alone
    assert "sk-two" not in alone
    assert alone.removeprefix("key-") not in access.digest_of("sk-two")


def test_a_file_of_keys(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"sk-b").hexdigest()
    at = write(
        tmp_path,
        f"""
        [[key]]
        name = "team-a"
        key = "sk-a"
        scopes = ["inference", "metrics"]
        max_concurrent = 4
        requests_per_minute = 60
        tokens_per_minute = 10000
        priority = 0
        [[key]]
        name = "b@example"
        digest = "sha256:{digest.upper()}"
        """,
    )
    keys = access.read_keys([at], NOTHING)
    assert keys.warnings == ()
    assert keys.keys == (
        ApiKey(
            name="team-a",
            digest=access.digest_of("sk-a"),
            scopes=("inference", "metrics"),
            max_concurrent=4,
            requests_per_minute=60,
            tokens_per_minute=10000,
            priority=0,
        ),
        ApiKey(name="b@example", digest=digest),
    )
    assert access.read_keys([], {"SHOAL_API_KEYS": at}) == keys


@pytest.mark.parametrize(("mode", "line", "warns"), [(0o644, 'key = "k"', True), (0o640, 'key = "k"', False)])
def test_a_file_that_everybody_may_read_is_warned_of(tmp_path: Path, mode: int, line: str, warns: bool) -> None:
    at = write(tmp_path, f'[[key]]\nname = "a"\n{line}\n', mode)
    warnings = access.read_keys([at], NOTHING).warnings
    assert bool(warnings) == warns
    assert all("chmod o-r" in warning for warning in warnings)


def test_a_file_of_digests_may_be_read(tmp_path: Path) -> None:
    at = write(tmp_path, f'[[key]]\nname = "a"\ndigest = "{"0" * 64}"\n', 0o644)
    assert access.read_keys([at], NOTHING).warnings == ()


def test_two_keys_of_one_name_are_one_tenant_with_one_set_of_limits(tmp_path: Path) -> None:
    def entry(key: str, limit: int) -> str:
        return f'[[key]]\nname = "a"\nkey = "{key}"\nmax_concurrent = {limit}\n'

    keys = access.read_keys([write(tmp_path, entry("old", 3) + entry("new", 3))], NOTHING).keys
    assert [key.name for key in keys] == ["a", "a"]
    assert "different limits" in fault([write(tmp_path, entry("old", 3) + entry("new", 4))])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "required field `key`"),
        ("key = []", "length >= 1"),
        ("[[key]]\nkey = 'x'", "required field `name`"),
        ("[[key]]\nname = 'a'", "key a: give either key or digest"),
        ("[[key]]\nname = 'a'\nkey = 'x'\ndigest = 'y'", "give either key or digest"),
        ("[[key]]\nname = 'a'\ndigest = 'abc'", "64 hexadecimal digits"),
        ("[[key]]\nname = 'a'\nkey = 'with space'", "printable ASCII without spaces"),
        ("[[key]]\nname = 'a b'\nkey = 'x'", "the name 'a b' must be"),
        ("[[key]]\nname = 'a'\nkey = 'x'\nscopes = []", "length >= 1"),
        ("[[key]]\nname = 'a'\nkey = 'x'\nscopes = ['root']", "Invalid enum value 'root'"),
        ("[[key]]\nname = 'a'\nkey = 'x'\nmax_concurrent = -1", ">= 0"),
        ("[[key]]\nname = 'a'\nkey = 'x'\nrate = 5", "unknown field `rate`"),
        ("[[key]]\nname = 'a'\nkey = 'x'\n[[key]]\nname = 'b'\nkey = 'x'", "a and b are the same key"),
        ("name = ", "not TOML"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, words: str) -> None:
    assert words in fault([write(tmp_path, text)])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in fault([f"@{tmp_path}/none"])
    assert "SHOAL_API_KEYS" in fault([], {"SHOAL_API_KEYS": f"@{tmp_path}/none"})


def test_the_settings_file_has_no_key_in_plain(tmp_path: Path) -> None:
    keys = access.read_keys(["sk-very-secret"], NOTHING).keys
    config.save(Settings(model="m", model_name="m", run_dir="/", api_keys=keys), tmp_path / "settings.json")
    assert b"sk-very-secret" not in (tmp_path / "settings.json").read_bytes()
    assert config.load(tmp_path / "settings.json").api_keys == keys


# --- CORS ------------------------------------------------------------------------------------------------


def cors(**changes: Any) -> dict[str, Any]:
    plain = {"allow_origins": (), "allow_credentials": False, "allow_methods": ("*",), "allow_headers": ("*",)}
    return plain | changes


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "https://a.example",
        "http://localhost:3000",
        "http://[::1]:80",
        "chrome-extension://abcdef",
        "app://obsidian.md",
    ],
)
def test_origins(origin: str) -> None:
    access.check_origins(cors(allow_origins=(origin,)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"allow_origins": ("https://a.example/",)}, "--allow_origins https://a.example/: an origin is"),
        ({"allow_origins": ("a.example",)}, "an origin is"),
        ({"allow_origins": ("null",)}, "an origin is"),
        ({"allow_origins": ("*",), "allow_credentials": True}, "--allow_credentials: name the pages"),
        ({"allow_credentials": True}, "--allow_credentials: name the pages"),
        ({"allow_methods": ("GET,POST",)}, "--allow_methods GET,POST"),
        ({"allow_headers": ("X Y",)}, "--allow_headers X Y"),
    ],
)
def test_cors_flags_that_make_no_sense(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FlagError, match=None) as caught:
        access.check_origins(cors(**changes))
    assert words in str(caught.value)


# --- TLS -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two self-signed certificates, their keys, and one key with a passphrase."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("one", "two"):
        run(
            folder,
            f"req -x509 -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.pem -days 2 -subj /CN=localhost",
        )
    run(folder, "rsa -aes128 -passout pass:secret -in one.key -out locked.key")
    return folder


def run(folder: Path, command: str) -> None:
    subprocess.run([needed_program("openssl"), *command.split()], cwd=folder, check=True, capture_output=True)


def tls(keyfile: object = None, certfile: object = None, ssl: bool | None = True) -> dict[str, Any]:
    return {
        "ssl": ssl,
        "ssl_keyfile": str(keyfile) if keyfile else None,
        "ssl_certfile": str(certfile) if certfile else None,
    }


def test_no_tls_is_the_default() -> None:
    assert access.tls_files(tls(ssl=None), {"SSL_KEYFILE": "/k", "SSL_CERTFILE": "/c"}) == ("", "")


def test_files_by_flag_or_environment(certificates: Path) -> None:
    key, certificate = str(certificates / "one.key"), str(certificates / "one.pem")
    expected = (key, certificate)
    assert access.tls_files(tls(key, certificate), NOTHING) == expected
    assert access.tls_files(tls(key, certificate, ssl=None), NOTHING) == expected
    assert access.tls_files(tls(), {"SSL_KEYFILE": key, "SSL_CERTFILE": certificate}) == expected
    assert access.tls_files(tls(key), {"SSL_KEYFILE": "/x", "SSL_CERTFILE": certificate}) == expected


@pytest.mark.parametrize(
    ("key", "certificate", "words"),
    [
        ("", "one.pem", "--ssl_keyfile is missing"),
        ("one.key", "", "--ssl_certfile is missing"),
        ("none.key", "one.pem", "--ssl_keyfile"),
        ("one.key", "two.pem", "the key does not belong to the certificate"),
        ("one.pem", "one.key", "not a PEM certificate and its key"),
        ("locked.key", "one.pem", "has a passphrase"),
    ],
)
def test_files_that_cannot_be_used(certificates: Path, key: str, certificate: str, words: str) -> None:
    given = tls(key and certificates / key, certificate and certificates / certificate)
    with pytest.raises(FlagError) as caught:
        access.tls_files(given, NOTHING)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
