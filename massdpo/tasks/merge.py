"""`task=merge`: turn a policy that is an adapter into a whole model that any program can load."""

from pathlib import Path

from omegaconf import DictConfig
from transformers import PreTrainedModel

from massdpo.errors import UserError
from massdpo.model.save import load_policy, merge_adapter, save_policy
from massdpo.runs import launch
from massdpo.runs.card import merged_card
from massdpo.runs.results import decorating
from massdpo.store import build_folder
from massdpo.tasks.rank import writing_to


def merge(config: DictConfig) -> None:
    """Write the adapter in `policy`, merged into the weights of its base in their own dtype, to the new folder `out`.

    Raises:
        UserError: there is no adapter in `policy`, its base cannot be loaded, or `out` exists.
    """
    launch.start(config)
    folder, out = Path(config.policy).expanduser(), Path(config.out).expanduser()
    if out.exists():
        raise UserError(f"out={out} exists already: give a new folder")
    policy, tokenizer = load_policy(folder)
    if isinstance(policy, PreTrainedModel):
        raise UserError(f"{folder} holds a whole model: there is no adapter to merge")
    card, text = folder / "README.md", None
    if card.is_file():
        with decorating("the model card"):
            text = merged_card(card.read_text(encoding="utf-8"))
    with writing_to(config.out):
        build_folder(out, lambda place: save_policy(merge_adapter(policy), tokenizer, place, text))
    print(f"{out}: the whole model, in the format of save_pretrained")
