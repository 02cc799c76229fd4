"""Files of repositories on the Hugging Face hub: hf://datasets/OWNER/NAME@REVISION/PATH.

They are read at their https:// addresses, with the token of `hf auth login` or ``HF_TOKEN``. The
hub lists them. `huggingface_hub.HfFileSystem` is not used: its ranges do not notice that a file was
replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from pipeline.io.http_files import WebServers, check_status
from pipeline.io.read_only import Place, Store
from pipeline.io.s3 import StorageError

Result = TypeVar("Result")
_KINDS = {"datasets/": "dataset", "spaces/": "space", "models/": "model", None: "model"}


def store() -> Store:
    """Return the store of this process."""
    return _Hub()


class _File(NamedTuple):
    """A place in a repository; the path is "" for the repository itself."""

    kind: str
    repository: str
    revision: str
    path: str


def _parsed(uri: str) -> _File:
    """Return what a URI names.

    Raises:
        StorageError: It names no repository.
    """
    found = re.fullmatch(
        r"hf://(datasets/|spaces/|models/)?([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", uri
    )
    if found is None:
        raise StorageError(
            f"{uri} names no repository; write hf://datasets/OWNER/NAME/PATH, for a model "
            "hf://OWNER/NAME/PATH, and @REVISION behind NAME for a branch, tag or commit"
        )
    kind, repository, revision, path = found.groups()
    return _File(_KINDS[kind], repository, unquote(revision or "main"), (path or "").strip("/"))


class _Hub(WebServers):
    """A `Store` of the hub's repositories."""

    def __init__(self):
        super().__init__()
        from huggingface_hub import HfApi

        self._api = HfApi()

    def look(self, uri: str) -> Place:
        file = _parsed(uri)
        if file.path:
            try:
                return super().look(uri)
            except FileNotFoundError:
                if not self._tree(uri, recursive=False):
                    raise
        elif not self._tree(uri, recursive=False):
            raise FileNotFoundError(f"no such repository or revision: {uri}")
        return Place(0, "", is_folder=True)

    def list_files(self, uri: str, recursive: bool) -> list[str]:
        file = _parsed(uri)
        plain = uri.rstrip("/")
        root = plain[: len(plain) - len(file.path)].rstrip("/")
        return [
            f"{root}/{one.path}"
            for one in self._tree(uri, recursive)
            if type(one).__name__ == "RepoFile"
        ]

    def _tree(self, uri: str, recursive: bool) -> list[Any]:
        """Return the files and folders below a place; none where there is no such folder."""
        file = _parsed(uri)

        def ask() -> list[Any]:
            found = self._api.list_repo_tree(
                file.repository,
                file.path or None,
                recursive=recursive,
                revision=file.revision,
                repo_type=file.kind,
            )
            return list(found)

        try:
            return _asked(ask)
        except FileNotFoundError:
            return []

    def _request(self, uri: str) -> tuple[str, dict[str, str]]:
        from huggingface_hub import constants, get_token, hf_hub_url

        if constants.HF_HUB_OFFLINE:
            raise StorageError(f"{uri}: HF_HUB_OFFLINE is set, so the hub is not asked")
        file, token = _parsed(uri), get_token()
        address = hf_hub_url(
            file.repository,
            file.path,
            repo_type=file.kind,
            revision=file.revision,
            endpoint=self._api.endpoint,
        )
        return quote(address, safe=":/%"), {"Authorization": f"Bearer {token}"} if token else {}


def _asked(ask: Callable[[], Result]) -> Result:
    """Call the hub's client; raise its errors as the OSErrors that `s3.is_transient` knows."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return ask()
    except HfHubHTTPError as error:
        response = error.response
        check_status(response.status_code, getattr(response, "reason_phrase", ""))
        raise
    except Exception as error:
        # of any kind: a connection's errors are those of httpx or httpx2, by the client's version,
        # and have no common base with OSError
        if type(error).__module__.partition(".")[0].startswith("httpx"):
            raise ConnectionError(str(error)) from error
        raise
