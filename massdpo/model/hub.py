"""Pretrained models on the Hugging Face hub: fetched into its cache, without pickles and code."""

from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from massdpo.errors import UserError, one_line

HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md"]  # no pickles, no code


def hub_snapshot(hub_id: str, revision: str | None) -> Path:
    """The folder of a hub model's snapshot in the hub's cache; offline, what the cache has."""
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        raise UserError(
            f"{hub_id} is gated: accept its terms at https://huggingface.co/{hub_id} and put your access token into "
            "the variable HF_TOKEN, or set model.path=DIR to a folder that holds it"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {hub_id} (or it is private and HF_TOKEN holds no token for it)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{hub_id} is not in the cache {constants.HF_HUB_CACHE} and the hub cannot be reached: go online once, or "
            "set model.path=DIR to a folder that holds it"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{hub_id} cannot be fetched from the hub: {one_line(error)}") from error
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{hub_id} has no weights in *.safetensors in {folder}: if the hub has them, go online once to complete "
            "that cache, or set model.path=DIR to a folder that holds the model"
        )
    return folder
