"""`task=push`: send a policy to the Hugging Face hub, after a look at what would be sent."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from omegaconf import DictConfig

from massdpo.errors import UserError, one_line
from massdpo.model.load import ADAPTER
from massdpo.model.save import read_json
from massdpo.runs.card import HUB, read_front_matter
from massdpo.store import MANIFEST, write_json


def push(config: DictConfig) -> None:
    """Show what of the folder `policy` would go to the hub as `out`; with `force`, send it, to a private repository.

    An adapter goes out with its base's name on the hub, never with a path on this machine.

    Raises:
        UserError: there is no policy, no name of its base or no token, or the hub refuses.
    """
    folder, name = Path(config.policy).expanduser(), config.out
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"out={name} is not a name on the hub: use OWNER/NAME") from error
    if not any((folder / file).is_file() for file in (ADAPTER, "config.json")):
        raise UserError(f"there is no policy in {folder}: give the policy/ of a run, or a folder that task=merge wrote")
    with TemporaryDirectory(prefix="massdpo.") as place:
        files = _ready(folder, Path(place))
        print(f"{folder} to {HUB}/{name}, a private repository:")
        for file in files:
            print(f"  {file.name:<32} {file.stat().st_size / 1e6:12,.3f} MB")
        if not config.force:
            print("nothing has been sent: force=true sends it")
            return
        if get_token() is None:
            raise UserError("there is no token for the hub here: set HF_TOKEN, or log in with `hf auth login`")
        try:
            HfApi().create_repo(name, private=True, exist_ok=True)
            HfApi().upload_folder(repo_id=name, folder_path=place, commit_message="A policy trained with massdpo")
        except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
            raise UserError(f"the hub did not accept {name}: {one_line(error)}") from error
        print(f"sent: {HUB}/{name}")


def _ready(folder: Path, place: Path) -> list[Path]:
    """The files as they would be sent, in `place`."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != MANIFEST and not file.name.startswith("."):
            shutil.copy(file, place)  # of a link, what it points to
    if (place / ADAPTER).is_file():
        adapter = read_json(place / ADAPTER)
        if Path(str(adapter.get("base_model_name_or_path"))).is_absolute():
            base = read_front_matter(place / "README.md").get("base_model")
            if not isinstance(base, str):
                raise UserError(
                    f"the adapter in {folder} belongs to a model in a folder on this machine: train it with "
                    "model.hub_id=OWNER/NAME besides model.path, or make it a whole model (task=merge)"
                )
            write_json(place / ADAPTER, adapter | {"base_model_name_or_path": base})
    return sorted(place.iterdir())
