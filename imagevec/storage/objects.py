"""Object stores: S3, Google Cloud Storage and Azure Blob Storage, through obstore.

Credentials come from the environment, the machine or the cluster, as the store's own tools find
them; profiles in ``~/.aws`` are read with boto3, if it is installed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyarrow import fs

from imagevec.files import expanded
from imagevec.storage.location import Location, UnsupportedURIError
from imagevec.storage.stores import (
    CONNECT_SECONDS,
    REQUEST_SECONDS,
    Entry,
    SettingsError,
    Stream,
    buffered,
    save,
)

_CHUNK_BYTES = 1 << 20
_PART_BYTES = 16 << 20  # of an upload, which has at most 10,000 on S3
_PARTS_AT_ONCE = 4
_DELETED_AT_ONCE = 1000
_CLIENT = {
    "connect_timeout": f"{CONNECT_SECONDS}s",
    "read_timeout": f"{REQUEST_SECONDS}s",
    "timeout": "1h",  # of a whole file; a stalled one ends earlier
}
_NO_RETRIES = {"max_retries": 0}  # retry.py does it, for all stores

# What a store says about a key that does not exist. Any other 404, of a bucket that does not exist
# or a server that is not an object store, says nothing about the key.
_NO_SUCH_KEY = re.compile(r"NoSuchKey|BlobNotFound|PathNotFound|CannotVerifyCopySource")
_NO_SUCH_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|The specified bucket does not exist")
_DENIED_ERRORS = ("PermissionDeniedError", "UnauthenticatedError")
_DENIED = re.compile(r"status code: 40[13]\b")
# Left unquoted in URIs, besides letters and digits.
_PLAIN = "/ !\"$&'()*+,-.:;<=>@[]^_`{|}~#"

_NAME = re.compile(r"[\w$.-]+", re.ASCII)
_S3_SETTINGS = {"region", "endpoint_override", "scheme", "anonymous", "session_token"}
_AZURE_HOST = re.compile(
    r"(?P<container>[\w$-]+)@(?P<account>\w+)\.(?:dfs|blob)\.(?P<suffix>[\w.-]+)", re.ASCII
)


def client_key(location: Location) -> tuple[str, ...]:
    return location.host, location.query


def store_of(location: Location) -> ObjectStore:
    if not location.host:
        raise UnsupportedURIError(f"the URI has no bucket or host after {location.scheme}://")
    # strict_parsing rejects other queries: they belong to keys with an unquoted question mark.
    query = location.query
    settings = dict(urllib.parse.parse_qsl(query, strict_parsing=bool(query)))
    user, _, bucket = location.host.rpartition("@")
    if not _NAME.fullmatch(bucket):
        raise UnsupportedURIError(f"{bucket!r} is not the name of a bucket")
    if location.store_scheme == "s3":
        return ObjectStore(_s3(bucket, user, settings))
    _check_known(settings, set())
    if location.store_scheme == "gs":
        return ObjectStore(_gs(bucket, user))
    return ObjectStore(_azure(location))


def _s3(bucket: str, user: str, settings: dict[str, str]) -> Any:
    from obstore.store import S3Store

    _check_known(settings, _S3_SETTINGS)
    key, _, secret = (urllib.parse.unquote(part) for part in user.partition(":"))
    if bool(key) != bool(secret):
        raise SettingsError("the URI has an access key without a secret: s3://KEY:SECRET@bucket")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if "endpoint_override" in settings:
        endpoint = f"{settings.get('scheme', 'https')}://{settings['endpoint_override']}"
    given: dict[str, Any] = {"aws_endpoint_url_s3": _checked(endpoint)} if endpoint else {}
    given |= {"access_key_id": key, "secret_access_key": secret} if key else {}
    if "session_token" in settings:
        given["session_token"] = settings["session_token"]
    if settings.get("anonymous", "").lower() in ("true", "1"):
        given["skip_signature"] = True
    elif not key and _has_profile():
        given["credential_provider"] = _boto3_credentials()
    region = settings.get("region") or _environment("AWS_REGION", "AWS_DEFAULT_REGION")
    if region and not _NAME.fullmatch(region):
        raise UnsupportedURIError(f"{region!r} is not the name of a region")
    given["region"] = region or ("us-east-1" if endpoint else _region_of(bucket))
    return _made(S3Store, bucket, **given)


def _region_of(bucket: str) -> str:
    """Asks S3, which answers anybody."""
    try:
        region: str = fs.resolve_s3_region(bucket)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or "not found" in str(error):
            raise SettingsError(f"the bucket {bucket!r} does not exist") from error
        raise
    return region


def _gs(bucket: str, user: str) -> Any:
    from obstore.store import GCSStore

    # As Google's own clients name it, for an emulator.
    endpoint = os.environ.get("STORAGE_EMULATOR_HOST")
    given: dict[str, Any] = {"base_url": _checked(endpoint)} if endpoint else {}
    if endpoint or user == "anonymous":
        given["skip_signature"] = True
    return _made(GCSStore, bucket, **given)


def _azure(location: Location) -> Any:
    """Takes ``abfss://container@account.dfs.core.windows.net/...`` or ``az://container/...``."""
    from obstore.store import AzureStore

    given = _connection_string(os.environ.get("AZURE_STORAGE_CONNECTION_STRING", ""))
    host = _AZURE_HOST.fullmatch(location.host)
    if host is None:
        return _made(AzureStore, location.host, **given)
    if given.get("account_name") != host["account"]:  # the settings are those of another one
        given = {"account_name": host["account"]}
    if "endpoint" not in given and host["suffix"] != "core.windows.net":  # another cloud
        given["endpoint"] = f"https://{host['account']}.blob.{host['suffix']}"
    return _made(AzureStore, host["container"], **given)


def _connection_string(text: str) -> dict[str, Any]:
    parts = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
    names = {
        "AccountName": "account_name",
        "AccountKey": "account_key",
        "SharedAccessSignature": "sas_key",
        "BlobEndpoint": "endpoint",
    }
    return {names[name]: value for name, value in parts.items() if name in names}


def _made(kind: Any, bucket: str, **given: Any) -> Any:
    endpoint = str(next((given[name] for name in given if "endpoint" in name), ""))
    is_plain = endpoint.startswith("http:") or str(given.get("base_url", "")).startswith("http:")
    client = {**_CLIENT, "allow_http": is_plain}
    try:
        return kind(bucket, client_options=client, retry_config=_NO_RETRIES, **given)
    except Exception as error:  # settings that do not fit together, or a file that is missing
        raise SettingsError(f"the client cannot be created: {_first_line(error)}") from error


def _check_known(settings: dict[str, str], known: set[str]) -> None:
    for name in settings.keys() - known:
        raise UnsupportedURIError(f"the setting {name!r} is not known: use {sorted(known)}")


def _checked(endpoint: str) -> str:
    """Returns an endpoint's URL. The client would panic on another text."""
    try:
        parts = urllib.parse.urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or re.search(r"[^!-~]", endpoint):
        raise SettingsError(f"the endpoint {endpoint!r} is not a URL such as https://host:port")
    return endpoint.rstrip("/")


def _environment(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _has_profile() -> bool:
    """Returns whether credentials are in the files of the AWS command line."""
    if _environment("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        return False
    names = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
    files = [os.environ.get(name) or f"~/.aws/{file}" for name, file in names.items()]
    profile = os.environ.get("AWS_PROFILE")
    return bool(profile) or any(expanded(file).is_file() for file in files)


def _boto3_credentials() -> Callable[[], dict[str, Any]]:
    try:
        import boto3  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError("profiles in ~/.aws need boto3: pip install boto3") from error
    session = boto3.Session()

    def credentials() -> dict[str, Any]:
        found = session.get_credentials()
        if found is None:
            raise SettingsError(f"the AWS profile {session.profile_name!r} has no credentials")
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": getattr(found, "_expiry_time", None),
        }

    return credentials


class ObjectStore:
    def __init__(self, client: Any) -> None:
        self._client = client

    @contextlib.contextmanager
    def stream(
        self, location: Location, roots: tuple[Location, ...] = (), start: int = 0
    ) -> Iterator[Stream]:
        import obstore

        options: Any = {"range": {"offset": start}} if start else {}
        with _errors_of(location):
            result = obstore.get(self._client, location.key, options=options)
        chunks = iter(result.stream(min_chunk_size=_CHUNK_BYTES))
        yield Stream(_reader(chunks), result.meta["size"])

    def open(self, location: Location) -> Any:
        return buffered(lambda start: self.stream(location, start=start))

    def entry(self, location: Location) -> Entry:
        import obstore

        path = location.key.rstrip("/")
        if path and not location.path.endswith("/"):
            with contextlib.suppress(FileNotFoundError), _errors_of(location, has_body=False):
                return _file(location, obstore.head(self._client, path))
        if path and not any(True for _ in self.entries(location)):
            raise FileNotFoundError(f"{location} does not exist")
        return _folder(location, path)

    def entries(self, folder: Location) -> Iterator[Entry]:
        import obstore

        path = folder.key.rstrip("/")
        with _errors_of(folder):
            listed = obstore.list_with_delimiter(self._client, path or None)
        for prefix in listed["common_prefixes"]:
            yield _folder(folder, prefix)
        for item in listed["objects"]:
            if item["path"] != path:  # an empty object that stands for the folder
                yield _file(folder, item)

    def create(self, location: Location, data: bytes) -> None:
        import obstore

        try:
            with _errors_of(location):
                obstore.put(self._client, location.key, data, mode="create")
        except obstore.exceptions.AlreadyExistsError as error:
            raise FileExistsError(f"{location} exists") from error

    def write(self, location: Location, data: bytes) -> None:
        import obstore

        with _errors_of(location):
            obstore.put(self._client, location.key, data, use_multipart=False)

    def upload(self, location: Location, file: Path) -> None:
        import obstore

        with open(file, "rb") as source, _errors_of(location):
            obstore.put(
                self._client,
                location.key,
                source,
                chunk_size=_PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )

    def download(self, location: Location, file: Path) -> None:
        with self.stream(location) as stream:
            save(stream, file)

    def move(self, source: Location, target: Location) -> None:
        import obstore

        with _errors_of(source):
            obstore.copy(self._client, source.key, target.key, overwrite=True)
        self._delete(source, [source.key])

    def delete(self, location: Location) -> None:
        import obstore

        path = location.key.rstrip("/")
        if path:
            self._delete(location, [path])
        with _errors_of(location):
            pages = obstore.list(self._client, path or None, chunk_size=_DELETED_AT_ONCE)
            for page in pages:
                self._delete(location, [item["path"] for item in page])

    def delete_empty(self, location: Location) -> None:
        """Does nothing: folders are the common parts of keys."""

    def _delete(self, location: Location, paths: list[str]) -> None:
        """Deletes objects. Google's and Azure's client raises an error if one does not exist."""
        import obstore

        try:
            with _errors_of(location, has_body=False):
                obstore.delete(self._client, paths)
        except FileNotFoundError:
            for path in paths if len(paths) > 1 else ():  # those that are left
                self._delete(location, [path])


def _reader(chunks: Iterator[bytes]) -> Callable[[int], bytes]:
    """Returns a function that reads from chunks of any size."""
    rest = memoryview(b"")

    def read(size: int) -> bytes:
        nonlocal rest
        if not rest:
            rest = memoryview(bytes(next(chunks, b"")))
        part, rest = bytes(rest[:size]), rest[size:]
        return part

    return read


@contextlib.contextmanager
def _errors_of(location: Location, has_body: bool = True) -> Iterator[None]:
    """Tells a missing key from a store that cannot be used. Other exceptions pass."""
    try:
        yield
    except Exception as error:
        said = str(error)
        name = type(error).__name__
        if name == "InvalidPathError":  # a key with an empty or dot segment
            raise OSError(errno.EINVAL, f"{location}: {_first_line(error)}") from error
        if _NO_SUCH_BUCKET.search(said):
            raise SettingsError(f"the bucket of {location} does not exist") from error
        if isinstance(error, FileNotFoundError):
            if not has_body or _NO_SUCH_KEY.search(said):
                raise FileNotFoundError(f"{location} does not exist") from error
            raise SettingsError(
                f"the endpoint answers 404, but not as an object store: {_first_line(error)}"
            ) from error
        if _DENIED.search(said) or name in _DENIED_ERRORS:
            raise PermissionError(f"access is denied: {_first_line(error)}") from error
        raise


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _folder(beside: Location, path: str) -> Entry:
    place = _at(beside, path)
    return Entry(str(place), path.rstrip("/").rpartition("/")[2] or beside.host, "folder")


def _file(beside: Location, item: Any) -> Entry:
    path: str = item["path"]
    modified = int(item["last_modified"].timestamp() * 1e6)
    return Entry(str(_at(beside, path)), path.rpartition("/")[2], "file", item["size"], modified)


def _at(beside: Location, path: str) -> Location:
    return beside.sibling("/" + urllib.parse.quote(path, safe=_PLAIN) if path else "")
