from __future__ import annotations

import dataclasses
import functools
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imagevec import MissingExtraError, cache
from imagevec.models.open_clip import OpenClipTextSource
from imagevec.texts import tokenize
from imagevec.texts.tokenize import Tokenizer
from tests.helpers.pipeline import run_python

BYTE_PAIRS, OF_THE_HUB = "tiny-vit", "tiny-siglip"

TEXTS = [
    "",
    "a photo of a cat",
    "it's 3.14, isn't it?!",
    "日本語 テキスト 🐱 👩‍👩‍👧 Grüße İstanbul",
    "café &amp;lt;b&gt; cafÃ© \x00\x07 \u200b \t\n end",
    "<start_of_text> in the <END_OF_TEXT> middle, <pad></s>",
    "word " * 300,
    "a" * 3_000,
    "snake_case, [brackets] and “quotes”",
]


@functools.cache
def theirs(open_clip, name: str):
    return open_clip.get_tokenizer(name)


@functools.cache
def ours(name: str) -> Tokenizer:
    tokenization = OpenClipTextSource(name).preprocessing(None)
    return Tokenizer(cache.stored(tokenization.vocabulary), tokenization)


@pytest.mark.parametrize("name", [BYTE_PAIRS, OF_THE_HUB])
def test_tokens_are_those_of_open_clip(clip, name):
    tokens = np.stack([ours(name)(text) for text in TEXTS])
    assert np.array_equal(tokens, theirs(clip, name)(TEXTS).numpy())


@pytest.mark.parametrize("name", [BYTE_PAIRS, OF_THE_HUB])
@given(text=st.text(max_size=200))
@example(text="\u2028\x85 A\u0130\ufb01")
def test_any_text_has_the_tokens_of_open_clip(clip, name, text):
    tokens = ours(name)(text)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == theirs(clip, name)([text])[0].tolist()


def test_a_word_of_a_megabyte_is_cut(clip):
    (end,) = ours(BYTE_PAIRS)("")[1:2]
    letters = "".join(np.random.default_rng(0).choice(list("abcdefghij"), 1 << 20))
    tokens = ours(BYTE_PAIRS)(letters)
    assert tokens.shape == (77,)
    assert tokens[-1] == end


@given(lengths=st.lists(st.integers(0, 100), min_size=1, max_size=5))
def test_a_batch_is_as_long_as_its_longest_text(clip, lengths):
    tokenizer = ours(BYTE_PAIRS)
    rows = [tokenizer("cat " * length) for length in lengths]
    batch = tokenizer.stack(rows)
    longest = min(77, max(lengths) + 2)
    assert longest <= batch.shape[1] <= min(77, longest + 7)
    assert batch.flags.c_contiguous
    assert np.array_equal(batch, np.stack(rows)[:, : batch.shape[1]])
    assert not np.stack(rows)[:, batch.shape[1] :].any()


def test_padding_that_is_read_is_kept(clip):
    assert ours(OF_THE_HUB).stack([ours(OF_THE_HUB)("cat")]).shape == (1, 12)


def test_a_separator_may_become_0(clip):
    """As in CLIPA's models, ``strip_sep_token``."""
    tokenizer = ours(OF_THE_HUB)
    (end,) = set(tokenizer("")) - {0}
    how = dataclasses.replace(tokenizer._how, zeroed=int(end))
    zeroing = Tokenizer(cache.stored(how.vocabulary), how)
    assert set(zeroing("cat")) == (set(tokenizer("cat")) - {end}) | {0}


def test_a_missing_package_is_named(monkeypatch):
    tokenize._library.cache_clear()
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(MissingExtraError, match=r"ftfy is not installed: .*imagevec\[clip\]"):
        tokenize.clean("text", "lower")


def test_it_needs_no_pytorch(clip):
    how = ours(BYTE_PAIRS)._how
    code = f"""
import sys
from pathlib import Path
from imagevec.spec import Tokenization
from imagevec.texts.tokenize import Tokenizer
tokenizer = Tokenizer(Path({str(cache.stored(how.vocabulary))!r}), {how!r})
heavy = {{"torch", "open_clip", "transformers"}}
print(tokenizer("a cat")[:4].tolist(), heavy & sys.modules.keys())
"""
    assert run_python(code) == "[49406, 320, 2368, 49407] set()\n"
