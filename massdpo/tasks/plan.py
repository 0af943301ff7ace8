"""`task=plan`: what a run would do, and what it would take."""

from omegaconf import DictConfig

from massdpo.config import instantiate
from massdpo.console import warn
from massdpo.data.prepare import limited
from massdpo.evaluation.scores import SplitScorer
from massdpo.runs import launch, start
from massdpo.runs import plan as plans
from massdpo.selection import check_selection


def plan(config: DictConfig) -> None:
    """Print the plan of a run of this config, and nothing else: no run, no folder; data and model come into the cache.

    Raises:
        UserError: what a run would refuse before it trains.
    """
    accelerator = launch.start(config)
    cache, trainer = start.cache_of(config), config.trainer
    data, model = start.load(config, cache)
    rows = limited(data.train, trainer.preference.limit, config.dataset.get("seed", 0), "preference")
    selector = instantiate(config.selector)
    check_selection(config.selector, [len(example.response_ids) - 1 for example in rows])
    score = SplitScorer(accelerator, trainer.eval_batch_size, data.pad_id)
    kept = plans.what_is_kept(config, data, cache, accelerator)
    found = plans.plan(config, data, start.trainable(config, model), rows, selector, score, kept)
    if accelerator.is_main_process:
        for doubt in plans.doubts(config, data, rows, accelerator.num_processes):
            warn(doubt)
        found.tell(stderr=False)
