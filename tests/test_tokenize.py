"""One tokeniser for all stages: joined texts come back, BOS once, EOS always, history cut as little as can be."""

from dataclasses import replace

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from massdpo.data import tokenize as tokenize_module
from massdpo.data.batches import collate
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.data.tokenize import tokenize_split, tokenize_splits
from massdpo.data.tokens import TokenizedExample, TokenizedSplit
from massdpo.errors import UserError
from massdpo.store import Cache

CORPUS = ["seen: red river two, blue moon. next: green hill", "what is the home of amber crane? windy valley"] * 4
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def bpe(pre_tokenizer=None, normalizer=None, corpus=CORPUS, size=400, **special):
    """A byte-level BPE as the tiny models have one; `pre_tokenizer=False`: merges across spaces."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre_tokenizer is not False)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special or SPECIAL))


def spaced():
    """As Llama 2 and Phi-3 have it: every text is given a space at its start, even one that starts with a space."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁:", "▁next:", "▁green", "▁hill", "▁what?"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZER = bpe()


def example(prompt, chosen, *pool, row=0, history=(), history_start=0, **meta):
    return PreferenceExample(
        f"train/{row}", prompt, chosen, pool, (*pool, chosen), tuple(history), history_start, dict(meta)
    )


def viewer(row, titles, end=". next:"):
    return example(
        f"seen: {', '.join(titles)}{end}", "green hill", "red river two", row=row, history=titles, history_start=6
    )


word = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=8)
phrase = st.lists(word, min_size=1, max_size=4).map(" ".join)


@settings(deadline=None)
@given(st.lists(st.tuples(phrase, phrase, st.lists(phrase, max_size=4)), min_size=1, max_size=5))
def test_ids_decode_to_the_joined_text_in_order(texts):
    rows = [example(prompt, chosen, *pool, row=row) for row, (prompt, chosen, pool) in enumerate(texts)]
    split = tokenize_split(rows, TOKENIZER, 10_000)
    assert [item.id for item in split] == [row.id for row in rows]
    for row, item in zip(rows, split, strict=True):
        assert item.prompt_ids[0] == TOKENIZER.bos_token_id
        for text, ids in zip((row.chosen, *row.pool), item.response_ids, strict=True):
            assert ids[-1] == TOKENIZER.eos_token_id
            whole = item.prompt_ids[1:] + ids[:-1]
            assert not {TOKENIZER.bos_token_id, TOKENIZER.eos_token_id} & set(whole)
            assert TOKENIZER.decode(whole) == f"{row.prompt} {text}"


@settings(deadline=None)
@given(st.lists(st.tuples(phrase, phrase, st.lists(phrase, max_size=3)), min_size=1, max_size=5))
def test_the_report_counts_what_the_slow_way_counts(texts):
    rows = [example(prompt, chosen, *pool, row=row) for row, (prompt, chosen, pool) in enumerate(texts)]
    split = tokenize_split(rows, TOKENIZER, 10_000)

    def joint(prompt, text):
        return TOKENIZER(f"{prompt} {text}", add_special_tokens=False)["input_ids"]

    slow = sum(
        any(
            joint(row.prompt, text) != item.prompt_ids[1:] + ids[:-1]
            for text, ids in zip((row.chosen, *row.pool), item.response_ids, strict=True)
        )
        for row, item in zip(rows, split, strict=True)
    )
    report = split.report
    assert report["boundary_differences"] == slow
    assert report["longest_total"] == max(len(i.prompt_ids) + max(map(len, i.response_ids)) for i in split)
    assert report["prompt_tokens"] == sum(len(item.prompt_ids) for item in split)
    assert report["response_tokens"] == sum(len(ids) for item in split for ids in item.response_ids)
    assert report["chosen_tokens_in_pool"] == sum(item.response_ids[0] in item.response_ids[1:] for item in split)


def test_a_tokenizer_that_merges_across_the_joint_is_counted_and_told():
    """Trained without splitting at spaces, ": green" becomes tokens that cross from the prompt into the response."""
    merging = bpe(pre_tokenizer=False, corpus=["next: green hill"] * 9)
    rows = [example("next:", "green hill", row=0), example("what?", "zzz", row=1)]
    split = tokenize_split(rows, merging, 100)
    joint = merging("next: green hill", add_special_tokens=False)["input_ids"]
    assert joint != split[0].prompt_ids[1:] + split[0].response_ids[0][:-1]
    assert split.report["boundary_differences"] == 1
    assert split.warnings[0].startswith("1 of 2 prompts")
    assert tokenize_split(rows[1:], merging, 100).warnings == []


def test_a_tokenizer_that_starts_texts_with_a_space_adds_none_to_responses():
    tokenizer = spaced()
    item = tokenize_split([example("next:", "green hill")], tokenizer, 100)
    joint = tokenizer("next: green hill", add_special_tokens=False)["input_ids"]
    assert item[0].prompt_ids[1:] + item[0].response_ids[0][:-1] == joint
    assert item.report["boundary_differences"] == 0
    assert tokenizer(" green hill", add_special_tokens=False)["input_ids"] != item[0].response_ids[0][:-1]


def test_bos_stands_once_or_not_at_all():
    with_bos = tokenize_split([example("<s>what?", "green")], TOKENIZER, 100)[0]
    assert with_bos.prompt_ids.count(TOKENIZER.bos_token_id) == 1
    without = bpe(eos_token="</s>", pad_token="<pad>")
    plain = tokenize_split([example("what?", "green")], without, 100)[0]
    assert plain.prompt_ids == without("what?", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("max_length", [26, 40, 57, 80])
def test_as_few_of_the_oldest_items_are_cut_as_will_do(max_length):
    """Against trying every cut in turn."""
    titles = ["red river two", "blue moon", "x" * 9, "green hill", "quiet home of cranes", "amber", "zz top"]
    rows = [viewer(row, titles[row % 3 :][: 1 + row]) for row in range(7)]
    split = tokenize_split(rows, TOKENIZER, max_length)
    longest = max(len(ids) for ids in split[0].response_ids)
    cuts = []
    for row, item in zip(rows, split, strict=True):
        tried = [TOKENIZER(row.without_oldest(cut))["input_ids"] for cut in range(len(row.history) + 1)]
        cuts.append(next(cut for cut, ids in enumerate(tried) if 1 + len(ids) + longest <= max_length))
        assert item.prompt_ids[1:] == tried[cuts[-1]]
    assert split.report["history_items_cut"] == sum(cuts)
    assert split.report["prompts_truncated"] == sum(cut > 0 for cut in cuts)
    assert split.report["longest_total"] <= max_length


def test_what_cannot_fit_is_refused_by_name():
    with pytest.raises(UserError, match=r"^train/4: prompt \(without its history.*max_length=20.*at least"):
        tokenize_split([viewer(4, ["blue moon"], end=" and so on" * 9)], TOKENIZER, 20)
    with pytest.raises(UserError, match=r"^train/0: .*\(\d+ \+ \d+ tokens\)"):
        tokenize_split([example("what is the home? " * 9, "green")], TOKENIZER, 20)
    with pytest.raises(UserError, match=r"^train/0: .* shorten them, or set dataset.long_rows"):
        tokenize_split([example("what?", "green hill " * 20)], TOKENIZER, 20)


@pytest.mark.parametrize("template", [False, True])
def test_prompts_that_carry_the_tokenizers_own_markup_are_told(template):
    tokenizer = bpe()
    tokenizer.chat_template = CHAT
    rows = [example("<s>what?", "green", row=0), example("what?", "green", row=1)]
    (told,) = [line for line in tokenize_split(rows, tokenizer, 100, template).warnings if "special tokens" in line]
    assert told.startswith("1 of 2 prompts") and ("chat_template=false" in told) == template


def test_texts_are_joined_as_they_stand():
    """A space joins two texts only where neither brings one; every token stands for what was given."""
    rows = [("what?", "green"), ("what?\n", "green"), ("what? ", "blue"), ("def f():\n", "    return"), ("a", "\tb")]
    split = tokenize_split([example(*texts, row=row) for row, texts in enumerate(rows)], TOKENIZER, 100)
    for (prompt, response), item in zip(rows, split, strict=True):
        whole = TOKENIZER.decode(item.prompt_ids[1:] + item.response_ids[0][:-1])
        assert whole == prompt + (" " if (prompt, response) == ("what?", "green") else "") + response


def test_rows_that_are_too_long_are_all_named_or_left_out_or_cut():
    """What is left out leaves the others as they are without it; what is cut is a beginning or an end of the whole."""
    rows = [example(f"number {row}?", "green hill", "blue", row=row) for row in range(9)]
    rows[3] = replace(example("what is the home? " * 9, "green hill", "blue", row=3), where="own.jsonl:17")
    rows[5] = example("what?", "green hill " * 20, "blue", row=5)
    with pytest.raises(
        UserError, match=r"^own.jsonl:17: .*2 of 9 rows, own.jsonl:17 \(\d+ \+ \d+ tokens\), train/5 \("
    ):
        tokenize_split(rows, TOKENIZER, 20)
    skipped = tokenize_split(rows, TOKENIZER, 20, long_rows="skip")
    others = [row for row in range(9) if row not in (3, 5)]
    assert list(skipped) == list(tokenize_split([rows[row] for row in others], TOKENIZER, 20))
    assert list(skipped.rows_of(rows)) == [rows[row] for row in others] and "own.jsonl:17" in skipped.warnings[0]
    whole, cut = tokenize_split(rows, TOKENIZER, 10_000), tokenize_split(rows, TOKENIZER, 20, long_rows="truncate")
    assert cut.report["longest_total"] <= 20 and "2 of 9 rows" in cut.warnings[0]
    assert cut.report["prompts_truncated"] == 0, "they have no history to lose"
    for row, (before, after) in enumerate(zip(whole, cut, strict=True)):
        assert (before == after) == (row not in (3, 5)), row
        kept = len(after.prompt_ids) - 1
        assert after.prompt_ids == before.prompt_ids[:1] + before.prompt_ids[-kept:]
        for old, new in zip(before.response_ids, after.response_ids, strict=True):
            assert new[-1] == old[-1] and new[:-1] == old[:-1][: len(new) - 1]
    assert len(cut[3].prompt_ids) + max(map(len, cut[3].response_ids)) == 20 and len(cut[5].response_ids[0]) == 10


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (example("", "green", row=7), "train/7: the prompt is empty"),
        (example(" \n", "green", row=7), "train/7: the prompt is empty"),
        (example("what?", "", row=7), "train/7: a response is empty"),
        (example("what?", "green", " ", row=7), "train/7: a response is empty"),
        (example("what?", "green</s>", row=7), "train/7: .*end token </s>"),
    ],
)
@pytest.mark.parametrize("chat_template", [False, True])
def test_unusable_texts_are_refused_by_name(row, told, chat_template):
    tokenizer = bpe()
    tokenizer.chat_template = CHAT
    with pytest.raises(UserError, match=told):
        tokenize_split([example("what?", "green"), row], tokenizer, 100, chat_template)


def test_chat_templates_render_the_prompt_as_a_users_turn():
    tokenizer = bpe()
    tokenizer.chat_template = CHAT
    several = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what?"}]
    rows = [example("what?", "green hill"), example("system: ...", "green hill", row=1, messages=several)]
    split = tokenize_split(rows, tokenizer, 100, chat_template=True)
    for item, messages in zip(split, ([{"role": "user", "content": "what?"}], several), strict=True):
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert item.prompt_ids == rendered and rendered.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(item.response_ids[0][:-1]) == "green hill"
    assert split.report["boundary_differences"] == 0


def test_what_the_tokenizer_must_have():
    with pytest.raises(UserError, match="no end token"):
        tokenize_split([example("what?", "green")], bpe(pad_token="<pad>"), 100)
    with pytest.raises(UserError, match="no chat template"):
        tokenize_split([example("what?", "green")], TOKENIZER, 100, chat_template=True)


def test_responses_that_only_the_text_tells_apart_are_told():
    lower = bpe(normalizer=normalizers.Lowercase())
    split = tokenize_split([example("what?", "Green Hill", "green hill"), example("a", "b", "c")], lower, 100)
    assert split.report["chosen_tokens_in_pool"] == 1
    assert "cannot be told apart" in split.warnings[0]


def test_a_split_is_a_sequence():
    split = tokenize_split([example(f"what {row}?", "green", row=row) for row in range(5)], TOKENIZER, 100)
    assert len(split) == 5 and split[-1] == split[4] and split[1:3] == [split[1], split[2]]
    assert [item.id for item in split] == [f"train/{row}" for row in range(5)]
    with pytest.raises(IndexError):
        split[5]
    assert len(tokenize_split([], TOKENIZER, 100)) == 0


ids = st.lists(st.integers(0, 500), min_size=1, max_size=7)
items = st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=5)), min_size=1, max_size=4)


@given(items, st.integers(0, 500))
def test_collate_pads_and_nothing_else(given_items, pad_id):
    """What the masks keep is what went in, even where a token has the padding's id; what they drop is padding."""
    rows = [(10 + n, TokenizedExample(str(n), prompt, answers)) for n, (prompt, answers) in enumerate(given_items)]
    batch = collate(rows, pad_id)
    assert batch.ids == [item.id for _, item in rows] and batch.index_B.tolist() == [row for row, _ in rows]
    assert batch.prompt_ids_BP.dtype == batch.response_ids_BCT.dtype == torch.int64
    for b, (_, item) in enumerate(rows):
        assert batch.prompt_ids_BP[b][batch.prompt_mask_BP[b]].tolist() == item.prompt_ids
        kept = [
            line[mask].tolist()
            for line, mask in zip(batch.response_ids_BCT[b], batch.response_mask_BCT[b], strict=True)
        ]
        assert kept == item.response_ids + [[]] * (batch.response_ids_BCT.shape[1] - len(item.response_ids))
    assert (batch.prompt_ids_BP[~batch.prompt_mask_BP] == pad_id).all()
    assert (batch.response_ids_BCT[~batch.response_mask_BCT] == pad_id).all()
    assert (np.diff(batch.prompt_mask_BP.int().numpy()) <= 0).all()  # padding on the right only
    assert (np.diff(batch.response_mask_BCT.int().numpy()) <= 0).all()
    assert batch.prompt_mask_BP.any(0).all() and batch.response_mask_BCT.any((0, 1)).all()  # no column of padding alone


@pytest.mark.parametrize(("max_length", "long_rows"), [(1000, "error"), (28, "error"), (16, "skip"), (16, "truncate")])
@pytest.mark.parametrize(("block", "held"), [(2, 3), (3, 100)])
def test_blocks_and_what_is_remembered_change_nothing(tmp_path, monkeypatch, max_length, long_rows, block, held):
    """Blocks of a few rows, the last one not full, against all rows at once; and a folder against none."""
    titles = ["red river two", "blue moon", "x" * 9, "green hill", "quiet home of cranes", "amber", "zz top"]
    rows = [viewer(row, titles[: 1 + row], end="." * (row % 3 * 5) + " next:") for row in range(7)]
    whole = tokenize_split(rows, TOKENIZER, max_length, long_rows=long_rows)
    monkeypatch.setattr(tokenize_module, "BLOCK", block)
    monkeypatch.setattr(tokenize_module, "HELD", held)
    tokenize_split(rows, TOKENIZER, max_length, folder=tmp_path, long_rows=long_rows)
    mapped = TokenizedSplit(tmp_path)
    assert list(mapped) == list(whole) and mapped.report == whole.report and mapped.warnings == whole.warnings
    assert list(mapped.rows_of(rows)) == list(whole.rows_of(rows)) and len(mapped.rows_of(rows)) == len(mapped)
    assert (mapped.report["prompts_truncated"] > 0) == (max_length < 1000)
    assert 0 < len(mapped) < 7 if long_rows == "skip" else len(mapped) == 7
    with pyarrow.ipc.open_file(tmp_path / "tokens.arrow") as table:
        assert table.read_all()["id"].to_pylist() == [item.id for item in mapped], "a plain Arrow file, for anyone"


def test_tokens_are_made_once_and_what_happened_is_still_known(tmp_path, monkeypatch):
    rows = [viewer(row, ["red river two", "blue moon", "green hill"]) for row in range(3)]
    splits, cache = Splits(rows, rows[:1], rows[1:], digest="some data"), Cache(tmp_path)
    asked = (splits, bpe(), 18, False, cache)
    first = tokenize_splits(*asked)
    assert first["train"].warnings[0].startswith("3 of 3 prompts lost the oldest part")
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_module, "tokenize_split", None)  # would fail if it were called
        again = tokenize_splits(*asked)
        for name in ("train", "val", "test"):
            assert list(again[name]) == list(first[name]) and again[name].report == first[name].report
            assert again[name].warnings == first[name].warnings
    other, chat = bpe(size=300), bpe()
    ended = bpe(**{**SPECIAL, "eos_token": "<pad>"})
    chat.chat_template = CHAT
    for change in (
        (Splits(rows, rows, rows, digest="other data"), *asked[1:]),
        (splits, other, *asked[2:]),
        (splits, ended, *asked[2:]),
        (splits, bpe(**SPECIAL, split_special_tokens=True), *asked[2:]),
        (splits, asked[1], 1000, False, cache),
        (splits, chat, 1000, True, cache),
    ):
        before = len(list((tmp_path / "tokens").glob("*/manifest.json")))
        tokenize_splits(*change)
        assert len(list((tmp_path / "tokens").glob("*/manifest.json"))) == before + 3
    one_chat = tokenize_splits(splits, chat, 1000, True, cache)["train"][0]
    chat.chat_template = CHAT.replace("<|assistant|>", "<|answer|>")
    assert tokenize_splits(splits, chat, 1000, True, cache)["train"][0] != one_chat
