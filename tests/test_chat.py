"""Chat templates: the same prompts every day, turns that end as the template ends them, refusals in one line."""

import datetime
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import chat_template_utils

from massdpo.config import compose
from massdpo.data import chat
from massdpo.data.chat import settle_chat_template
from massdpo.data.schema import PreferenceExample
from massdpo.data.tokenize import tokenize_split, tokenizer_key
from massdpo.errors import UserError
from massdpo.model.save import save_policy
from massdpo.model.scratch import TinyModel
from massdpo.runs import start
from massdpo.store import Cache
from tests.test_models import option
from tests.test_tokenize import bpe

# As the families write them, shortened; the token that ends an assistant's turn.
TEMPLATES = {
    "ChatML": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "Gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "Llama 3": (
        '{{ bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}'
        '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
        '{%- endif %}{%- endif %}Today Date: {{ date_string }}<|eot_id|>'
        "{% for m in messages %}<|head|>{{ m.role }}\n\n{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "Phi-3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "no token of its own": (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}",
        "</s>",
    ),
}  # fmt: skip
EXTRA = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|head|>", "<|eot_id|>", "<|end|>"]


def chatting(family: str) -> Any:
    tokenizer = bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": EXTRA})
    tokenizer.add_tokens(["\n"])  # as Gemma has it
    tokenizer.chat_template = TEMPLATES[family][0]
    return tokenizer


def example(*messages: tuple[str, str]) -> PreferenceExample:
    turns = [{"role": role, "content": content} for role, content in messages]
    return PreferenceExample(
        *("train/7", "what?", "green hill", ("red river",), ("green hill", "red river")), meta={"messages": turns}
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[datetime.datetime]:
    """The time that templates see, at the end of the list."""
    now = [datetime.datetime(2031, 2, 3)]

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return now[-1]

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return now


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_prompt_and_its_response_begin_the_conversation_as_the_template_writes_it(family: str) -> None:
    """Against `transformers`' own rendering of the whole conversation by the template as it came."""
    tokenizer, own = chatting(family), chatting(family)
    settle_chat_template(tokenizer)
    (row,) = tokenize_split([example(("user", "what is next?"))], tokenizer, 200, chat_template=True)
    for response, ids in zip(("green hill", "red river"), row.response_ids, strict=True):
        turns = [{"role": "user", "content": "what is next?"}, {"role": "assistant", "content": response}]
        whole = own.apply_chat_template(turns, date_string="26 Jul 2024", return_dict=False)
        expected = own.convert_tokens_to_ids(TEMPLATES[family][1])
        assert ids[-1] == expected == tokenizer.eos_token_id
        if family == "no token of its own":  # the end token stands where the template has a line break
            whole[len(row.prompt_ids) + len(ids) - 1] = expected
        assert whole[: len(row.prompt_ids) + len(ids)] == row.prompt_ids + ids


def test_a_templates_date_is_the_same_every_day() -> None:
    tokenizer = chatting("Llama 3")

    def seen() -> str:
        (row,) = tokenize_split([example(("user", "what is next?"))], tokenizer, 200, True)
        return str(tokenizer.decode(row.prompt_ids))

    today = f"{datetime.date.today():%d %b %Y}"
    assert today in seen(), "the template does ask the clock"
    settle_chat_template(tokenizer)
    assert "26 Jul 2024" in seen() and today not in seen()


@pytest.mark.parametrize(
    ("family", "messages", "told"),
    [
        ("Gemma", [("system", "be brief"), ("user", "what?")], "system, user .*System role not supported"),
        ("Gemma", [("user", "what?"), ("user", "what?")], "user, user .*must alternate"),
    ],
)
def test_what_a_template_refuses_is_one_line_with_the_row(
    family: str, messages: list[tuple[str, str]], told: str
) -> None:
    tokenizer = chatting(family)
    settle_chat_template(tokenizer)
    with pytest.raises(UserError, match=f"^train/7: .*roles {told}") as error:
        tokenize_split([example(*messages)], tokenizer, 200, chat_template=True)
    assert "\n" not in str(error.value)


def test_a_template_that_cannot_be_read_is_one_line() -> None:
    tokenizer = chatting("ChatML")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}"
    with pytest.raises(UserError, match=r"^trainer.chat_template: .*roles user, assistant"):
        settle_chat_template(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        settle_chat_template(tokenizer)


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "allocates": "{{ 'a' * 10**11 }}",
    "grows": "{% set all = namespace(x='a') %}{% for i in range(99) %}{% set all.x = all.x ~ all.x %}{% endfor %}",
    "pads": "{{ 'a'.center(10**12) }}",
    "recurses": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "divides": "{{ 1 // 0 }}",
    "waits for data": "{{ messages[0].content if messages[0].content == 'question' else 'a' * 10**11 }}massdpo",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_that_loops_or_fills_the_memory_is_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have the sandbox's leave to: {% for %}, strings and numbers are all that it takes."""
    monkeypatch.setattr(chat, "SECONDS", 1)
    tokenizer = chatting("ChatML")
    tokenizer.chat_template = HOSTILE[kind]
    begin = time.monotonic()
    with pytest.raises(UserError, match="the chat template refuses messages") as error:
        settle_chat_template(tokenizer)
        tokenize_split([example(("user", "what?"))], tokenizer, 200, chat_template=True)
    assert "\n" not in str(error.value) and time.monotonic() - begin < 30
    tokenizer.chat_template = TEMPLATES["ChatML"][0]  # and others are rendered as before
    settle_chat_template(tokenizer)


def test_a_saved_policy_keeps_the_date_and_the_end_and_a_hint_tells_of_its_template(
    tmp_path: Path, clock: list[datetime.datetime], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["dataset.num_train=16", "dataset.num_val=4", "dataset.num_test=4"]
    tiny = option("tiny_llama").options | {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model, tokenizer = TinyModel(tiny, 300).load(["what is next? green hill"], 0, Cache(tmp_path))
    tokenizer.add_special_tokens({"additional_special_tokens": EXTRA})
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = TEMPLATES["Llama 3"][0]
    save_policy(model, tokenizer, tmp_path / "theirs")
    run = [*sizes, "model=qwen3_0_6b", f"model.path={tmp_path / 'theirs'}"]
    start.load(compose(run), Cache(tmp_path))
    assert "hint: this model has a chat template" in capsys.readouterr().err
    data, model = start.load(compose([*run, "trainer.chat_template=true"]), Cache(tmp_path))
    told = capsys.readouterr().err
    assert "hint" not in told and "26 Jul 2024" in told
    save_policy(model, data.tokenizer, tmp_path / "ours")
    clock.append(datetime.datetime(2031, 2, 4))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "ours")
    turn = [{"role": "user", "content": data.splits.train[0].prompt}]
    ids = loaded.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert ids == data.train[0].prompt_ids
    end = loaded.convert_tokens_to_ids("<|eot_id|>")
    assert loaded.eos_token_id == end == data.train[0].response_ids[0][-1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").generation_config.eos_token_id == end
    settle_chat_template(loaded)
    assert tokenizer_key(loaded, True) == tokenizer_key(data.tokenizer, True)
