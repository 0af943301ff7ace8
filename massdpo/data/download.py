"""Raw files from their owners' published addresses: fetched once into the cache, checked and unpacked.

Files are pinned by their SHA-256, hub sets by their revision. Without a network, or where the content has changed, one
error says what to put where.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from massdpo.errors import UserError
from massdpo.store import Cache, digest, write_jsonl


@dataclass(frozen=True)
class WebFiles:
    """Files at plain addresses, each `(address, SHA-256)`; archives are unpacked, and the data is in `inside`."""

    files: tuple[tuple[str, str], ...]
    inside: str = ""

    def wanted(self) -> str:
        """What to do by hand where nothing can be fetched, before setting dataset.raw_dir."""
        named = ", ".join(f"{address.rsplit('/', 1)[1]} (SHA-256 {sha256})" for address, sha256 in self.files)
        return f"unpack {named}, take its folder {self.inside}" if self.inside else f"put {named} into a folder"

    def fetch(self, name: str, folder: Path) -> None:
        import pooch  # here and below: slow to import and rarely needed
        import requests

        for address, sha256 in self.files:
            file_name = address.rsplit("/", 1)[1]
            unpack = pooch.Unzip(extract_dir=".") if file_name.endswith(".zip") else None  # cuts `..` out of names
            try:
                pooch.retrieve(address, f"sha256:{sha256}", file_name, folder, processor=unpack, progressbar=True)
            except (OSError, requests.RequestException) as error:
                reason = (
                    "no connection" if isinstance(error, requests.ConnectionError | requests.Timeout) else str(error)
                )
                raise _unreachable(name, address, self.wanted(), reason) from error
            except ValueError as error:  # pooch's error for a wrong checksum
                raise UserError(
                    f"{address} is not the published file (its SHA-256 is not {sha256}): "
                    "get the right one and set dataset.raw_dir to its folder"
                ) from error


@dataclass(frozen=True)
class HubSet:
    """Parquet files of a hub data set at a revision, by the name of the JSON Lines file that they become."""

    repo: str
    revision: str
    files: dict[str, str]
    inside: str = ""

    def fetch(self, name: str, folder: Path) -> None:
        import httpx
        import pyarrow.parquet
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import logging as hub_logging

        hub_logging.set_verbosity_error()  # it reports every retry; our error reports the failure once
        for file_name, remote in self.files.items():
            try:
                local = hf_hub_download(self.repo, remote, repo_type="dataset", revision=self.revision)
            except (OSError, HfHubHTTPError, httpx.HTTPError) as error:
                from_hub = f"huggingface.co/datasets/{self.repo} (revision {self.revision})"
                raise _unreachable(name, from_hub, f"put {', '.join(self.files)} into a folder", str(error)) from error
            write_jsonl(folder / file_name, pyarrow.parquet.read_table(local).to_pylist())


S_DPO = "https://raw.githubusercontent.com/chenyuxin1999/S-DPO/07befa4141239c1ecd8d13b1136d226315d0227b/sample_data/"
GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
FIRST_PART = "-00000-of-00001.parquet"

SOURCES: dict[str, WebFiles | HubSet] = {
    "lastfm": WebFiles(
        tuple(
            (f"{S_DPO}lastfm-sft-cans20/lastfm-{split}.json", sha256)
            for split, sha256 in {
                "train": "ecfdf0999aee341da322e5ab4315875cbf01656caeb9321ec3c7d8209e5c03e6",
                "val": "4fe1044f3c95eb77d402d0fc2d1b513bf3a585225c344b8f84c23b1c3f3007a4",
                "test": "868fe7570f4fdeea9cbbf3fb85c1fdadc20cf2f375e7a70247dae7d34d867983",
            }.items()
        )
    ),
    "movielens_100k": WebFiles(
        ((f"{GROUPLENS}ml-100k.zip", "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"),),
        inside="ml-100k",
    ),
    "movielens_1m": WebFiles(
        ((f"{GROUPLENS}ml-1m.zip", "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),),
        inside="ml-1m",
    ),
    "qasc": HubSet(
        "allenai/qasc",
        "a34ba204eb9a33b919c10cc08f4f1c8dae5ec070",
        {"train.jsonl": f"data/train{FIRST_PART}", "dev.jsonl": f"data/validation{FIRST_PART}"},
    ),
    "arc": HubSet(
        "allenai/ai2_arc",
        "210d026faf9955653af8916fad021475a3f00453",
        {
            "ARC-Challenge-Train.jsonl": f"ARC-Challenge/train{FIRST_PART}",
            "ARC-Challenge-Dev.jsonl": f"ARC-Challenge/validation{FIRST_PART}",
            "ARC-Challenge-Test.jsonl": f"ARC-Challenge/test{FIRST_PART}",
        },
    ),
    "commonsenseqa": HubSet(
        "tau/commonsense_qa",
        "94630fe30dad47192a8546eb75f094926d47e155",
        {"train_rand_split.jsonl": f"data/train{FIRST_PART}", "dev_rand_split.jsonl": f"data/validation{FIRST_PART}"},
    ),
    "openbookqa": HubSet(
        "allenai/openbookqa",
        "388097ea7776314e93a529163e0fea805b8a6454",
        {
            "train.jsonl": f"main/train{FIRST_PART}",
            "dev.jsonl": f"main/validation{FIRST_PART}",
            "test.jsonl": f"main/test{FIRST_PART}",
        },
    ),
    "medmcqa": HubSet(
        "openlifescienceai/medmcqa",
        "91c6572c454088bf71b679ad90aa8dffcd0d5868",
        {"train.jsonl": f"data/train{FIRST_PART}", "validation.jsonl": f"data/validation{FIRST_PART}"},
    ),
}


def fetch(name: str, cache: Cache) -> Path:
    """The folder with the raw files of the dataset `name`, fetched if the cache does not hold it yet.

    Raises:
        UserError: no address is known, there is no network, or the content is not what was published.
    """
    source = SOURCES.get(name)
    if source is None:
        raise UserError(f"dataset {name!r} has no published address: set dataset.raw_dir to the folder with its files")

    key = f"{name}-{digest(asdict(source))[:12]}"
    return Cache(cache.root).folder("raw", key, lambda folder: source.fetch(name, folder)) / source.inside


def _unreachable(name: str, address: str, remedy: str, reason: str) -> UserError:
    why = reason.split(". ")[0].splitlines()[0] if reason else "no answer"
    return UserError(
        f"dataset={name} could not be fetched from {address} ({why}): {remedy} and set dataset.raw_dir to it"
    )
