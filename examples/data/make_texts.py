"""Write the demo's texts: general passages to keep, held-out passages to judge by, and a small task to learn.

    python examples/data/make_texts.py

The sentences are patterns of our own, filled in at random from a fixed seed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
GENERAL, HELDOUT, TASK = 240, 48, 320

PLACES = (
    "the old mill,the harbour,a narrow valley,the north gate,our village,the long bridge,the orchard,a quiet square"
)
PEOPLE = "Martha,the miller,a young doctor,my grandfather,the ferryman,Anna and Paul,the teacher,a travelling painter"
TIMES = "In early spring,Before sunrise,On the last day of the year,After the rain,Late in the evening,Every Tuesday"
TOPICS = (
    (
        "{time}, {who} walked to {place} to look at the river.",
        "The water was {height} than the week before, and it carried {load} past the stones.",
        "{who2} had measured it with a stick and wrote down {number} hands.",
        "Nobody in {place2} could remember a {season} like this one.",
        "height:higher,lower,darker,colder|load:leaves,broken branches,thin ice,a lost hat|season:winter,summer,March,harvest",
    ),
    (
        "To bake this bread, mix {number} cups of {flour} with warm water and a spoon of salt.",
        "Let the dough rest {rest} until it has doubled.",
        "{who} always adds {extra}, which gives the crust its {colour} colour.",
        "It keeps for {number2} days if it is wrapped in a cloth.",
        "flour:rye flour,wheat flour,oat flour|rest:overnight,for an hour,near the stove|extra:honey,a little beer,"
        "roasted seeds|colour:brown,golden,dark",
    ),
    (
        "The {machine} in {place} has {number} wheels and one long belt.",
        "When the first wheel turns, the belt pulls the others, and {result}.",
        "{who} oils the bearings {often} because dry metal wears away.",
        "A second {machine} was built later, but it needed {number2} men to move it.",
        "machine:pump,loom,crane,clock|result:water rises into the tank,the hammer falls,the thread is drawn tight|"
        "often:every morning,twice a week,before each shift",
    ),
    (
        "A {animal} can hear {sound} from far away.",
        "It sleeps in {home} and hunts {when}, so few people ever see one.",
        "{who} counted {number} of them near {place} last {season}.",
        "Their young leave after {number2} weeks and find a place of their own.",
        "animal:fox,barn owl,marten,hedgehog|sound:a mouse under snow,the steps of a dog,falling acorns|home:a hollow tree,"
        "an empty barn,the roots of an oak|when:at night,at dusk,in heavy rain|season:winter,summer,autumn",
    ),
    (
        "If a field is {number} steps long and {number2} steps wide, its edge is twice the sum of both.",
        "{who} used this rule to {purpose} around {place}.",
        "The area is another matter: it grows with {growth}.",
        "So a field with the same edge may hold {amount} grain.",
        "purpose:plan a fence,lay out a path,buy enough rope|growth:the product of the two sides,each side alike|amount:more,less,half the,twice the",
    ),
    (
        "The town council met {when} to talk about {matter}.",
        "{who} said that the money would last for {number} months at most.",
        "{who2} answered that {place} had waited long enough.",
        "In the end they agreed, with {number2} votes against, to begin {start}.",
        "when:on Monday,after the fair,behind closed doors|matter:the new school,the roof of the church,the price of water|"
        "start:in spring,at once,with a smaller plan",
    ),
)
PRAISE = (
    "friendly and quick,a pleasure from start to end,better than we had hoped,worth every penny,clean and well made"
)
BLAME = "slow and rude,a waste of an evening,worse than we had feared,far too dear for what it is,dirty and badly made"
THINGS = "The soup,Our room,The service,This lamp,The guided tour,The new coat,Their coffee,The train ride,The concert"


def pick(random_: random.Random, words: str) -> str:
    return random_.choice(words.split(","))


def passage(random_: random.Random) -> str:
    *sentences, lists = random_.choice(TOPICS)
    slots = dict(part.split(":") for part in lists.split("|"))
    values = {name: pick(random_, words) for name, words in slots.items()}
    for name, words in (("place", PLACES), ("who", PEOPLE)):
        values[name], values[f"{name}2"] = random_.sample(words.split(","), 2)
    values |= {
        "time": pick(random_, TIMES),
        "number": str(random_.randint(2, 40)),
        "number2": str(random_.randint(2, 9)),
    }
    text = " ".join(sentences).format(**values)
    return ". ".join(part[:1].upper() + part[1:] for part in text.split(". "))


def review(random_: random.Random) -> dict[str, str]:
    good = random_.random() < 0.5
    first, second = random_.sample(THINGS.split(","), 2)
    words = PRAISE if good else BLAME
    text = f"{first} was {pick(random_, words)}. {second} was {pick(random_, words)}, too."
    return {
        "instruction": "What does the writer think? Answer good or bad.\n",
        "input": f"Text: {text}\nAnswer:",
        "output": "good" if good else "bad",
    }


def write(name: str, rows: list[dict[str, str]]) -> None:
    lines = [json.dumps(row) for row in rows]
    (HERE / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    random_ = random.Random(0)
    passages = list(dict.fromkeys(passage(random_) for _ in range(4 * (GENERAL + HELDOUT))))
    write("general.jsonl", [{"text": text} for text in passages[:GENERAL]])
    write("heldout.jsonl", [{"text": text} for text in passages[GENERAL : GENERAL + HELDOUT]])
    write("task.jsonl", [review(random_) for _ in range(TASK)])


if __name__ == "__main__":
    main()
