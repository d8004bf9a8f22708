"""The demo's byte-level BPE: Qwen2's pre-tokenizer and specials, merges trained on the demo's own sentences.

Digits and capitals stay single tokens, so that reading and boxes are spelled character by character.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from demo import data, questions

BASE_SIZE = 896
VOCAB_SIZE = 1024  # rows of the embedding: base, specials, padding
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TOKEN_ID = {name: BASE_SIZE + k for k, name in enumerate(SPECIALS)}
SYSTEM_PROMPT = "You are a helpful assistant."
# Qwen2's pattern (tokenizer.json of the released checkpoints): it defines where merges may not cross.
PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# The released checkpoints' chat template.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ENGLISH = """
Please look at this and tell me what it is. There are some things on the table, and one of them is large
while the other is small. I would like to know where the light is coming from, which of these was made
first, and whether they have anything in common. When you open the window you can see the river, the houses
on the hill, people walking along the street, a dog running after a ball, and clouds over the water. She
said that he could not come because of the rain, but that he might write to them before the end of the week.
Every good answer should be short and right; if you do not know, say so. How much does it cost, how long
will it take, who is going to do it, and why? The number of pages, the size of the letters, the colours of
the cover, the name on the back, the first line and the last line. Read it again and give me a list. Show
your work, explain the difference between this one and that one, then compare both of them. My friend thinks
about music, food, school, books, cars, trains, birds, trees, flowers, water, fire, snow, summer and winter.
We were there yesterday, we are here today, and we will be there tomorrow morning. Can you help me with
that? Would you like something to drink? Could you move a little to the left, or to the right, above, below,
between, near, inside, outside, under, behind, next to, in front of it? Also describe any person, animal,
building, road, sign, shirt, chair, screen, phone, paper, photo, drawing, background, corner, top, bottom,
middle, centre, side, edge, line, point.
"""


def corpus(seed: int = 0, pictures: int = 1500) -> list[str]:
    """Sentences of the demo (without strings that are read: they must stay characters) and plain English."""
    rng = random.Random(seed)
    lines = [line for line in ENGLISH.splitlines() for _ in range(25)]
    lines += [
        s
        for asked, answer in (*questions.CHAT, questions.NO_PICTURE)
        for s in (*asked, answer)
        for _ in range(25)
    ]
    lines += ["system", "user", "assistant", SYSTEM_PROMPT] * 200
    for _ in range(pictures):
        first, second = data.two_pictures(rng, ((112, 112), (112, 112)), 2)
        turns = [
            *questions.ask(rng, first, 6),
            questions.which(rng, first, second),
            questions.differ(rng, first, second),
        ]
        lines += [s for t in turns for s in (t.question, t.answer.split("<|box_start|>")[0])]
    words = (" ".join(w for w in line.split(" ") if sum(c.isupper() for c in w) < 2) for line in lines)
    return [w.replace("<|object_ref_start|>", "").replace("<|object_ref_end|>", "") for w in words]


def build() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=BASE_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if tokenizer.get_vocab_size() != BASE_SIZE:
        raise RuntimeError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, expected {BASE_SIZE}")
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer's files as a Qwen2-VL repository has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {"content": s, **flags, "special": True} for s, i in TOKEN_ID.items()
        },
        "additional_special_tokens": list(SPECIALS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}, indent=2) + "\n")
