"""`task=plan`: what a run would do, and what it would need."""

from omegaconf import DictConfig

from massdpo.console import warn
from massdpo.evaluation.logps import SplitScorer
from massdpo.runs import launch, start
from massdpo.runs import plan as plans


def plan(config: DictConfig) -> None:
    """Print the plan of a run of this config, without a run or its folder; data and model go to the cache.

    Raises:
        UserError: a run would be refused before it trains.
    """
    accelerator = launch.start(config)
    cache = start.cache_of(config)
    data, model = start.load(config, cache)
    selector = start.selector_for(config, data)
    score_split = SplitScorer(accelerator, config.trainer.eval_batch_size, data.pad_id)
    kept = plans.what_is_kept(config, data, cache, accelerator)
    found = plans.plan(config, data, start.trainable(config, model), data.rows, selector, score_split, kept)
    if accelerator.is_main_process:
        for doubt in plans.doubts(config, data, data.rows, accelerator.num_processes):
            warn(doubt)
        found.tell(stderr=False)
