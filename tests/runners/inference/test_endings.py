"""What ends an answer, what it may not hold, and how its text continues the prompt; on Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from runners.api import BadRequest
from runners.inference.options import InferenceOptions, sampling_of
from runners.inference.runner import InferenceRunner
from runners.inference.tokens import Texts
from runners.models.builtin import corpus
from tests.kit.inference_specs import spec_of
from tests.kit.odd_models import small_config

PROMPT = "a slot returns"
STEPS = 12


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)


def greedy(reference: tuple[Any, Any], prompt: str = PROMPT, **options: Any) -> list[int]:
    model, tokenizer = reference
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": STEPS, "do_sample": False, **options}
    return model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def free(reference: Any) -> list[int]:
    """The greedy answer that nothing ends; its tokens differ, so that each can stand for an ending."""
    ids = greedy(reference)
    assert len(set(ids[:6])) == 6
    return ids


def answer(make_context: Any, model: Path, prompt: Any = PROMPT, **options: Any) -> dict[str, Any]:
    return InferenceRunner().run(make_context(spec_of(model, [prompt], **{"max_tokens": STEPS, **options})))


def ended(result: dict[str, Any]) -> tuple[str, str, int]:
    item = result["items"][0]
    return item["output"], item["finish_reason"], result["usage"]["completion_tokens"]


@pytest.fixture(scope="module")
def with_special(tiny_llama: Path, reference: Any, free: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, whose tokenizer calls the third token of the answer a special one, but not its end token."""
    folder = tmp_path_factory.mktemp("special")
    for each in tiny_llama.iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(free[2])]})
    assert len(tokenizer) == len(reference[1])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_stop_string_that_is_a_special_token(with_special, reference, free, make_context) -> None:
    tokenizer = AutoTokenizer.from_pretrained(with_special)
    special = tokenizer.convert_ids_to_tokens(free[2])
    text = reference[1].decode(free[:2])
    assert special not in answer(make_context, with_special)["items"][0]["output"]
    assert ended(answer(make_context, with_special, stop=[special])) == (text, "stop", 3)
    assert ended(answer(make_context, with_special, stop=["no such text", special])) == (text, "stop", 3)
    following = special + reference[1].decode(free[3:4])
    assert ended(answer(make_context, with_special, stop=[following])) == (text, "stop", 4)
    assert ended(answer(make_context, with_special, stop=[special], min_tokens=4))[1:] == ("length", STEPS)


def test_a_visible_stop_string_beside_a_special_token(with_special, reference, free, make_context) -> None:
    special = AutoTokenizer.from_pretrained(with_special).convert_ids_to_tokens(free[2])
    later = reference[1].decode(free[4:5])
    text = reference[1].decode(free[:2]) + reference[1].decode(free[3:4])
    assert ended(answer(make_context, with_special, stop=[later, special + "never"])) == (text, "stop", 5)


def test_stop_token_ids(tiny_llama, reference, free, make_context) -> None:
    text = reference[1].decode(free[:2])
    assert ended(answer(make_context, tiny_llama, stop_token_ids=[free[2], free[4]])) == (text, "stop", 3)
    with pytest.raises(BadRequest, match=r"^spec\.inference\.stop_token_ids: the model has no token 4096; its ids end"):
        answer(make_context, tiny_llama, stop_token_ids=[4096])


def test_min_tokens_holds_back_every_ending(tiny_llama, reference, free, make_context) -> None:
    least = 5
    result = answer(make_context, tiny_llama, stop_token_ids=[free[2]], min_tokens=least, logprobs=0)
    ids = [each["token_id"] for each in result["items"][0]["logprobs"]]
    assert ids[:2] == free[:2]
    assert free[2] not in ids[:least]
    banned = greedy(reference, suppress_tokens=[free[2], reference[1].eos_token_id], max_new_tokens=least)
    assert ids[:least] == banned
    stop = reference[1].decode(free[1:3])
    assert ended(answer(make_context, tiny_llama, stop=[stop]))[1] == "stop"
    text, reason, count = ended(answer(make_context, tiny_llama, stop=[stop], min_tokens=least))
    assert (text, reason, count) == (reference[1].decode(free), "length", STEPS)
    with pytest.raises(BadRequest, match=r"^spec\.inference\.min_tokens: 9 is more than max_tokens, 3"):
        answer(make_context, tiny_llama, min_tokens=9, max_tokens=3)


def test_ignore_eos(tiny_llama, reference, make_context) -> None:
    """A bias makes the end token the best one everywhere."""
    eos = reference[1].eos_token_id
    options = {"logit_bias": {str(eos): 100}}
    assert ended(answer(make_context, tiny_llama, **options)) == ("", "stop", 1)
    assert ended(answer(make_context, tiny_llama, ignore_eos=True, **options)) == ("", "length", STEPS)
    text, reason, count = ended(answer(make_context, tiny_llama, min_tokens=3, **options))
    assert (reason, count) == ("stop", 4)
    assert text == reference[1].decode(greedy(reference, min_new_tokens=3, max_new_tokens=3))
    stopped = ended(answer(make_context, tiny_llama, ignore_eos=True, stop=[reference[1].eos_token], **options))
    assert stopped == ("", "stop", 1)


def test_logit_bias(tiny_llama, reference, free, make_context) -> None:
    from transformers import SequenceBiasLogitsProcessor

    bias = {free[0]: -100.0, free[3]: 3.5}
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = reference[1].decode(greedy(reference, logits_processor=[processor]))
    given = {str(token): value for token, value in bias.items()}
    assert answer(make_context, tiny_llama, logit_bias=given)["items"][0]["output"] == expected
    for wrong, message in (({"x": 1}, "expected a token id"), ({"1": 101}, "100"), ({"4096": 1}, "no token 4096")):
        with pytest.raises(BadRequest, match=rf"^spec\.inference\.logit_bias.*{message}"):
            answer(make_context, tiny_llama, logit_bias=wrong)


def test_bad_words(tiny_llama, reference, free, make_context) -> None:
    tokenizer = reference[1]
    for word in (tokenizer.decode(free[1:2]), tokenizer.decode(free[1:4])):
        ids = tokenizer(word.lstrip(), add_special_tokens=False)["input_ids"]
        spaced = tokenizer(" " + word.lstrip(), add_special_tokens=False)["input_ids"]
        both = [ids, spaced] if len(ids) == len(spaced) and ids[0] != spaced[0] else [ids]
        expected = tokenizer.decode(greedy(reference, bad_words_ids=both))
        assert answer(make_context, tiny_llama, bad_words=[word])["items"][0]["output"] == expected
    with pytest.raises(BadRequest, match=r"^spec\.inference\.bad_words: an empty string"):
        answer(make_context, tiny_llama, bad_words=["a", " "])


def test_a_chat_that_ends_with_an_assistant_turn_is_continued(tiny_llama, reference, make_context) -> None:
    model, tokenizer = reference
    chat = [{"role": "user", "content": "what does a slot share?"}, {"role": "assistant", "content": "a slot"}]
    ids = tokenizer.apply_chat_template(chat, continue_final_message=True, return_dict=False)
    assert tokenizer.decode(ids).endswith("a slot")
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=STEPS)[0, len(ids) :]
    item = answer(make_context, tiny_llama, chat)["items"][0]
    assert item["output"] == tokenizer.decode(made, skip_special_tokens=True)
    assert item["prompt"] == chat
    with pytest.raises(BadRequest, match=r"^spec\.data\.items\[0\]: ends with an empty assistant turn"):
        answer(make_context, tiny_llama, [*chat[:1], {"role": "assistant", "content": " "}])


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer marks word beginnings and strips the first space, as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    strip = decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = trained["added_tokens"][:3]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    folder = tmp_path_factory.mktemp("sentencepiece")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(small_config(len(fast), bos_token_id=1, eos_token_id=2, pad_token_id=None))
    with torch.no_grad():
        model.lm_head.weight[:259] = 0
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def first_words(model: Path) -> tuple[list[str], list[list[int]]]:
    """Prompts whose answers begin with a new word, and their answers."""
    pair = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    prompts = [f"{subject} {verb}" for subject in ("the node", "a slot", "the log") for verb in ("waits", "ends", "is")]
    made = {prompt: greedy(pair, prompt) for prompt in prompts}
    kept = [prompt for prompt, ids in made.items() if pair[1].convert_ids_to_tokens(ids[0]).startswith("▁")]
    assert kept, "no answer begins with a word"
    return kept, [made[prompt] for prompt in kept]


def test_the_first_space_of_an_answer_stays(sentencepiece: Path, make_context) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sentencepiece)
    prompts, answers = first_words(sentencepiece)
    result = InferenceRunner().run(make_context(spec_of(sentencepiece, prompts, max_tokens=STEPS, logprobs=0)))
    for prompt, ids, item in zip(prompts, answers, result["items"], strict=True):
        whole = tokenizer.decode([*tokenizer(prompt)["input_ids"], *ids], skip_special_tokens=True)
        assert prompt + item["output"] == whole
        assert item["output"].startswith(" ")
        assert "".join(each["token"] for each in item["logprobs"]) == item["output"]
    word = result["items"][0]["output"].split()[0]
    stopped = InferenceRunner().run(make_context(spec_of(sentencepiece, prompts[:1], stop=[f" {word[0]}"])))
    assert ended(stopped)[:2] == ("", "stop")


def test_every_prefix_of_an_answer_reads_as_the_whole_does(sentencepiece: Path, tiny_llama: Path) -> None:
    """What a reader has seen never changes, whichever way a tokenizer spells spaces and characters."""
    sampling = sampling_of(InferenceOptions())
    for folder in (sentencepiece, tiny_llama):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        reader = Texts(tokenizer).reader(tokenizer("the node waits")["input_ids"], sampling)
        ids = tokenizer(" for its größe and 3 €", add_special_tokens=False)["input_ids"]
        whole = reader.text(ids, "length")
        assert whole.endswith(" and 3 €")
        for count in range(len(ids)):
            assert whole.startswith(reader.text(ids[:count], "length").rstrip("\ufffd"))


def test_a_prompt_that_has_its_begin_token_gets_no_second_one(tiny_llama, reference, make_context) -> None:
    plain = answer(make_context, tiny_llama)
    begun = answer(make_context, tiny_llama, reference[1].bos_token + PROMPT)
    assert begun["usage"] == {**plain["usage"], "latency_sec": begun["usage"]["latency_sec"]}
    assert begun["items"][0]["output"] == plain["items"][0]["output"]


def test_a_tokenizer_that_ends_each_text_does_not_end_the_prompt(tiny_llama, reference, make_context, tmp_path) -> None:
    folder = tmp_path / "ends"
    folder.mkdir()
    for each in tiny_llama.iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"][-1] == tokenizer.eos_token_id
    assert ended(answer(make_context, folder)) == ended(answer(make_context, tiny_llama))
