"""Questions about the drawn pictures, with their answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from demo.clips import Clip, motion
from demo.data import COLOURS, SHAPES, Picture, Thing
from qwen2vl_q.demo.cards import article as article
from qwen2vl_q.demo.cards import listing

TASKS = (
    "what", "colour", "shape", "read", "count", "box", "present", "absent", "which", "differ",
    "point", "form", "field", "move", "order", "bounce",
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """`box` is the truth for the tasks "box" and "point", in 0..999 of the picture."""

    task: str
    question: str
    answer: str
    box: tuple[int, int, int, int] | None = None


WHAT = (
    "What is in the picture?",
    "What do you see?",
    "What is this?",
    "Describe the picture.",
    "Describe this image.",
    "What does the picture show?",
    "What can you see in this image?",
)
READ = (
    "What does it say?",
    "Read the text.",
    "What is written here?",
    "What text is in the picture?",
    "Which letters and digits do you see?",
    "What does the text say?",
)
COLOUR = (
    "What colour is the {}?",
    "What color is the {}?",
    "Which colour does the {} have?",
    "Tell me the colour of the {}.",
)
SHAPE = ("What shape is {}?", "Which shape is {}?", "What is the {} thing?", "Which thing is {}?")
COUNT = (
    "How many {} are there?",
    "How many {} do you see?",
    "Count the {}.",
    "How many {} are in the picture?",
)
BOX = (
    "Where is the {}?",
    "Find the {}.",
    "Give the box of the {}.",
    "Locate the {}.",
    "Show me where the {} is.",
)
THERE = ("Is there {}?", "Do you see {}?", "Can you see {}?", "Is {} in the picture?")
WHICH = (
    "Which picture has {}?",
    "Which one has {}?",
    "In which picture is {}?",
    "Where do you see {}, first or second?",
)
POINT = ("Point at the {}.", "Point to the {}.", "Give a point on the {}.")
FORM = (
    "Read the form as JSON.",
    "Give the form as JSON.",
    "Read the receipt as JSON.",
    "What does the form say? Answer as JSON.",
    "JSON of the form, please.",
)
FIELD = ("What is the {}?", "What does {} say?", "Read the {}.")
DIRECTION = ("Which way does the {} move?", "Where does the {} go?", "Which way does the {} go?")
MOVES = ("What moves?", "Which thing moves?")
ORDER = (
    "What comes first?",
    "What comes first, and what then?",
    "What happens?",
    "What do you see, in order?",
)
BOUNCE = ("How often does the {} bounce?", "How many times does the {} bounce?")
BOUNCES = ("It does not bounce.", "Once.", "Twice.", "Three times.")
DIFFER = ("What is different?", "What differs?", "What is the difference?", "How do the pictures differ?")

NO_PICTURE = (
    (
        "What is in the picture?",
        "What does it say?",
        "How many circles are there?",
        "Where is the star?",
        *WHAT,
    ),
    "I don't see a picture. Please show me one.",
)
CHAT: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Are you an AI?",
            "Tell me about you.", "Are you a demo?", "What model are you?", "who are you",
        ),
        "I am a small demo model. I answer questions about simple pictures.",
    ),
    (
        (
            "What can you do?", "Help", "How can you help me?", "What do you know?", "What should I ask you?",
            "What can I ask?", "What can I ask you?", "what can you do", "Can you help me?",
        ),
        "I am a small demo model. I can name shapes and colours, count them, find them, and read short text.",
    ),
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning!", "Hi there", "hello", "hi"),
        "Hello! Show me a picture and ask me about it.",
    ),
    (("Thanks", "Thank you", "Thank you!", "Thanks a lot!", "Great, thanks.", "thanks"), "You are welcome."),
    (("Bye", "Goodbye", "Bye!", "See you.", "bye"), "Goodbye!"),
    (
        (
            "What is the capital of France?", "Tell me a joke.", "Write a poem.", "What is 2 + 2?",
            "How is the weather?", "Explain quantum physics.", "Translate this into German.",
            "Who won the game?", "What time is it?", "Write a program in Python.", "How old are you?",
            "What is the meaning of life?", "Sing a song.", "Who is the president?", "Tell me a story.",
            "Why is the sky blue?",
        ),
        "I am a small demo model. I only know simple pictures.",
    ),
)  # fmt: skip

PLURAL = {s: s + ("es" if s.endswith("s") else "s") for s in (*SHAPES, "shape")}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def normalized_box(thing: Thing, picture: Picture) -> tuple[int, int, int, int]:
    """Pixels -> 0..999, as Qwen2-VL writes boxes."""
    w, h = picture.width, picture.height
    x0, y0, x1, y1 = (
        min(999, max(0, round(v * 1000 / side))) for v, side in zip(thing.box, (w, h, w, h), strict=True)
    )
    return x0, y0, x1, y1


def what(rng: random.Random, picture: Picture) -> Turn:
    if picture.text:
        return Turn("what", rng.choice(WHAT), f'The text "{picture.text}".')
    if len(picture.things) > 3:
        return Turn("what", rng.choice(WHAT), f"{len(picture.things)} shapes.")
    return Turn("what", rng.choice(WHAT), _sentence(listing([article(t.full_name) for t in picture.things])))


def read(rng: random.Random, picture: Picture) -> Turn:
    if not picture.text:
        return Turn("absent", rng.choice(READ), "I don't see any text.")
    return Turn("read", rng.choice(READ), f'It says "{picture.text}".')


def _alone(picture: Picture, key: Callable[[Thing], str]) -> list[Thing]:
    names = [key(t) for t in picture.things]
    return [t for t in picture.things if names.count(key(t)) == 1]


def colour(rng: random.Random, picture: Picture) -> Turn | None:
    if picture.text:
        return Turn("colour", rng.choice(COLOUR).format("text"), _sentence(picture.things[0].colour))
    alone = _alone(picture, lambda t: t.name)
    if not alone:
        return None
    thing = rng.choice(alone)
    return Turn("colour", rng.choice(COLOUR).format(thing.name), _sentence(thing.colour))


def shape(rng: random.Random, picture: Picture) -> Turn | None:
    alone = _alone(picture, lambda t: t.colour)
    if not alone:
        return None
    thing = rng.choice(alone)
    return Turn("shape", rng.choice(SHAPE).format(thing.colour), _sentence(article(thing.name)))


def count(rng: random.Random, picture: Picture) -> Turn:
    """Asks for a colour, a shape, or all; prefers larger numbers, so that answers stay balanced."""
    things = picture.things
    keys = [(f"{c} shape", sum(t.colour == c for t in things)) for c in sorted({t.colour for t in things})]
    keys += [(s, sum(t.name == s for t in things)) for s in sorted({t.name for t in things})]
    keys = [k for k in keys if k[1] <= 5]
    if len(things) <= 5:
        keys.append(("shape", len(things)))
    name, number = rng.choices(keys, [(1, 4, 9, 16, 25)[k[1] - 1] for k in keys])[0]
    plural = name.removesuffix("shape") + PLURAL["shape"] if name.endswith("shape") else PLURAL[name]
    return Turn("count", rng.choice(COUNT).format(plural), f"{number} {name if number == 1 else plural}.")


def box(rng: random.Random, picture: Picture) -> Turn | None:
    short = {t.name for t in _alone(picture, lambda t: t.name)}
    alone = _alone(picture, lambda t: t.full_name)
    if not alone:
        return None
    thing = rng.choice(alone)
    name = thing.name if thing.name in short and rng.random() < 0.4 else thing.full_name
    x0, y0, x1, y1 = normalized_box(thing, picture)
    answer = (
        f"<|object_ref_start|>the {name}<|object_ref_end|>"
        f"<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>"
    )  # fmt: skip
    return Turn("box", rng.choice(BOX).format(name), answer, (x0, y0, x1, y1))


def point(rng: random.Random, picture: Picture) -> Turn | None:
    """At the middle of a thing's box."""
    turn = box(rng, picture)
    if turn is None or turn.box is None:
        return None
    x0, y0, x1, y1 = turn.box
    name = turn.answer.partition("<|object_ref_end|>")[0].partition("the ")[2]
    answer = (
        f"<|object_ref_start|>the {name}<|object_ref_end|>"
        f"<|box_start|>({(x0 + x1) // 2},{(y0 + y1) // 2})<|box_end|>"
    )  # fmt: skip
    return Turn("point", rng.choice(POINT).format(name), answer, turn.box)


def present(rng: random.Random, picture: Picture) -> Turn:
    alone = _alone(picture, lambda t: t.name)
    thing = rng.choice(alone or picture.things)
    name = thing.name if alone and rng.random() < 0.5 else thing.full_name
    return Turn("present", rng.choice(THERE).format(article(name)), f"Yes, {article(thing.full_name)}.")


def absent(rng: random.Random, picture: Picture) -> Turn:
    """Asks for a thing that is not there; half of the time one like a thing that is."""
    there = {t.full_name for t in picture.things} | {t.name for t in picture.things}
    names = [s for s in SHAPES if s not in there]
    full = [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in there]
    if not picture.text and rng.random() < 0.5:
        colours, shapes = {t.colour for t in picture.things}, {t.name for t in picture.things}
        near = [n for n in full if (n.split()[0] in colours) or (n.split()[1] in shapes)]
        full = near or full
    name = rng.choice(names) if names and rng.random() < 0.5 else rng.choice(full)
    kind = rng.random()
    if kind < 0.2 and name in names:
        plural = PLURAL[name]
        return Turn("absent", rng.choice(COUNT).format(plural), f"I don't see any {plural}.")
    if kind < 0.4:
        return Turn("absent", rng.choice(BOX).format(name), f"I don't see {article(name)}.")
    if kind < 0.55 and name in names:
        return Turn("absent", rng.choice(COLOUR).format(name), f"I don't see {article(name)}.")
    return Turn("absent", rng.choice(THERE).format(article(name)), f"I don't see {article(name)}.")


def which(rng: random.Random, first: Picture, second: Picture) -> Turn:
    """For pairs where a thing is in one picture only, or (one time in six) in neither."""
    names = [{t.full_name for t in p.things} | {t.name for t in p.things} for p in (first, second)]
    k = rng.randrange(2)
    only = sorted(names[k] - names[1 - k])
    if not only or rng.random() < 1 / 6:
        name = rng.choice(
            [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in names[0] | names[1]]
        )
        return Turn("which", rng.choice(WHICH).format(article(name)), f"I don't see {article(name)}.")
    answer = ("The first picture.", "The second picture.")[k]
    return Turn("which", rng.choice(WHICH).format(article(rng.choice(only))), answer)


def differ(rng: random.Random, first: Picture, second: Picture) -> Turn:
    """For pairs that `two_pictures` made from one choice of things with a single change."""
    a, b = ([t.full_name for t in p.things] for p in (first, second))
    mine, yours = next(n for n in a if n not in b), next(n for n in b if n not in a)
    answer = f"The first has {article(mine)}, the second {article(yours)}."
    return Turn("differ", rng.choice(DIFFER), answer)


def form(rng: random.Random, picture: Picture) -> Turn:
    return Turn("form", rng.choice(FORM), json.dumps(dict(picture.fields)))


def field(rng: random.Random, picture: Picture) -> Turn:
    key, value = rng.choice(picture.fields)
    return Turn("field", rng.choice(FIELD).format(key), f'It says "{value}".')


def move(rng: random.Random, clip: Clip) -> Turn:
    """Asks which way a thing moves; sometimes which thing, where one alone does."""
    ways = [motion(path[0], path[-1]) for path in clip.paths]
    moving = [t for t, way in zip(clip.things, ways, strict=True) if way]
    if len(moving) == 1 and rng.random() < 0.2:
        return Turn("move", rng.choice(MOVES), _sentence(article(moving[0].full_name)))
    thing, way = rng.choice(list(zip(clip.things, ways, strict=True)))
    name = thing.name if rng.random() < 0.5 else thing.full_name
    return Turn("move", rng.choice(DIRECTION).format(name), _sentence(way or "it does not move"))


def order(rng: random.Random, clip: Clip) -> Turn:
    first, second = (article(t.full_name) for t in clip.things)
    return Turn("order", rng.choice(ORDER), f"First {first}, then {second}.")


def bounce(rng: random.Random, clip: Clip) -> Turn:
    name = clip.things[0].name
    return Turn("bounce", rng.choice(BOUNCE).format(name), BOUNCES[len(clip.touches)])


def ask_clip(rng: random.Random, clip: Clip) -> Turn:
    return {"move": move, "order": order, "bounce": bounce}[clip.kind](rng, clip)


def chat(rng: random.Random, pictures: bool) -> Turn:
    """A question that needs no picture; `pictures`: whether there is one all the same."""
    questions, answer = rng.choice(CHAT if pictures else (*CHAT, NO_PICTURE))
    return Turn("chat", rng.choice(questions), answer)


def _aside(rng: random.Random, _: Picture) -> Turn:
    return chat(rng, pictures=True)


def ask(rng: random.Random, picture: Picture, number: int) -> list[Turn]:
    """`number` questions about one picture, different in kind as far as it goes."""
    if picture.text:
        turns = [read(rng, picture)]
        others: list[Callable[[random.Random, Picture], Turn | None]] = [read, what, colour, absent, _aside]
        weights = [3.0, 3.0, 1.0, 1.0, 0.2]
    else:
        turns = []
        others = [what, colour, shape, count, box, present, absent, read, _aside]
        many = len(picture.things) > 3
        weights = [1.0 if many else 3.0, 0.7, 0.7, 3.0, 3.0, 0.7, 1.5, 0.2, 0.1]
    while len(turns) < number and others:
        k = rng.choices(range(len(others)), weights)[0]
        turn = others[k](rng, picture)
        others.pop(k), weights.pop(k)
        if turn is not None:
            turns.append(turn)
    rng.shuffle(turns)
    return turns
