"""Every mistake in a configuration is told in one line before anything is computed, and every option is documented."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from massdpo.config import RULES, compose, explain, identity, resolved, run_name, validate
from massdpo.errors import UserError
from tests.conftest import ROOT

GROUPS = ("dataset", "model", "selector", "loss", "method", "trainer", "logger")
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((ROOT / "conf" / group).glob("*.yaml"))]

# overrides, and a pattern of the line that they must bring
BAD = [
    # names
    ("kk=4", r"unknown key 'kk'; did you mean 'k'"),
    ("betta=1", r"unknown key 'betta'; did you mean 'beta'"),
    ("selectr=mass", r"unknown key 'selectr'; did you mean 'selector'"),
    ("selector=mas", r"unknown selector 'mas'; did you mean 'mass'"),
    ("selector=RANDOM", r"did you mean 'random'"),
    ("selector=zzz", r"unknown selector 'zzz'; there are adpo, .*mass, .*random"),
    ("dataset=lastfn", r"unknown dataset 'lastfn'; did you mean 'lastfm'"),
    ("setting=small/quasc", r"unknown setting 'small/quasc'; did you mean 'small/qasc'"),
    ("model=tiny_lama", r"did you mean 'tiny_llama'"),
    ("model=/some/folder", r"unknown model '/some/folder'.*model=pretrained with model.path=DIR"),
    ("model.hub_id=owner/name", r"the model chosen has no 'model.hub_id': model=.*\| pretrained \|.* has"),
    ("selector=full selector.k=3", r"the selector chosen has no 'selector.k': selector=.*mass.* has"),
    ("trainer.adapter.r=3", r"the trainer chosen has no 'trainer.adapter.r': trainer=lora has"),
    ("dataset=movielens_100k dataset.path=X", r"for a public one: data_dir=FOLDER or dataset.raw_dir=FOLDER"),
    ("model=pretrained", r"Set model.path=DIR \| FILE.gguf or model.hub_id=OWNER/NAME"),
    ("loss=plackett", r"unknown loss 'plackett'"),
    ("method=sdp", r"did you mean 'sdpo'"),
    ("trainer=cpuu", r"did you mean 'cpu'"),
    ("logger=wandbb", r"did you mean 'wandb'"),
    ("sweeps=nosuchsweep", r"unknown sweeps 'nosuchsweep'"),
    ("trainer.learning_rate=1", r"did you mean 'trainer.sft.learning_rate'"),
    ("preference.epochs=1", r"did you mean 'trainer.preference.epochs'"),
    ("trainer.preference.lr=1", r"did you mean 'trainer.preference.learning_rate'"),
    ("batch_size=4", r"did you mean 'trainer.batch_size'"),
    ("dataset.limit_trian=4", r"did you mean 'dataset.limit_train'"),
    ("+foo=1", r"unknown key 'foo'"),
    ("+trainer.batchsize=1", r"unknown key 'trainer.batchsize'; did you mean 'trainer.batch_size'"),
    ("+trainer.sft.epoch=1", r"unknown key 'trainer.sft.epoch'; did you mean 'trainer.sft.epochs'"),
    ("+dataset.num_negative=4", r"unknown key 'dataset.num_negative'; did you mean 'dataset.num_negatives'"),
    ("+selector.gamma=1", r"unknown key 'selector.gamma'; did you mean 'selector.ridge'"),
    ("+loss.beta=1", r"unknown key 'loss.beta'"),
    ("+loss.rewards_BC=1", r"unknown key 'loss.rewards_BC'"),
    ("+logger.tags=a", r"unknown key 'logger.tags'"),
    ("+model.layers=2", r"unknown key 'model.layers'"),
    ("+model.config.hiden_size=2", r"hiden_size"),
    ("model.config.model_type=lama", r"model_type.*lama"),
    ("dataset._target_=no.such.Thing", r"dataset\._target_='no.such.Thing' cannot be imported"),
    # how it is written
    ("k=[", r"cannot read the argument 'k=\['"),
    ("k", r"cannot read the argument 'k'"),
    ("+k=4", r"'k' is there already: write k=VALUE"),
    ("+selector=full", r"'selector' is there already: write selector=NAME"),
    ("k=1,2", r"several values: add -m"),
    ("k=???", r"'selector.k' has no value"),
    ("~k", r"'k' is missing"),
    ("~selector", r"'selector' is missing"),
    ("~trainer.sft.epochs", r"'trainer.sft.epochs' is missing"),
    ("beta=${bta}", r"\$\{bta\} leads nowhere; did you mean"),
    ("name=${oc.env:NO_SUCH_VARIABLE_HERE}", r"NO_SUCH_VARIABLE_HERE.* not set"),
    ("selector=null", r"write GROUP=NAME"),
    ("selector=[mass,full]", r"'selector' needs one option"),
    # types and ranges
    ("k=0", r"^k=0 .*whole number of at least 1"),
    ("k=-3", r"^k=-3 "),
    ("k=abc", r"^k='abc' "),
    ("k=2.0", r"^k=2.0 "),
    ("k=true", r"^k=true "),
    ("k=null", r"^k=null "),
    ("k=[1,2]", r"^k=\[1, 2\] "),
    ("beta=0", r"^beta=0 .*above 0"),
    ("beta=-1", r"^beta=-1 "),
    ("beta=nan", r"^beta=NaN "),
    ("beta=inf", r"^beta=Infinity "),
    ("beta='0.5'", r"^beta='0.5' .*number"),
    ("beta=true", r"^beta=true "),
    ("seed=-1", r"^seed=-1 "),
    ("seed=1.5", r"^seed=1.5 "),
    ("refresh=epochs", r"step \| epoch \| once; did you mean 'epoch'"),
    ("task=traim", r"did you mean 'train'"),
    ("size=big", r"mini \| small \| paper"),
    ("force=yes please", r"^force=.*true \| false"),
    ("force=1", r"^force=1 .*true \| false"),
    ("name=a/b", r"^name='a/b' .*plain folder name"),
    ("name=..", r"plain folder name"),
    ("sweep=../up", r"plain folder name"),
    ("runs_dir=", r"^runs_dir='' "),
    ("trainer=none", r"unknown trainer 'none'"),
    ("trainer.device=gpu", r"cpu \| cuda \| auto"),
    ("trainer.precision=float16", r"float32 \| bfloat16"),
    ("trainer.threads=0", r"^trainer.threads=0 .*or null"),
    ("trainer.workers=-1", r"^trainer.workers=-1 "),
    ("trainer.max_length=0", r"^trainer.max_length=0 "),
    ("trainer.layout=pack", r"did you mean 'packed'"),
    ("trainer.batch_size=0", r"^trainer.batch_size=0 "),
    ("trainer.accumulate=0", r"^trainer.accumulate=0 "),
    ("trainer.warmup=1", r"from 0 to below 1"),
    ("trainer.warmup=-0.1", r"from 0 to below 1"),
    ("trainer.weight_decay=-1", r"at least 0"),
    ("trainer.max_grad_norm=0", r"above 0"),
    ("trainer.sft.epochs=1.5", r"^trainer.sft.epochs=1.5 "),
    ("trainer.sft.learning_rate=0", r"^trainer.sft.learning_rate=0 "),
    ("trainer.preference.learning_rate=fast", r"^trainer.preference.learning_rate='fast' "),
    ("trainer.preference.limit=0", r"^trainer.preference.limit=0 "),
    ("trainer.sft=4", r"^trainer.sft=4 .*epochs, learning_rate"),
    ("trainer.adapter=5", r"^trainer.adapter=5 .*r, alpha, targets, stages"),
    ("trainer.adapter={r:16}", r"trainer.adapter.alpha' is missing"),
    ("trainer.adapter={r:0,alpha:1,targets:a,stages:one}", r"^trainer.adapter.r=0 "),
    ("trainer.adapter={r:1,alpha:1,targets:[],stages:one}", r"^trainer.adapter.targets=\[\] "),
    ("trainer.adapter={r:1,alpha:1,targets:a,stages:three}", r"^trainer.adapter.stages='three' "),
    ("trainer.keep=first", r"last \| best"),
    ("trainer.keep_metric=7", r"^trainer.keep_metric=7 "),
    ("trainer.log_every=0", r"^trainer.log_every=0 "),
    ("dataset.num_negatives=0", r"^dataset.num_negatives=0 "),
    ("dataset.num_negatives=own", r"^dataset.num_negatives='own' "),  # only questions have options of their own
    ("dataset.limit_train=0", r"^dataset.limit_train=0 .*or null"),
    ("dataset.seed=x", r"^dataset.seed='x' "),
    ("dataset.num_train=many", r"^dataset.num_train='many' "),
    ("dataset.easy=half", r"^dataset.easy='half' .*number"),
    ("dataset=lastfm dataset.slate=legcy", r"slate.*legacy"),
    ("dataset=lastfm dataset.list_candidates=maybe", r"list_candidates"),
    ("dataset=jsonl dataset.val_fraction=1", r"^dataset.val_fraction=1 "),
    ("dataset=jsonl dataset.val_fraction=0.6 dataset.test_fraction=0.5", r"no row is left for training"),
    ("dataset=qasc dataset.val_size=0", r"^dataset.val_size=0 "),
    ("dataset=mcqa dataset.path=a dataset.answer=word", r"dataset.answer=.* is not allowed: use letter . index0"),
    ("selector.ridge=0", r"^selector.ridge=0 .*above 0"),
    ("selector.variant=centred", r"did you mean 'centered'"),
    ("selector.features=men", r"did you mean 'mean'"),
    ("selector.solver=best", r"greedy \| swap \| exact"),
    ("selector.normalize=1", r"true \| false"),
    ("selector.short_pool=fill", r"error \| all"),
    ("logger.mode=onlin", r"did you mean 'online'"),
    ("logger.timeout=0", r"^logger.timeout=0 "),
    ("logger.project=a/b", r"^logger.project='a/b' .*a name without"),
    ("logger.project=", r"^logger.project='' "),
    ("logger.entity='https://me:secret@host'", r"^logger.entity=.*a name without"),
    ("model.config=3", r"^model.config=3 "),
    ("model.config.hidden_size=0", r"^model.config.hidden_size=0 "),
    ("model.vocab_size=10", r"model.vocab_size=10"),
    # together
    ("k=21", r"k=21 is above dataset.num_negatives=20.*short_pool=all"),
    ("loss=dpo", r"loss=dpo .*k=4: use k=1"),
    ("loss=dpo selector=full k=1", r"loss=dpo .*whole pool"),
    ("loss=is_pl", r"loss=is_pl corrects for negatives drawn by chance: use selector=random, sampled or top_random"),
    ("method=is_pl selector.screen=8", r"loss=is_pl knows .*selector\.screen=null"),
    ("method=mass selector=random", r"^selector=random contradicts method=mass, which has selector=mass: leave out"),
    ("method=sdpo loss=dmpo", r"^loss=dmpo contradicts method=sdpo, which has loss=pl"),
    ("selector.screen=3", r"selector\.screen=3 is below k=4"),
    ("method=dpo k=2", r"loss=dpo .*k=2"),
    ("task=evaluate", r"task=evaluate needs in="),
    ("task=rank", r"task=rank needs in="),
    ("task=show", r"task=show needs in=a run's folder"),
    ("task=explain in=run", r"task=explain needs id=a prompt's id"),
    ("verbosity=loud", r"quiet \| normal \| debug"),
    ("id=train/3", r"for task=explain, not for task=train"),
    ("task=select", r"task=select needs out="),
    ("task=study", r"needs study=optimality \| features \| refresh \| loglinear"),
    ("task=study study=optimal", r"did you mean 'optimality'"),
    ("study=refresh", r"for task=study, not for task=train"),
    ("split=test", r"for task=inspect, not for task=train"),
    ("trainer.max_length=5000", r"max_length=5000 is above model.config.max_position_embeddings=4096"),
    ("model.config.num_attention_heads=3", r"=3 does not divide model.config.hidden_size=64"),
]


@pytest.mark.parametrize(("overrides", "pattern"), BAD, ids=[overrides for overrides, _ in BAD])
def test_a_bad_configuration_is_told_in_one_line(overrides: str, pattern: str) -> None:
    arguments = [overrides] if "please" in overrides else overrides.split()
    with pytest.raises(UserError) as caught:
        validate(compose(arguments))
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    assert re.search(pattern, line), line


def test_what_a_machine_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"trainer.device=cuda.*no GPU"):
        validate(compose(["trainer.device=cuda"]))
    validate(compose(["trainer.device=auto", "trainer.precision=bfloat16"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match=r"bfloat16.*GPU does not support it"):
        validate(compose(["trainer.device=cuda", "trainer.precision=bfloat16"]))


GOOD = [
    "k=20",
    "k=21 selector.short_pool=all",
    "k=999 selector=full",
    "loss=dpo k=1",
    "k=999 method=sft",  # no preference stage, so k means nothing
    "task=rank in=a policy=p out=b",
    "task=study study=refresh",
    "dataset=qasc dataset.num_negatives=own",
    "trainer.adapter={r:8,alpha:1.5,targets:[q_proj],stages:two}",
    "trainer.keep=best trainer.keep_metric=ndcg@5_sum",
    "beta=1",
    "name=a.b-c_d",
]


@pytest.mark.parametrize("overrides", GOOD)
def test_what_is_meaningful_is_let_through(overrides: str) -> None:
    validate(compose(overrides.split()))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from([key for key in RULES if not key.startswith("trainer.adapter.")]),
    value=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers()),
)
def test_any_value_at_any_key_is_taken_or_refused_in_one_line(default: DictConfig, key: str, value: object) -> None:
    config = default.copy()
    OmegaConf.set_struct(config, False)
    OmegaConf.update(config, key, value if not isinstance(value, str) else value.replace("$", ""))
    try:
        validate(config)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def default() -> DictConfig:
    return compose()


# As whole processes ---------------------------------------------------------------------------------------------------

PROCESSES = ["kk=4", "selector=mas", "selector=null", "k=abc", "beta=0 debug=false", "+foo=1", "loss=dpo"]


@pytest.mark.parametrize("overrides", PROCESSES)
def test_a_process_says_one_line_and_exits_with_2(overrides: str, tmp_path: Path) -> None:
    done = run_process(overrides.split(), tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []  # nothing was written


def test_a_traceback_is_there_for_those_who_ask(tmp_path: Path) -> None:
    done = run_process(["k=0", "debug=true"], tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, massdpo.config; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def run_process(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MASSDPO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


# The YAML files -------------------------------------------------------------------------------------------------------

NEEDED = {  # what an option cannot do without, or what this machine may not have
    "mcqa": ["dataset.path=quiz.csv"],
    "gpu": ["trainer.device=cpu"],
    "gpu_24gb": ["trainer.device=cpu"],
    "gpu_80gb": ["trainer.device=cpu"],
    "paper": ["trainer.device=cpu"],
    "jsonl": ["dataset.path=rows.jsonl"],
    "preferences": ["dataset.path=rows.jsonl"],
    "sequences": ["dataset.raw_dir=data"],
    "impressions": ["dataset.path=data"],
    "pretrained": ["model.path=DIR"],
}


def test_jsonl_is_another_name_of_preferences() -> None:
    names = ("jsonl", "preferences")
    jsonl, preferences = (compose([f"dataset={name}", "dataset.path=rows"]).dataset for name in names)
    assert [jsonl.name, preferences.name] == [*names] and {**jsonl, "name": ""} == {**preferences, "name": ""}


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}={option}" for group, option in OPTIONS])
def test_every_option_composes_and_validates(group: str, option: str) -> None:
    needed = NEEDED.get(option, []) + {"dpo": ["k=1"], "is_pl": ["selector=sampled"]}.get(option, [])
    config = compose([f"{group}={option}", *needed])
    validate(config)
    json.dumps(resolved(config))


YAMLS = [ROOT / "conf" / "config.yaml", *sorted((ROOT / "conf").glob("*/*.yaml"))]


@pytest.mark.parametrize("file", YAMLS, ids=[str(file.relative_to(ROOT)) for file in YAMLS])
def test_every_option_has_a_comment(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# "), "a file begins with what it is"
    for number, line in enumerate(lines):
        option = re.match(r"\s*([\w]+):\s+\S", line)
        if option is None or is_hydra(file, lines, number) or option[1] in ("_target_", "name", "terms"):
            continue
        above = lines[number - 1].strip()
        shared = file.parent.name in ("trainer", "method") and file.stem != "cpu"  # explained where they are first set
        assert " # " in line or above.startswith("# ") or shared, f"{file.name}:{number + 1}: {line.strip()}"


def is_hydra(file: Path, lines: list[str], number: int) -> bool:
    """Inside of `choices:` or `hydra:`, which are no one's to set?"""
    if file.name != "config.yaml":
        return False
    tops = [line for line in lines[: number + 1] if re.match(r"\w", line)]
    return tops[-1].startswith(("choices:", "hydra:"))


def test_every_trainer_and_main_option_has_a_rule() -> None:
    main = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text(encoding="utf-8"))
    for key in main.keys() - {"defaults", "hydra", "choices"}:
        assert key in RULES
    for file in (ROOT / "conf" / "trainer").glob("*.yaml"):
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
        node.pop("defaults", None)
        for key, value in node.items():
            keys = [f"trainer.{key}.{inner}" for inner in value] if isinstance(value, dict) else [f"trainer.{key}"]
            assert set(keys) <= RULES.keys()


def test_option_names_are_frozen() -> None:
    """Scripts and papers name these: whoever renames one breaks them, so a change here is a decision."""
    config = OmegaConf.to_container(compose(["trainer=lora"]))
    assert isinstance(config, dict)
    assert " ".join(sorted(set(config) - {"choices"})) == (
        "beta cache_dir data_dir dataset debug force id in k logger loss model name out policy refresh runs_dir seed"
        " selector size split study sweep task trainer verbosity"
    )
    assert " ".join(sorted(config["trainer"])) == (
        "accumulate adapter batch_size chat_template checkpoint_every device eval_batch_size generate"
        " gradient_checkpointing keep keep_metric layout log_every max_grad_norm max_length patience picks precision"
        " preference save_policy sft threads warmup weight_decay workers"
    )
    assert set(config["trainer"]["sft"]) == {"epochs", "learning_rate"}
    assert set(config["trainer"]["preference"]) == {"epochs", "learning_rate", "limit"}
    assert set(config["trainer"]["adapter"]) == {"r", "alpha", "targets", "stages", "quantize"}
    options = {group: {name for part, name in OPTIONS if part == group} for group in GROUPS}
    assert options["selector"] >= {"mass", "random", "hardest", "full", "adpo", "dpp", "farthest", "hardest_logp"}
    assert options["loss"] >= {"pl", "dpo", "dmpo", "mppo", "pairwise", "lipo", "ndcg"}
    assert options["method"] >= {"sft", "dpo", "sdpo", "dmpo", "mppo", "hardest", "full", "mass"}
    assert options["dataset"] >= {"synthetic_mcqa", "synthetic_rec", "lastfm", "qasc", "medmcqa", "jsonl"}
    assert options["model"] >= {"tiny_llama", "tiny_gemma", "tiny_phi", "tiny_qwen"}


# What makes a run the same --------------------------------------------------------------------------------------------

SAME = [
    "name=other",
    "sweep=other",
    "runs_dir=elsewhere",
    "cache_dir=elsewhere",
    "force=true",
    "debug=true",
    "logger=none",
    "logger.project=mine",
    "out=somewhere",
    "size=paper",
    "trainer.workers=2",
    "trainer.checkpoint_every=7",
    "method=mass",  # what selector=mass loss=pl say already
]
OTHER = [
    "k=3",
    "beta=0.1",
    "seed=1",
    "refresh=epoch",
    "selector=random",
    "selector.ridge=2.0",
    "loss=dmpo",
    "model=tiny_qwen",
    "model.config.hidden_size=32",
    "dataset=synthetic_rec",
    "dataset.seed=1",
    "dataset.limit_train=10",
    "trainer.sft.epochs=1",
    "trainer.preference.learning_rate=0.5",
    "trainer.batch_size=3",
    "trainer.precision=bfloat16",
    "trainer.layout=repeated",
    "trainer.threads=1",
    "trainer.log_every=3",
    "trainer.keep=best",
    "trainer.generate=true",
]


@pytest.mark.parametrize("override", SAME)
def test_what_changes_no_number_changes_no_identity(override: str, default: DictConfig) -> None:
    assert identity(compose([override])) == identity(default)
    assert run_name(compose([override])) == run_name(default)


@pytest.mark.parametrize("override", OTHER)
def test_what_changes_numbers_changes_identity_and_name(override: str, default: DictConfig) -> None:
    assert identity(compose([override])) != identity(default)
    assert run_name(compose([override])) != run_name(default)


def test_data_folders_are_no_part_of_the_identity() -> None:
    here, there = (compose(["dataset=lastfm", f"dataset.raw_dir={place}"]) for place in ("here", "there"))
    assert identity(here) == identity(there) and run_name(here) == run_name(there)


def test_a_run_is_named_after_what_it_is(default: DictConfig) -> None:
    assert re.fullmatch(r"synthetic_mcqa-tiny_llama-mass-pl-k4-b0\.5-s0-[0-9a-f]{8}", run_name(default))
    odd = compose(["beta=1e-7", "seed=123456789012"])
    assert re.fullmatch(r"[A-Za-z0-9._-]+-b1e-07-s123456789012-[0-9a-f]{8}", run_name(odd))


def test_the_identity_survives_json(default: DictConfig) -> None:
    assert json.loads(json.dumps(identity(default))) == identity(default)


def test_secrets_are_in_no_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "tok-planted-1234")
    config = compose(["runs_dir=x/tok-planted-1234", "logger.entity='https://me:pass-planted@host/x'"])
    OmegaConf.set_struct(config, False)
    config.logger.api_key = "key-planted"
    dumped = json.dumps(resolved(config))
    assert "planted" not in dumped
    assert "https://host/x" in dumped
    assert resolved(config)["k"] == 4


def test_the_composed_config_is_what_a_job_sees(tmp_path: Path) -> None:
    done = run_process(["selector=full", "--cfg", "job", "--resolve"], tmp_path)
    seen = yaml.safe_load(done.stdout)
    mine = OmegaConf.to_container(compose(["selector=full"]))
    assert isinstance(mine, dict)
    for values in (seen, mine):
        values.pop("choices"), values.pop("cache_dir")
    assert seen == mine


def test_a_missing_value_is_told_by_its_whole_key() -> None:
    config = OmegaConf.create({"dataset": {"folder": "???"}})
    with pytest.raises(OmegaConfBaseException) as error:
        OmegaConf.to_container(config, throw_on_missing=True)
    assert explain(error.value) == "the key 'dataset.folder' has no value: write dataset.folder=VALUE"


def test_a_class_of_ours_is_known_by_its_name_wherever_its_file_is(default: DictConfig) -> None:
    assert identity(default)["selector"]["_target_"] == "Mass"
