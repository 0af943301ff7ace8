"""Where your own data set is, a path or a name on the hub: the options that all readers of such data share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from massdpo.data.containers import SUFFIXES, Reading
from massdpo.data.raw import Source
from massdpo.errors import UserError, one_line


@dataclass(frozen=True, kw_only=True)
class Located(Reading):
    """Rows from `path` or `hub_id`; `subset` and `splits` are what `raw.Source` takes."""

    path: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    subset: str | None = None
    splits: Mapping[str, str] | None = None

    def source(self, outside: bool = False) -> Source:
        """What is there.

        Raises:
            UserError: no place or both are given, it has no training split, or the hub cannot be reached.
        """
        if bool(self.path) == bool(self.hub_id):
            raise UserError("this dataset needs either dataset.path=FILE (or a folder) or dataset.hub_id=OWNER/NAME")
        place = hub_folder(self.hub_id, self.revision) if self.hub_id else Path(str(self.path))
        source = Source(place, self, self.subset, self.splits, outside)
        if "train" not in source.splits:
            names = ", ".join(source.found)
            raise UserError(f"{place} has no split 'train', only {names}: name it with dataset.splits={{train: NAME}}")
        return source


def hub_folder(hub_id: str, revision: str | None) -> Path:
    """The folder of a hub set's data files, fetched unless the hub's cache has them; offline, what the cache has."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*(f"*{suffix}" for suffix in SUFFIXES), "README.md"]  # the card says which files are which split
    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, httpx.HTTPError) as error:
        raise UserError(
            f"dataset.hub_id={hub_id} (revision {revision or 'main'}) cannot be fetched ({one_line(error)}): go online "
            "once, check its name, or set dataset.path to a copy of it"
        ) from error
