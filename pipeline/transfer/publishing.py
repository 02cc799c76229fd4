"""Bundles and exports put into a model hub's repository or a folder, each with its card."""

from __future__ import annotations

import json
import posixpath
import re
import shutil
from pathlib import Path

from safetensors.torch import save_file

from pipeline.checkpoints import bundle
from pipeline.checkpoints.export_folder import EXPORTED
from pipeline.io import atomic_folder, places, storage
from pipeline.io.wording import plural
from pipeline.prepare import lerobot_export
from pipeline.report import model_card

BESIDE_README = "MODEL_CARD.md"
"""Name of the card where the kind of export has a README.md of its own."""
HUB = "hf-hub:"
"""Prefix of a repository of the Hugging Face hub, as in a job."""
OLD_HUB = "hf:"
"""The same in commands of earlier versions."""


def write_card(uri: str, folder: str) -> None:
    """Write a bundle's card into the folder of an export; an export that is a file has none."""
    if storage.is_dir(folder):
        is_taken = storage.exists(storage.join(folder, model_card.FILE))
        name = BESIDE_README if is_taken else model_card.FILE
        files = [posixpath.basename(file) for file in storage.list_files(folder)]
        card = model_card.model_card(uri, files=files)
        storage.write_bytes(storage.join(folder, name), card.encode())


def push(place: str, to: str, licence: str = "unknown", private: bool = False) -> str:
    """Put a bundle, or an exported folder, with its card into a hub's repository or a folder.

    What names places on this machine (the bundle that it came from, the folder of the job) is
    left out of what is pushed.

    Args:
        place: A bundle, or a folder that ``export`` wrote.
        to: ``hf-hub:USER/NAME``, or a folder that is empty or not there yet.
        licence: Of the weights, as hubs name it.
        private: Make a repository that is not there yet a private one.

    Returns:
        What was done, in words.

    Raises:
        ValueError: There is neither a bundle nor an export, or ``to`` cannot be taken.
    """
    repository = _repository(to)
    with storage.scratch_folder() as scratch:
        folder = Path(scratch, "pushed")
        if bundle.exists(place):
            _copy_bundle(place, folder, licence)
        elif storage.exists(storage.join(place, EXPORTED)):
            _copy_export(place, folder, licence)
        else:
            raise ValueError(
                f"{place}: no bundle (manifest.json) and no folder that export wrote ({EXPORTED}); "
                "of a job, export the network of a target first: onetomany export JOB FOLDER "
                "--target NAME"
            )
        files = plural(sum(path.is_file() for path in folder.rglob("*")), "file")
        if repository is not None:
            return f"{_upload(folder, repository, private)}: {files}"
        _put(folder, to)
    return f"{to}: {files}"


def _repository(to: str) -> str | None:
    """Return the USER/NAME of a repository of the hub, or None for a folder.

    Raises:
        ValueError: `to` begins with hf-hub: but does not name USER/NAME.
    """
    if not to.startswith((HUB, OLD_HUB)):
        return None
    name = to.partition(":")[2]
    if not re.fullmatch("[^/]+/[^/]+", name):
        raise ValueError(f"--to {to}: a repository is {HUB}USER/NAME")
    return name


def _copy_bundle(uri: str, folder: Path, licence: str) -> None:
    """Write a bundle whole, with a manifest that names no place of this machine."""
    whole = bundle.load(uri)
    manifest = whole.manifest.to_publish()
    with storage.scratch_folder() as scratch:
        weights = Path(scratch, "weights.safetensors")
        save_file(whole.tensors, weights)
        atomic_folder.commit_folder(
            str(folder), {"weights.safetensors": weights}, manifest.to_json()
        )
    card = _written_card(uri, model_card.FILE, licence)  # of a copy, far from its job's results
    if card is None:
        card = model_card.model_card(uri, licence)
    Path(folder, model_card.FILE).write_text(card, encoding="utf-8")


def _copy_export(uri: str, folder: Path, licence: str) -> None:
    """Copy an exported folder, verified, with a description that names no place of this machine."""
    described = atomic_folder.open_folder(uri, EXPORTED)
    if described.get("kind") == lerobot_export.KIND:
        raise ValueError(
            f"{uri}: it is a data set; hf upload USER/NAME {uri} --repo-type dataset puts it on "
            "the hub, where LeRobot looks for the tag v3.0"
        )
    with storage.scratch_folder() as scratch:
        source = atomic_folder.fetch_folder(uri, Path(scratch, "export"), manifest_name=EXPORTED)
        for name in described["files"]:  # and nothing that somebody has put beside them
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(source, name), Path(folder, name))
    described = places.json_without_places(described)
    text = json.dumps(atomic_folder.with_checksum(described), indent=2, sort_keys=True)
    Path(folder, EXPORTED).write_text(text + "\n", encoding="utf-8")
    is_taken = model_card.FILE in described["files"]
    name = BESIDE_README if is_taken else model_card.FILE
    card = _written_card(uri, name, licence)
    if card is None:
        raise ValueError(f"{uri}: its model card {name} is gone: export the bundle once more")
    Path(folder, name).write_text(card, encoding="utf-8")


def _written_card(folder: str, name: str, licence: str) -> str | None:
    """Return the card that export wrote into a folder, with a licence.

    It is None if there is none, or a page of somebody else, whose notes may not be for others.
    """
    place = storage.join(folder, name)
    if not storage.exists(place):
        return None
    text = storage.read_bytes(place).decode(errors="replace")
    return model_card.with_licence(text, licence) if model_card.is_card(text) else None


def _put(folder: Path, to: str) -> None:
    """Copy the files into a folder.

    Raises:
        ValueError: There is something already.
    """
    if storage.exists(to) and (not storage.is_dir(to) or storage.list_files(to)):
        raise ValueError(f"--to {to}: it is there already; give a new folder, or empty it first")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            storage.write_bytes(storage.join(to, name), path.read_bytes())


def _upload(folder: Path, name: str, private: bool) -> str:
    """Upload a folder to the Hugging Face hub as one commit, and return its address.

    Raises:
        ValueError: The hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message="Upload with One to Many"
        )
    except LocalTokenNotFoundError:
        raise ValueError(
            f"--to {HUB}{name}: no token; run `hf auth login`, or set HF_TOKEN"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--to {HUB}{name}: the hub did not take it ({reason}); `hf auth login` or HF_TOKEN "
            "gives the token, which must be allowed to write there"
        ) from None
    return str(address)
