"""Tokenising on three tokenizer families: the mask follows characters, BOS/EOS stand once, stock calls agree."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nvembed.text.config import TextConfig
from nvembed.text.instructions import instruction_prefix
from nvembed.text.tokenise import Tokeniser
from nvembed.types import UserError

PREFIX = instruction_prefix("web_search")
LEARNED = [
    PREFIX + "how do I reverse a list in python",
    "the weakness that causes a heap overflow in the parser of images",
    "Größe naïve café 東京 🙂 definition of a clinical finding",
] * 4
TEXTS = [
    "how do I reverse a list",
    "",
    " leading space",
    "Größe 東京 🙂",
    "word " * 60,
    "a</s>b [SEP] <|endoftext|>",
    "x",
]


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(LEARNED, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def metaspace():
    """Llama's kind: words are learned one by one, but a text is not split before merging; bytes as fallback."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    backend.train_from_iterator(LEARNED[:2], trainer)
    described = json.loads(backend.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    backend = Tokenizer.from_str(json.dumps(described))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(LEARNED, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
    )


FAMILIES = {"byte_level": byte_level, "metaspace": metaspace, "wordpiece": wordpiece}
SPECIALS = [(True, True), (False, True), (True, False)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


def tokeniser(family, **text):
    return Tokeniser(FAMILIES[family](), TextConfig(**{"max_length": 64, "add_bos": True, **text}))


def test_bos_and_eos_once_and_kept_under_truncation(family):
    made = tokeniser(family, max_length=16)
    for text, tokens in zip(TEXTS, made.encode(TEXTS, [""] * len(TEXTS)), strict=True):
        ids = tokens.input_ids
        assert ids[0] == made.specials.bos and ids[-1] == made.specials.eos and len(ids) <= 16
        inner = set(ids[1:-1])
        assert not inner & {made.specials.bos, made.specials.eos}, text
    assert len(made.encode(["word " * 60], [""])[0].input_ids) == 16


@pytest.mark.parametrize(("add_bos", "add_eos"), SPECIALS)
@pytest.mark.parametrize("max_length", [8, 32])
def test_stock_tokenizer_gives_the_same_ids(family, add_bos, add_eos, max_length, tmp_path):
    made = tokeniser(family, add_bos=add_bos, add_eos=add_eos, max_length=max_length)
    made.tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    joined = [PREFIX + text for text in TEXTS] + TEXTS
    ours = [tokens.input_ids for tokens in made.encode(TEXTS * 2, [PREFIX] * len(TEXTS) + [""] * len(TEXTS))]
    for stock in (made.tokenizer, saved):
        assert stock(joined, truncation=True, max_length=max_length)["input_ids"] == ours
        assert (
            stock(joined, truncation=True, padding=True)["input_ids"]
            == made.collate(made.encode(joined, [""] * len(joined)))["input_ids"].tolist()
        )
    # A stock call leaves truncation switched on in the backend; ours must not depend on it.
    stock(["x"], truncation=True, max_length=3)
    assert [tokens.input_ids for tokens in made.encode(joined, [""] * len(joined))] == ours


def test_instruction_is_left_out_by_characters(family):
    made = tokeniser(family, max_length=600)
    for text, tokens in zip(TEXTS, made.encode(TEXTS, [PREFIX] * len(TEXTS)), strict=True):
        mask = np.array(tokens.pool_mask)
        assert mask[0] == 0 and mask[-1] == 1  # BOS goes with the instruction; EOS stays
        assert np.all(np.diff(mask) >= 0)  # one edge: instruction, then text
        pooled = [number for number, kept in zip(tokens.input_ids, mask, strict=True) if kept][:-1]
        if family == "wordpiece":  # splits at every space, so the text's own tokens are unchanged by what precedes
            assert pooled == made.encode([text], [""])[0].input_ids[1:-1]
        else:
            assert made.tokenizer.decode(pooled).strip() == text.strip()
    bare = made.encode(["text"], [""])[0]
    assert bare.pool_mask == [1] * len(bare.input_ids)  # documents pool everything, BOS too


def test_counting_tokens_would_be_wrong_for_byte_level_bpe():
    made = tokeniser("byte_level", add_bos=False, max_length=200)
    alone = len(made.tokenizer(PREFIX, add_special_tokens=False)["input_ids"])
    tokens = made.encode(["how do I"], [PREFIX])[0]
    masked = tokens.pool_mask.index(1)
    assert masked == alone - 1  # the trailing space belongs to the next word's token
    assert made.tokenizer.decode([tokens.input_ids[masked]]) == " how"


def test_empty_text_pools_eos_and_without_eos_the_last_token(family):
    for text in ("", "word"):
        cut = tokeniser(family, max_length=8).encode([text], [PREFIX])[0]
        assert cut.pool_mask == [0] * 7 + [1]
        last = tokeniser(family, max_length=8, add_eos=False).encode([text], [PREFIX])[0]
        assert last.pool_mask == [0] * 7 + [1]
    assert sum(tokeniser(family).encode([""], [PREFIX])[0].pool_mask) == 1


def test_unmasked_students_pool_the_instruction_too(family):
    tokens = tokeniser(family, mask_instruction=False).encode(["text"], [PREFIX])[0]
    assert tokens.pool_mask == [1] * len(tokens.input_ids)


def test_lengths_and_collate(family):
    made = tokeniser(family, max_length=24)
    instructions = [PREFIX if index % 2 else "" for index in range(len(TEXTS))]
    encoded = made.encode(TEXTS, instructions)
    lengths = made.lengths(TEXTS, instructions)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(tokens.input_ids) for tokens in encoded]
    batch = made.collate(encoded)
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths.tolist()
    for row, tokens in enumerate(encoded):
        size = len(tokens.input_ids)
        assert batch["input_ids"][row, :size].tolist() == tokens.input_ids
        assert set(batch["input_ids"][row, size:].tolist()) <= {made.pad_id}
        assert batch["pool_mask"][row].tolist() == tokens.pool_mask + [0] * (batch["pool_mask"].shape[1] - size)
    assert made.encode([], []) == [] and made.lengths([], []).shape == (0,)


MADE = {}


def shared(family):
    """One tokeniser per family for the property tests: building one takes longer than an example."""
    return MADE.setdefault(family, tokeniser(family, max_length=24))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(max_size=80), instruction=st.sampled_from(["", PREFIX, "Q: ", "Q:\n"]))
def test_any_text_is_one_well_formed_input(name, text, instruction):
    made = shared(name)
    tokens = made.encode([text], [instruction])[0]
    ids, mask = tokens.input_ids, tokens.pool_mask
    assert len(ids) == len(mask) <= 24
    assert ids[0] == made.specials.bos and ids[-1] == made.specials.eos
    if name != "byte_level":
        assert ids.count(made.specials.bos) == ids.count(made.specials.eos) == 1
    assert mask[-1] == 1 and mask == sorted(mask) and set(mask) <= {0, 1}
    assert made.lengths([text], [instruction]).tolist() == [len(ids)]
    assert tokens.cut == (made.lengths([text], [instruction], cut=False)[0] > 24)
    assert made.tokenizer(instruction + text, truncation=True, max_length=24)["input_ids"] == ids
    # The instruction acts on the mask only: the ids are those of the joined text.
    assert made.encode([instruction + text], [""])[0].input_ids == ids


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="not a fast tokenizer"):
        Tokeniser(Slow(), TextConfig())


@pytest.mark.parametrize(("kind", "key"), [("bos", "add_bos"), ("eos", "add_eos")])
def test_missing_special_token_is_refused(kind, key):
    tokenizer = wordpiece()
    setattr(tokenizer, f"{kind}_token", None)
    with pytest.raises(UserError, match=f"text.{key} is true, but the tokenizer has no {kind.upper()} token"):
        Tokeniser(tokenizer, TextConfig(add_bos=True, add_eos=True))


def test_neither_bos_nor_eos_is_refused():
    with pytest.raises(UserError, match="an empty text would have no token"):
        Tokeniser(wordpiece(), TextConfig(add_bos=False, add_eos=False))


def test_chat_templates_do_not_survive():
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages }}"  # sentence-transformers would render every text as a chat
    assert Tokeniser(tokenizer, TextConfig()).tokenizer.chat_template is None
    assert tokenizer.chat_template  # the caller's own tokenizer is left alone
