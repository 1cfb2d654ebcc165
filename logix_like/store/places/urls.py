"""Places by URL: which object store a URL names."""

from __future__ import annotations

import functools
import os
import re
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

from logix_like.errors import ConfigError, MissingDependencyError
from logix_like.store.places.storage import ObjectPath, Place

SCHEMES = ("file", "memory", "s3")
"""Kinds of URLs that are understood: those that are tested."""

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.ASCII)


def place_of_url(url: str) -> Place:
    """The place that a URL names: ``s3://bucket/key``, ``memory://name/key``, ``file:///folder``, ...

    Credentials come from the usual environment of each service, never from the URL: it is printed and stored.

    Raises:
        ConfigError: The URL names no known kind of storage, or holds a password or a query.
        MissingDependencyError: obstore is not installed.
    """
    scheme, bucket, key = split_url(url)
    if scheme == "file":
        return Path(f"/{key}")
    root = f"{scheme}://{bucket}"
    files = _memory(root) if scheme == "memory" else _remote(root)
    return ObjectPath(root, key, files)


def split_url(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and key of a URL; :class:`ConfigError` if it cannot name a store."""
    match = _URL.match(url)
    if match is None or match[1] not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ConfigError(f"{_shown(url)!r} names no storage that is known; known are folders and {known}")
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"{_shown(url)!r} holds more than a bucket and a key; credentials are taken from the environment "
            "(AWS_ACCESS_KEY_ID, AWS_PROFILE, ...), since a URL is printed and stored"
        )
    key = unquote(parts.path).strip("/") if match[1] == "file" else parts.path.strip("/")
    if any(part in ("", ".", "..") for part in key.split("/")) and key:
        raise ConfigError(f"{url!r} has a part that is empty, '.' or '..'; give the plain key")
    if match[1] == "file" and parts.netloc not in ("", "localhost"):
        raise ConfigError(f"{url!r} names another machine; a file's URL has three slashes: file:///folder")
    if match[1] != "file" and not parts.netloc:
        raise ConfigError(f"{url!r} names no bucket; give {match[1]}://bucket/key")
    return match[1], parts.netloc, key


def require_no_url(path: str | PathLike[str]) -> None:
    """Refuse ``s3:/bucket/key``, which is what a :class:`~pathlib.Path` makes of a URL: it would be a folder here."""
    scheme, _, rest = os.fspath(path).partition(":/")
    if scheme in SCHEMES:
        raise ConfigError(
            f"{os.fspath(path)!r} is a URL that has lost a slash, as in a Path; give it as text: '{scheme}://"
            f"{rest.lstrip('/')}'"
        )


def _shown(url: str) -> str:
    """The URL without what may be secret."""
    return re.sub(r"//[^/]*@", "//...@", url).partition("?")[0]


@functools.cache
def _memory(root: str) -> Any:
    """The storage of this process by that name; it lives as long as the process."""
    from logix_like.store.places.objects import ObjectFiles

    return ObjectFiles(_obstore().store.MemoryStore())


def _remote(root: str) -> Any:
    from logix_like.store.places.objects import ObjectFiles

    obstore, options = _obstore(), dict[str, Any]()
    if root.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        if endpoint.startswith("http://"):
            options["client_options"] = {"allow_http": True}
        if endpoint:
            options["endpoint"] = endpoint
        if "AWS_PROFILE" in os.environ:
            options["credential_provider"] = _profile()
    try:
        return ObjectFiles(obstore.store.from_url(root, **options))
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise ConfigError(f"{root!r} cannot be used: {str(error).splitlines()[0]}") from error


def _obstore() -> ModuleType:
    try:
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise MissingDependencyError(
            "stores by URL need obstore, which is not installed; run: pip install 'logix_like[s3]'"
        ) from error
    return obstore


def _profile() -> Any:
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise MissingDependencyError(
            "AWS_PROFILE is set, and reading profiles needs boto3, which is not installed; run: pip install boto3, "
            "or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    return Boto3CredentialProvider()
